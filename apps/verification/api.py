"""Verifications in the API: starting one, and what was measured beside what was expected."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from django.db.models import QuerySet
from django.http import HttpRequest
from ninja import Router, Schema
from ninja.pagination import paginate
from pydantic import Field

from apps.common.actors import actor_of
from apps.common.api import Paged, needs
from apps.common.roles import Role
from apps.jobs.api import JobOut, WaitSeconds
from apps.jobs.models import Job
from apps.jobs.waiting import wait_for
from apps.rigs.selectors import rig_default, rig_get
from apps.verification.models import CheckResult, VerificationRun
from apps.verification.selectors import run_get, run_list
from apps.verification.services import verify_request

router = Router(tags=["verification"])


class CheckResultOut(Schema):
    """``verdict``: pass, warn, fail or unknown. ``expected`` and ``measured`` are for people, ``data`` for programs."""

    check: str
    title: str
    verdict: str
    expected: str
    measured: str
    advice: str
    data: dict[str, Any]

    @staticmethod
    def resolve_check(result: CheckResult) -> str:
        return result.check_name


class VerificationOut(Schema):
    """``job`` is the id of the job that measures; ``finished_at`` is null while it does."""

    id: int
    suite: str
    rig: str
    hardware_source: str
    job: int | None
    user: str
    created_at: datetime
    finished_at: datetime | None
    results: list[CheckResultOut]

    @staticmethod
    def resolve_rig(run: VerificationRun) -> str:
        return run.rig.slug

    @staticmethod
    def resolve_job(run: VerificationRun) -> int | None:
        return run.job_id

    @staticmethod
    def resolve_user(run: VerificationRun) -> str:
        return run.user_name

    @staticmethod
    def resolve_results(run: VerificationRun) -> list[CheckResult]:
        return list(run.results.all())


class VerificationIn(Schema):
    """``wait_s``: answer when the job has ended, or after so many seconds."""

    suite: str = "quick"
    rig: str | None = None
    reason: str = Field(default="", max_length=500)
    wait_s: WaitSeconds = 0


@router.get("/verifications", response=list[VerificationOut], auth=needs(Role.VIEWER), summary="Runs, newest first")
@paginate(Paged)
def list_verifications(request: HttpRequest, rig: str | None = None) -> QuerySet[VerificationRun]:
    return run_list(rig_get(rig) if rig else None)


@router.post("/verifications", response={202: JobOut}, auth=needs(Role.OPERATOR), summary="Verify a rig")
def create_verification(request: HttpRequest, data: VerificationIn | None = None) -> Job:
    """The run itself is in ``GET /verifications``, with this job's id."""
    data = data or VerificationIn()
    rig = rig_get(data.rig) if data.rig else rig_default()
    job = verify_request(suite=data.suite, rig=rig, actor=actor_of(request.user), reason=data.reason)
    return wait_for(job, limit_seconds=data.wait_s)


@router.get(
    "/verifications/{int:verification}", response=VerificationOut, auth=needs(Role.VIEWER), summary="One run's results"
)
def get_verification(request: HttpRequest, verification: int) -> VerificationRun:
    return run_get(verification)
