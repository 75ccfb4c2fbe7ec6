"""The job history as CSV or JSON lines; page and API use the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from django.http import HttpRequest, HttpResponseBase

from apps.common.export import export
from apps.jobs.filters import jobs_filtered
from apps.jobs.models import Job

COLUMNS = (
    "id", "kind", "title", "state", "reason", "user", "rig", "profile", "profile_version",
    "created_at", "started_at", "finished_at", "superseded_by", "summary",
)  # fmt: skip


def job_row(job: Job) -> dict[str, Any]:
    return {
        "id": job.pk,
        "kind": job.kind,
        "title": job.title,
        "state": job.state,
        "reason": job.reason,
        "user": job.user_name,
        "rig": job.rig_name,
        "profile": job.profile_slug or None,
        "profile_version": job.profile_version,
        "created_at": job.created_at.isoformat(),
        "started_at": job.started_at.isoformat() if job.started_at else None,
        "finished_at": job.finished_at.isoformat() if job.finished_at else None,
        "superseded_by": job.superseded_by_id,
        "summary": job.summary,
    }


def jobs_export(request: HttpRequest, filters: Mapping[str, Any], form: str) -> HttpResponseBase:
    return export(request, jobs_filtered(filters), COLUMNS, job_row, form, "jobs")
