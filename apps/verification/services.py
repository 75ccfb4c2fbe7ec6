"""Asking for a verification, and accepting what one measured."""

from __future__ import annotations

from django.db import transaction
from django.utils import timezone

from apps.audit.services import record
from apps.common.actors import Actor
from apps.common.errors import Conflict
from apps.common.realtime import page_changed
from apps.jobs.models import LIVE_STATES, Job
from apps.jobs.services import job_create
from apps.rigs.models import Rig
from apps.verification.checks import suite_checks
from apps.verification.models import VerificationRun

KIND = "verify"


def verify_request(*, suite: str, rig: Rig, actor: Actor, reason: str = "") -> Job:
    """A job on the rig's verify queue; the one under way when the same suite already waits or runs.

    Raises NotFound for an unknown suite.
    """
    suite_checks(suite)
    with transaction.atomic():
        rig = Rig.objects.select_for_update(no_key=True).get(pk=rig.pk)  # two clicks at once make one job
        under_way = Job.objects.filter(
            kind=KIND, rig_name=rig.slug, state__in=LIVE_STATES, cancel_requested_at=None, params__suite=suite
        ).first()
        if under_way is not None:
            return under_way
        job = job_create(
            kind=KIND,
            title=f"Verify {rig.slug} ({suite})",
            rig_name=rig.slug,
            queue=rig.verify_queue,
            actor=actor,
            reason=reason,
            params={"suite": suite},
            exclusion=f"verify:{rig.slug}",
        )
        VerificationRun.objects.create(
            suite=suite, rig=rig, job=job, user_name=actor.name, hardware_source=rig.hardware_source
        )
    return job


def run_accept(run: VerificationRun, *, actor: Actor) -> VerificationRun:
    """Take what ``run`` measured as this rig's normal. Raises Conflict for one that has not ended."""
    if run.finished_at is None:
        raise Conflict("This verification has not ended; wait for its results.", code="not_finished")
    with transaction.atomic():
        if VerificationRun.objects.filter(pk=run.pk, accepted_at=None).update(
            accepted_at=timezone.now(), accepted_by_name=actor.name[:200]
        ):
            record(actor, "verification.accept", "verification", run.pk, str(run), {"rig": run.rig.slug})
            page_changed("verification", verification=run.pk)
    run.refresh_from_db()
    return run
