"""Celery's side: ids in, one service call, out. Running twice does no harm."""

from __future__ import annotations

from datetime import timedelta

import structlog
from celery import shared_task
from django.conf import settings
from django.db.models import Q
from django.utils import timezone

from apps.jobs.leases import lease_is_over
from apps.jobs.models import Job, JobState
from apps.jobs.runner import job_claim
from apps.jobs.services import job_dispatch
from apps.jobs.signals import rig_tick

log = structlog.get_logger(__name__)
RESEND_AFTER = timedelta(seconds=3)


@shared_task(name="jobs.run")
def run_job_task(job_id: int) -> None:
    context = job_claim(job_id)
    if context is not None:
        context.run()


@shared_task(name="jobs.tick")
def tick_task() -> None:
    """The clock's beat on this rig: waiting and orphaned jobs first, then whoever listens."""
    resend_waiting_jobs()
    for receiver, answer in rig_tick.send_robust(sender=None, rig_name=settings.RIG_NAME):
        if isinstance(answer, Exception):
            log.error(
                "tick receiver failed", receiver=getattr(receiver, "__name__", "?"), error=repr(answer), exc_info=answer
            )


def tick_soon() -> None:
    """A tick at once instead of at the clock's next beat. A hint: without it the beat comes."""
    try:
        tick_task.apply_async(queue=f"rig.{settings.RIG_NAME}.control", expires=5, retry=False, ignore_result=True)
    except Exception as error:  # whatever the broker's client raises
        log.info("tick not sent", error=str(error))


def resend_waiting_jobs() -> int:
    """Send messages again for jobs that nobody works on: lost messages, killed workers. Returns how many."""
    now = timezone.now()
    just_sent = Q(
        created_at__gte=now - RESEND_AFTER, created_at__lte=now
    )  # not "the future": the clock may be set back
    waiting = (Q(state=JobState.QUEUED) & ~just_sent) | Q(state=JobState.RUNNING)
    sent = 0
    for job in Job.objects.filter(waiting, rig_name=settings.RIG_NAME).order_by("pk"):
        if job.state == JobState.RUNNING and not lease_is_over(job):
            continue
        job_dispatch(job)
        sent += 1
    return sent


@shared_task(name="jobs.prune")
def prune_task() -> None:
    from apps.jobs.signals import hourly

    hourly.send_robust(sender=None, rig_name=settings.RIG_NAME)
