"""Jobs in the API: the history, one job, its log, cancelling it."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponseBase
from ninja import Router, Schema
from ninja.pagination import paginate
from pydantic import Field

from apps.common.actors import actor_of
from apps.common.api import Paged, needs
from apps.common.roles import Role
from apps.jobs.access import cancel_allowed
from apps.jobs.export import jobs_export
from apps.jobs.filters import jobs_filtered
from apps.jobs.models import Job
from apps.jobs.selectors import LOG_PAGE_LINES, job_get, job_log_after
from apps.jobs.services import job_cancel

router = Router(tags=["jobs"])

WAIT_MAX_SECONDS = 600
# Of every call that answers with a job it made: answer when the job has ended, or after so many seconds.
WaitSeconds = Annotated[float, Field(ge=0, le=WAIT_MAX_SECONDS)]


class StepOut(Schema):
    name: str
    state: str
    started_at: datetime | None
    finished_at: datetime | None
    detail: str


class JobOut(Schema):
    """``user``, ``profile`` and ``rig`` are names: history outlives what they name."""

    id: int
    kind: str
    state: str
    reason: str
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    eta_s: float | None
    progress: float
    steps: list[StepOut]
    profile: str | None
    profile_version: int | None
    deployment: int | None
    rig: str
    user: str
    superseded_by: int | None
    result: dict[str, Any] | None

    @staticmethod
    def resolve_eta_s(job: Job) -> float | None:
        return job.eta_seconds

    @staticmethod
    def resolve_steps(job: Job) -> list[Any]:
        return list(job.steps.all())

    @staticmethod
    def resolve_profile(job: Job) -> str | None:
        return job.profile_slug or None

    @staticmethod
    def resolve_deployment(job: Job) -> int | None:
        return job.deployment_id

    @staticmethod
    def resolve_rig(job: Job) -> str:
        return job.rig_name

    @staticmethod
    def resolve_user(job: Job) -> str:
        return job.user_name

    @staticmethod
    def resolve_superseded_by(job: Job) -> int | None:
        return job.superseded_by_id


class LogLineOut(Schema):
    id: int
    at: datetime
    source: str
    text: str


class LogOut(Schema):
    """Ask again with ``?after=<next_after>`` until ``state`` is final and ``items`` is empty."""

    items: list[LogLineOut]
    next_after: int
    state: str


@router.get("/jobs", response=list[JobOut], auth=needs(Role.VIEWER), summary="List jobs, newest first")
@paginate(Paged)
def list_jobs(
    request: HttpRequest,
    kind: str | None = None,
    state: str | None = None,
    user: str | None = None,
    since: str | None = None,
    q: str | None = None,
) -> QuerySet[Job]:
    """``user`` is an id or the beginning of a name or address, ``since`` an ISO 8601 time, ``q`` text to find."""
    filters = {"kind": kind, "state": state, "user": user, "since": since, "q": q}
    return jobs_filtered(filters).prefetch_related("steps")


@router.get("/jobs/export", auth=needs(Role.VIEWER), summary="The history as CSV or JSON lines")
def export_jobs(
    request: HttpRequest,
    kind: str | None = None,
    state: str | None = None,
    user: str | None = None,
    since: str | None = None,
    q: str | None = None,
    format: str = "jsonl",
) -> HttpResponseBase:
    filters = {"kind": kind, "state": state, "user": user, "since": since, "q": q}
    return jobs_export(request, filters, format)


@router.get("/jobs/{int:job}", response=JobOut, auth=needs(Role.VIEWER), summary="One job with its steps")
def get_job(request: HttpRequest, job: int) -> Job:
    return job_get(job)


@router.get("/jobs/{int:job}/log", response=LogOut, auth=needs(Role.VIEWER), summary="A job's log from a line on")
def get_job_log(request: HttpRequest, job: int, after: int = 0) -> dict[str, Any]:
    """At most 1000 lines an answer."""
    found = job_get(job)
    lines = job_log_after(found, max(0, min(after, 2**62)), LOG_PAGE_LINES)
    return {"items": lines, "next_after": lines[-1].pk if lines else after, "state": found.state}


@router.post("/jobs/{int:job}/cancel", response={202: JobOut}, auth=needs(Role.MEMBER), summary="Ask a job to end")
def cancel_job(request: HttpRequest, job: int) -> Job:
    """Members end what they started, operators anything. 409 when it has ended already."""
    found = job_get(job)
    cancel_allowed(request.user, found)
    return job_cancel(found, actor=actor_of(request.user))
