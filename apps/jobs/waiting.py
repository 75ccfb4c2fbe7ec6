"""Waiting for a job's end, for the command line and ``wait_s`` of the API."""

from __future__ import annotations

import time
from collections.abc import Callable

from apps.jobs.models import Job


def wait_for(job: Job, *, limit_seconds: float, tell: Callable[[Job], None] | None = None) -> Job:
    """Poll until the job has ended or the limit is over; returns it as it is then."""
    deadline = time.monotonic() + limit_seconds
    while True:
        job.refresh_from_db()
        if tell is not None:
            tell(job)
        if job.is_final or time.monotonic() >= deadline:
            return job
        time.sleep(0.1)
