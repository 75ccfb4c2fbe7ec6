"""What runs, what would run, and the switch, in the API."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from django.db.models import QuerySet
from django.http import HttpRequest
from ninja import Router, Schema
from ninja.pagination import paginate
from pydantic import Field

from apps.common.access import require, role_of
from apps.common.actors import actor_of
from apps.common.api import Paged, needs
from apps.common.errors import Invalid
from apps.common.roles import Role
from apps.deployments.models import LIVE, Boot, Deployment, Replica
from apps.deployments.plan import command_lines, plan
from apps.deployments.plan_schemas import PlanOut
from apps.deployments.plan_told import plan_dict
from apps.deployments.policies.verdicts import asker_of
from apps.deployments.selectors import deployment_get
from apps.deployments.services import require_switch, stop_request, switch_request
from apps.deployments.suggestions import suggestion_apply
from apps.engines.protocol import InvalidOptions
from apps.jobs.api import JobOut, WaitSeconds
from apps.jobs.models import Job
from apps.jobs.selectors import job_get
from apps.jobs.waiting import wait_for
from apps.profiles.api import ProfileOut, VersionIn
from apps.profiles.drafts import version_draft
from apps.profiles.models import Profile, ProfileVersion
from apps.profiles.selectors import profile_get
from apps.rigs.models import Rig
from apps.rigs.selectors import rig_default, rig_get

router = Router(tags=["serving"])


class ReplicaOut(Schema):
    """``gpus`` are indices of the cards it holds; empty on the CPU. ``condition`` is the engine's own word, where one
    engine tells of several replicas (Ray Serve: running, starting, gone, ...). ``warnings`` are sentences about a start
    that succeeded otherwise than asked for, ``start`` what its log showed."""

    index: int
    healthy: bool
    condition: str
    gpus: list[int]
    warnings: list[str]
    start: dict[str, Any] | None

    @staticmethod
    def resolve_warnings(replica: Replica) -> list[str]:
        return replica.start_warnings

    @staticmethod
    def resolve_start(replica: Replica) -> dict[str, Any] | None:
        return (replica.start_check or {}).get("facts") or None

    @staticmethod
    def resolve_gpus(replica: Replica) -> list[int]:
        return sorted(r.gpu.index for r in replica.reservations.all() if r.gpu is not None)


class BootFactsOut(Schema):
    """What was predicted of its memory per GPU, and what its log told: bytes, tokens, seconds per phase. ``actual`` is
    null until it was ready, or where the engine does not tell."""

    predicted: dict[str, Any]
    actual: dict[str, Any] | None


class DeploymentOut(Schema):
    """``status`` is what was seen, ``desired`` what a person asked. ``simulated``: the simulated engine stands in."""

    id: int
    rig: str
    profile: str
    profile_version: int
    model: str
    engine: str
    engine_version: str
    layout: str
    served_name: str
    status: str
    status_reason: str
    desired: str
    simulated: bool
    started_by: str
    job: int | None
    created_at: datetime
    ready_at: datetime | None
    ended_at: datetime | None
    evidence: dict[str, Any] | None
    boot: BootFactsOut | None
    replicas: list[ReplicaOut]

    @staticmethod
    def resolve_boot(deployment: Deployment) -> Boot | None:
        return getattr(deployment, "boot", None)

    @staticmethod
    def resolve_rig(deployment: Deployment) -> str:
        return deployment.rig.slug

    @staticmethod
    def resolve_profile(deployment: Deployment) -> str:
        return deployment.version.profile.slug

    @staticmethod
    def resolve_profile_version(deployment: Deployment) -> int:
        return deployment.version.number

    @staticmethod
    def resolve_model(deployment: Deployment) -> str:
        return deployment.version.model.slug

    @staticmethod
    def resolve_engine(deployment: Deployment) -> str:
        return deployment.version.engine

    @staticmethod
    def resolve_started_by(deployment: Deployment) -> str:
        return deployment.started_by_name

    @staticmethod
    def resolve_job(deployment: Deployment) -> int | None:
        return deployment.job_id

    @staticmethod
    def resolve_replicas(deployment: Deployment) -> list[Replica]:
        return list(deployment.replicas.all())


class PlanIn(VersionIn):
    rig: str | None = None


class SwitchIn(Schema):
    """``wait_s``: answer when the job has ended, or after so many seconds. ``exclusive``: stop everything else too.
    ``override``: pass over somebody else's pin, or the pause of a card that was stopped for heat, for operators; it is
    recorded."""

    profile: str
    reason: str = Field(default="", max_length=500)
    wait_s: WaitSeconds = 0
    exclusive: bool = False
    override: bool = False
    rig: str | None = None


class StopIn(Schema):
    reason: str = Field(default="", max_length=500)
    override: bool = False
    wait_s: WaitSeconds = 0


def chosen_rig(reference: str | None) -> Rig:
    return rig_get(reference) if reference else rig_default()


def planned(version: ProfileVersion, rig: Rig) -> dict[str, Any]:
    """Raises Invalid for options that the engine refuses."""
    found = plan(version, rig, advise=True)
    try:
        lines = command_lines(found) if found.fits else []
    except InvalidOptions as error:
        fields = {f"options.{one.field}": [one.message] for one in error.errors}
        raise Invalid("The engine refuses these options.", fields=fields) from error
    return plan_dict(found, lines)


@router.get("/profiles/{profile}/plan", response=PlanOut, auth=needs(Role.VIEWER), summary="What a switch would do")
def plan_profile(request: HttpRequest, profile: str, rig: str | None = None) -> dict[str, Any]:
    return planned(profile_get(profile).current, chosen_rig(rig))


@router.post("/plan", response=PlanOut, auth=needs(Role.VIEWER), summary="Plan a profile that is not saved")
def plan_draft(request: HttpRequest, data: PlanIn) -> dict[str, Any]:
    """Stores nothing; ``profile`` is empty and ``version`` 0 in the answer."""
    return planned(version_draft(**data.values()), chosen_rig(data.rig))


@router.post("/switch", response={202: JobOut}, auth=needs(Role.MEMBER), summary="Switch to a profile")
def switch(request: HttpRequest, data: SwitchIn) -> Job:
    """Members: to profiles marked for them. The same wish twice is one job; a later one supersedes an earlier."""
    profile = profile_get(data.profile)
    role = role_of(request.user)
    require_switch(role, profile)
    if data.exclusive:
        require(request.user, Role.OPERATOR, "stop everything else")
    if data.override:
        require(request.user, Role.OPERATOR, "pass over a pin or a paused card")
    job = switch_request(
        profile=profile,
        actor=actor_of(request.user),
        reason=data.reason,
        exclusive=data.exclusive,
        rig=chosen_rig(data.rig),
        asker=asker_of(role),
        override=data.override,
    )
    return wait_for(job, limit_seconds=data.wait_s)


@router.get("/deployments", response=list[DeploymentOut], auth=needs(Role.VIEWER), summary="What runs and what ran")
@paginate(Paged)
def list_deployments(request: HttpRequest, rig: str | None = None, live: bool | None = None) -> QuerySet[Deployment]:
    """Newest first; ``live=true`` leaves out what has stopped or failed."""
    found = Deployment.objects.select_related("version__profile", "version__model", "rig", "boot")
    found = found.prefetch_related("replicas__reservations__gpu")
    if rig:
        found = found.filter(rig=rig_get(rig))
    if live is not None:
        found = found.filter(status__in=LIVE) if live else found.exclude(status__in=LIVE)
    return found


@router.get("/deployments/{int:deployment}", response=DeploymentOut, auth=needs(Role.VIEWER), summary="One deployment")
def get_deployment(request: HttpRequest, deployment: int) -> Deployment:
    return deployment_get(deployment)


@router.post(
    "/deployments/{int:deployment}/stop", response={202: JobOut}, auth=needs(Role.OPERATOR), summary="Stop a deployment"
)
def stop(request: HttpRequest, deployment: int, data: StopIn | None = None) -> Job:
    data = data or StopIn()
    job = stop_request(
        deployment=deployment_get(deployment),
        actor=actor_of(request.user),
        reason=data.reason,
        override=data.override,
    )
    return wait_for(job, limit_seconds=data.wait_s)


@router.post(
    "/jobs/{int:job}/suggestion",
    response={201: ProfileOut},
    auth=needs(Role.OPERATOR),
    summary="Apply what a failed job suggests, as a new version of its profile",
)
def apply_suggestion(request: HttpRequest, job: int) -> tuple[int, Profile]:
    return 201, suggestion_apply(job_get(job), actor=actor_of(request.user)).profile
