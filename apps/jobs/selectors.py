"""Reads of jobs, their steps and logs."""

from __future__ import annotations

from django.db.models import QuerySet

from apps.common.errors import NotFound
from apps.jobs.models import Job, JobLogLine, JobStep

LOG_TAIL_LINES = 200
LOG_PAGE_LINES = 1000


def job_get(reference: str | int) -> Job:
    """Raises NotFound."""
    job = None
    if str(reference).isdecimal() and len(str(reference)) < 19:
        job = Job.objects.select_related("user").filter(pk=int(reference)).first()
    if job is None:
        raise NotFound(f"There is no job {reference}.")
    return job


def job_list() -> QuerySet[Job]:
    """Newest first, without what lists do not show: a switch keeps kilobytes in these columns."""
    return Job.objects.select_related("user").defer("params", "data", "failure").order_by("-created_at", "-pk")


def job_steps(job: Job) -> list[JobStep]:
    """In the order they run; those that put things right after a failure come last."""
    return list(job.steps.order_by("index"))


def job_log_tail(job: Job, count: int = LOG_TAIL_LINES) -> list[JobLogLine]:
    """The last ``count`` lines, oldest first."""
    return list(job.log_lines.order_by("-pk")[:count])[::-1]


def job_log_after(job: Job, after: int, limit: int = LOG_PAGE_LINES) -> list[JobLogLine]:
    """Lines whose id is above ``after``, oldest first."""
    return list(job.log_lines.filter(pk__gt=after).order_by("pk")[:limit])
