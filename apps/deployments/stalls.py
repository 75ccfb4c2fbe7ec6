"""Notices an engine that gets nowhere, long before its time is up: one that somebody stopped, or that does nothing.

A real start can be silent for minutes, but then it burns CPU time, reads, grows, or waits for a disk. Only what was
watched counts: a worker that was frozen itself, or a machine that slept, knows nothing of the time between two looks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from apps.runners.processes import Activity, activity, waits_for_a_disk

STOPPED_SECONDS = 20.0
QUIET_SECONDS = 300.0
LOOK_SECONDS = 1.0
WATCHED_MAX_SECONDS = 5.0  # that one look may count for
# Less than this within QUIET_SECONDS is no work: threads that wake up to look at the time use some of it.
WORK_CPU_SECONDS = 1.5
WORK_BYTES = 1 << 20


class Stall:
    """Looks again and again at one engine. ``now`` is a monotonic time in seconds."""

    def __init__(self, now: float | None = None) -> None:
        self.looked_at = time.monotonic() if now is None else now
        self.stopped_seconds = 0.0
        self.quiet_seconds = 0.0
        self.mark: tuple[Activity, int] | None = None

    def is_due(self) -> bool:
        return time.monotonic() - self.looked_at >= LOOK_SECONDS

    def look(self, pids: Sequence[int], log_bytes: int) -> str:
        """What is wrong, as a sentence that begins with "it", or nothing. Looks only where it is due."""
        if not self.is_due():
            return ""
        return self.judge(activity(pids), log_bytes, time.monotonic(), disk=lambda: waits_for_a_disk(pids))

    def judge(self, seen: Activity, log_bytes: int, now: float, *, disk: Callable[[], bool]) -> str:
        """``disk`` is asked only where nothing else shows work: it looks at every thread."""
        watched = min(now - self.looked_at, WATCHED_MAX_SECONDS)
        self.looked_at = now
        self.stopped_seconds = self.stopped_seconds + watched if seen.stopped else 0.0
        self.quiet_seconds += watched
        if self.mark is None or _has_worked(*self.mark, seen, log_bytes) or disk():
            self.mark, self.quiet_seconds = (seen, log_bytes), 0.0
        if self.stopped_seconds >= STOPPED_SECONDS:
            which = ", ".join(str(pid) for pid in seen.stopped)
            return (
                f"it was stopped by a signal (process {which} is in state T) and nobody let it go on "
                f"within {STOPPED_SECONDS:.0f} s"
            )
        if self.quiet_seconds >= QUIET_SECONDS:
            return (
                f"it did nothing for {QUIET_SECONDS / 60:g} min: no line in its log, no CPU time, nothing read, "
                "no memory taken"
            )
        return ""


def _has_worked(before: Activity, said_before: int, seen: Activity, log_bytes: int) -> bool:
    return (
        log_bytes != said_before
        or seen.pids != before.pids
        or seen.cpu_seconds - before.cpu_seconds >= WORK_CPU_SECONDS
        or abs(seen.read_bytes - before.read_bytes) >= WORK_BYTES
        or abs((seen.memory_rss_bytes or 0) - (before.memory_rss_bytes or 0)) >= WORK_BYTES
    )
