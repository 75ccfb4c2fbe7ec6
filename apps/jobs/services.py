"""Creating, cancelling and superseding jobs."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import structlog
from django.conf import settings
from django.db import transaction
from django.utils import timezone

from apps.audit.services import record
from apps.common.actors import Actor
from apps.common.errors import Conflict
from apps.common.realtime import page_changed
from apps.common.transitions import claim
from apps.jobs.models import JOB_TRANSITIONS, LIVE_STATES, Job, JobLogLine, JobState

log = structlog.get_logger(__name__)
LOG_LINES_MAX = 4000
LINE_MAX = 2000


def job_create(
    *,
    kind: str,
    title: str,
    rig_name: str,
    queue: str,
    actor: Actor,
    reason: str = "",
    params: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    exclusion: str = "",
    profile_slug: str = "",
    profile_name: str = "",
    profile_version: int | None = None,
) -> Job:
    """Store the job and its audit entry; the message that starts it goes out after commit."""
    with transaction.atomic():
        job = Job.objects.create(
            kind=kind,
            title=title[:200],
            rig_name=rig_name,
            queue=queue,
            user_id=actor.user_pk,
            user_name=actor.name,
            reason=reason.replace("\x00", "").strip()[:500],
            params=dict(params or {}),
            data=dict(data or {}),
            exclusion=exclusion,
            profile_slug=profile_slug,
            profile_name=profile_name,
            profile_version=profile_version,
        )
        record(
            actor,
            f"job.{kind}",
            "job",
            job.pk,
            job.title,
            {"reason": job.reason, "params": job.params, "rig": rig_name},
        )
        page_changed("job", job=job.pk)
        transaction.on_commit(lambda: job_dispatch(job))
    return job


def job_dispatch(job: Job) -> None:
    """Send the message that a job waits; a hint only, the tick sends it again."""
    try:
        # Looked up by name and late: only processes that send jobs pay for Celery.
        celery = import_module(settings.CELERY_APP).app
        # It expires, so that a busy queue does not fill with repeats of one job.
        celery.send_task("jobs.run", args=[job.pk], queue=job.queue, ignore_result=True, retry=False, expires=20)
    except Exception as error:  # whatever the broker's client raises: the tick finds the queued row
        log.warning("job message not sent; the tick will", job=job.pk, error=str(error))


def job_cancel(job: Job, *, actor: Actor, superseded_by: Job | None = None) -> Job:
    """Ask a job to end. The intent is stored before anything is signalled; a queued job ends here."""
    with transaction.atomic():
        job = Job.objects.select_for_update(no_key=True).get(pk=job.pk)
        if job.is_final:
            raise Conflict(f"Job {job.pk} has already ended: {job.get_state_display().lower()}.", code="job_ended")
        if job.failure is not None and job.undo_cancel_at is None:  # what puts things right is cancelled now
            job.undo_cancel_at, job.cancel_requested_by = timezone.now(), actor.name
        if job.cancel_requested_at is None:
            job.cancel_requested_at, job.cancel_requested_by = timezone.now(), actor.name
        if superseded_by is not None:
            job.superseded_by = superseded_by
        job.save(update_fields=["cancel_requested_at", "cancel_requested_by", "superseded_by", "undo_cancel_at"])
        record(
            actor,
            "job.cancel",
            "job",
            job.pk,
            job.title,
            {
                "superseded_by": superseded_by.pk if superseded_by else None,
                "while_putting_right": job.undo_cancel_at is not None,
            },
        )
        # One that superseded another may owe it an undoing: it runs, finds itself cancelled, and undoes.
        if job.state == JobState.QUEUED and not job.supersedes.exists():
            why = (
                f"Superseded by job {superseded_by.pk}."
                if superseded_by
                else f"Cancelled by {actor.name} before it began."
            )
            job_finish(job, JobState.CANCELLED, {"summary": why})
        page_changed("job", job=job.pk)
    return job


def job_finish(job: Job, state: JobState, result: Mapping[str, Any], *, where: Mapping[str, Any] | None = None) -> bool:
    """The one place where a job ends. False when another worker got there first."""
    with transaction.atomic():
        won = claim(
            job,
            JOB_TRANSITIONS,
            state,
            field="state",
            where=where,
            result=dict(result),
            finished_at=timezone.now(),
            progress=1.0 if state == JobState.SUCCEEDED else job.progress,
            eta_at=None,
            lease_until=None,
        )
        if won:
            record(
                Actor("", job.user_name, None),
                f"job.{state}",
                "job",
                job.pk,
                job.title,
                {"summary": result.get("summary", "")},
            )
            page_changed("job", job=job.pk)
            if job.exclusion:
                waiting = Job.objects.filter(exclusion=job.exclusion, state=JobState.QUEUED).order_by("pk").first()
                if waiting is not None:
                    transaction.on_commit(lambda: job_dispatch(waiting))
    return won


def job_log(job: Job, text: str, source: str = "panel") -> None:
    """Add lines to a job's log, within its bound; the last line then says that it was cut."""
    # PostgreSQL takes no NUL in a text, and engines print what model files say.
    lines = [line[:LINE_MAX] for line in text.replace("\x00", "\ufffd").splitlines() if line.strip()]
    if not lines:
        return
    room = LOG_LINES_MAX - JobLogLine.objects.filter(job_id=job.pk).count()
    if source == "engine" and room <= 200:  # the panel's own words always find room
        return
    JobLogLine.objects.bulk_create(
        [JobLogLine(job_id=job.pk, text=line, source=source) for line in lines[: max(room, 1)]]
    )
    page_changed("job", job=job.pk, log=1)


def live_jobs(**filters: Any) -> list[Job]:
    return list(Job.objects.filter(state__in=LIVE_STATES, **filters).order_by("pk"))
