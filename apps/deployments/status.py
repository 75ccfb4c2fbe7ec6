"""The one writer of ``Deployment.status``."""

from __future__ import annotations

from typing import Any

from django.db import transaction
from django.utils import timezone

from apps.common.realtime import page_changed
from apps.common.transitions import claim
from apps.deployments.models import LIVE, TRANSITIONS, Deployment, DeploymentEvent, GpuReservation, Replica, Status


def deployment_transition(deployment: Deployment, to: Status, reason: str = "", **values: Any) -> bool:
    """Move a deployment on, with its event in the same transaction; False if somebody else moved it first.

    Reaching an end frees its cards and ports; being ready notes the time.
    """
    before = deployment.status
    with transaction.atomic():
        now = timezone.now()
        if to == Status.READY and deployment.ready_at is None:
            values["ready_at"] = now
        if to not in LIVE:
            values["ended_at"] = now
        if to == Status.DRAINING:
            values["cut_by_name"] = ""  # whoever had an earlier drain cut did not mean this one
        won = claim(deployment, TRANSITIONS, to, status_reason=reason[:500], **values)
        if not won:
            deployment.refresh_from_db(fields=["status"])
            return False
        DeploymentEvent.objects.create(
            deployment=deployment, at=now, from_status=before, to_status=to, reason=reason[:500]
        )
        if to not in LIVE:
            GpuReservation.objects.filter(replica__deployment=deployment, released_at=None).update(released_at=now)
            Replica.objects.filter(deployment=deployment, released_at=None).update(released_at=now, healthy=False)
        page_changed("deployment", deployment=deployment.pk)
    return True
