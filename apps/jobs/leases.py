"""Whether a worker still holds its job, whatever the clocks say.

``lease_until`` is a time of day, which jumps when the clock is set. So on the worker's own host its process is looked
at first, and a lease that looks over while its owner lives counts as over only after it was *seen* unrenewed for its
whole length by the monotonic clock (a frozen worker). The same catches a lease that a step back of the clock left
far in the future.
"""

from __future__ import annotations

import time

from django.utils import timezone

from apps.common.identity import is_known_alive, is_known_dead, process_key
from apps.jobs.models import Job

LEASE_SECONDS = 15.0
LOOK_GAP_SECONDS = 6.0  # ticks look every two; after a longer gap (this process was frozen) the count begins anew
held_here: set[str] = set()  # owners of the leases that threads of this process work under
_seen: dict[int, tuple[object, float, float]] = {}  # job id: (lease, monotonic times of its first and its last look)


def lease_is_over(job: Job) -> bool:
    """For a running job: may another worker take it over?"""
    if not job.lease_owner or job.lease_until is None or is_known_dead(job.lease_owner):
        return True
    if job.lease_owner.startswith(process_key() + ":") and job.lease_owner not in held_here:
        return True  # the thread that had it ended, as when the database was away for too long
    lease, now = (job.lease_owner, job.lease_until), time.monotonic()
    before, since, last = _seen.get(job.pk, (None, now, now))
    if before != lease or now - last > LOOK_GAP_SECONDS:
        since = now
        while len(_seen) > 500:  # only the few running jobs matter
            _seen.pop(next(iter(_seen)), None)
    _seen[job.pk] = (lease, since, now)
    if now - since > LEASE_SECONDS:
        return True
    return job.lease_until < timezone.now() and not is_known_alive(job.lease_owner)
