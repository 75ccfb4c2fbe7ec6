"""Engine installs in the API."""

from __future__ import annotations

from datetime import datetime

from django.db.models import QuerySet
from django.http import HttpRequest
from ninja import Router, Schema
from ninja.pagination import paginate
from pydantic import Field

from apps.common.actors import actor_of
from apps.common.api import Paged, needs
from apps.common.roles import Role
from apps.installs.models import EngineInstall
from apps.installs.selectors import install_get, install_list
from apps.installs.services import install_remove, install_request
from apps.jobs.api import JobOut, WaitSeconds
from apps.jobs.models import Job
from apps.jobs.waiting import wait_for
from apps.rigs.selectors import rig_get

router = Router(tags=["engines"])


class InstallOut(Schema):
    """``managed``: installed by the panel, which may remove it; the others were found."""

    id: int
    rig: str
    engine: str
    name: str
    version: str
    managed: bool
    state: str
    problem: str
    size_bytes: int | None
    created_at: datetime

    @staticmethod
    def resolve_rig(install: EngineInstall) -> str:
        return install.rig_name


class InstallIn(Schema):
    """``name``: *starter* (llama.cpp with Gemma 3 270M, the smallest), *llama-server*, *vllm* or *ray*. On a rig
    without NVIDIA cards *vllm* is its CPU build. ``wait_s``: answer when the job has ended, or after so many
    seconds."""

    name: str
    version: str = ""
    rig: str | None = None
    reason: str = Field(default="", max_length=500)
    wait_s: WaitSeconds = 0


@router.get("/installs", response=list[InstallOut], auth=needs(Role.VIEWER), summary="Engines found or installed")
@paginate(Paged)
def list_installs(request: HttpRequest, rig: str = "") -> QuerySet[EngineInstall]:
    return install_list(rig)


@router.post("/installs", response={202: JobOut}, auth=needs(Role.OPERATOR), summary="Install an engine")
def create_install(request: HttpRequest, data: InstallIn) -> Job:
    job = install_request(
        name=data.name,
        version=data.version,
        actor=actor_of(request.user),
        rig=rig_get(data.rig) if data.rig else None,
        reason=data.reason,
    )
    return wait_for(job, limit_seconds=data.wait_s)


@router.delete(
    "/installs/{int:install}", response={202: JobOut}, auth=needs(Role.OPERATOR), summary="Remove a managed engine"
)
def delete_install(request: HttpRequest, install: int) -> Job:
    return install_remove(install_get(install), actor=actor_of(request.user))
