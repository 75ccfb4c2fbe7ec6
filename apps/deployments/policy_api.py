"""Restart policies, and what runs on a rig without the panel, in the API."""

from __future__ import annotations

from django.http import HttpRequest
from ninja import Router, Schema
from pydantic import Field

from apps.common.actors import actor_of
from apps.common.api import needs
from apps.common.roles import Role
from apps.deployments.models import RestartPolicy
from apps.deployments.restarting import policy_of
from apps.deployments.selectors import deployment_get
from apps.deployments.services import cut_request, restart_policy_set
from apps.deployments.strays import Stray, strays
from apps.profiles.selectors import profile_get
from apps.rigs.selectors import rig_get

router = Router(tags=["serving"])


class RestartPolicyOut(Schema):
    """``restarts`` within ``window_seconds``, each after a doubled ``backoff_seconds``; a one-token probe every
    ``probe_every_seconds`` while the engine is idle."""

    restarts: int
    window_seconds: float
    backoff_seconds: float
    probe_every_seconds: float
    probe_limit_seconds: float
    probe_failures: int


class RestartPolicyIn(Schema):
    """What is left out stays as it is. ``restarts`` 0: never; ``probe_every_seconds`` 0: no probes."""

    restarts: int | None = Field(default=None, ge=0, le=100)
    window_seconds: float | None = Field(default=None, ge=1, le=7 * 86400)
    backoff_seconds: float | None = Field(default=None, ge=0, le=3600)
    probe_every_seconds: float | None = Field(default=None, ge=0, le=86400)
    probe_limit_seconds: float | None = Field(default=None, ge=0.1, le=3600)
    probe_failures: int | None = Field(default=None, ge=1, le=100)


class StrayOut(Schema):
    """``kind``: ``stray engine`` (launched by this panel, no longer on record) or ``foreign``. Left alone."""

    kind: str
    pid: int
    user: str
    command: str
    gpus: list[int]
    memory_used_bytes: int | None


@router.get(
    "/profiles/{profile}/restarts", response=RestartPolicyOut, auth=needs(Role.VIEWER), summary="A restart policy"
)
def get_restart_policy(request: HttpRequest, profile: str) -> RestartPolicy:
    """The defaults where the profile has none of its own."""
    return policy_of(profile_get(profile))


@router.put(
    "/profiles/{profile}/restarts", response=RestartPolicyOut, auth=needs(Role.OPERATOR), summary="Set a restart policy"
)
def put_restart_policy(request: HttpRequest, profile: str, data: RestartPolicyIn) -> RestartPolicy:
    values = data.model_dump(exclude_none=True)
    return restart_policy_set(profile=profile_get(profile), actor=actor_of(request.user), **values)


@router.post(
    "/deployments/{int:deployment}/cut",
    response={204: None},
    auth=needs(Role.OPERATOR),
    summary="Cut the answers that a draining deployment still gives",
)
def cut(request: HttpRequest, deployment: int) -> tuple[int, None]:
    """409 when it is not draining."""
    cut_request(deployment=deployment_get(deployment), actor=actor_of(request.user))
    return 204, None


@router.get(
    "/rigs/{rig}/strays", response=list[StrayOut], auth=needs(Role.VIEWER), summary="What runs there without the panel"
)
def get_strays(request: HttpRequest, rig: str) -> list[Stray]:
    """Engines that the panel lost, and other people's processes on the cards, as seen within the last minute."""
    return strays(rig_get(rig))
