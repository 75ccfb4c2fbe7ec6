"""A plan is no better than its reading of memory, and an engine that has just ended may still stand in that."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta

from django.utils import timezone

from apps.deployments.models import GpuReservation
from apps.deployments.plan import Plan, plan
from apps.profiles.models import ProfileVersion
from apps.rigs.models import Rig

# A frame of telemetry is up to a second old, and a driver takes its time to let go of what an engine held.
SETTLE_SECONDS = 5.0
AGAIN_SECONDS = 0.2


def settled_plan(version: ProfileVersion, rig: Rig, pause: Callable[[float], None], *, exclusive: bool = False) -> Plan:
    """The plan; made anew while it refuses for memory alone and an engine of this rig ended within ``SETTLE_SECONDS``.

    ``pause`` waits so many seconds and raises when the job must stop."""
    made = plan(version, rig, exclusive=exclusive)
    began = time.monotonic()  # the time of day may be set meanwhile
    while made.misfit and not made.problems and _ended_lately(rig) and time.monotonic() - began < SETTLE_SECONDS:
        pause(AGAIN_SECONDS)
        made = plan(version, rig, exclusive=exclusive)
    return made


def _ended_lately(rig: Rig) -> bool:
    since = timezone.now() - timedelta(seconds=SETTLE_SECONDS)
    return GpuReservation.objects.filter(rig=rig, released_at__gte=since).exists()
