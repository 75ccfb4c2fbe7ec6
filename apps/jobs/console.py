"""How commands show a job: progress on stderr, the outcome as a line or JSON on stdout, the exit code."""

from __future__ import annotations

import json
import sys
from typing import Any

from apps.jobs.models import Job, JobState, StepState
from apps.jobs.waiting import wait_for

WAIT_LIMIT_SECONDS = 4 * 3600.0


def job_dict(job: Job) -> dict[str, Any]:
    return {
        "id": job.pk,
        "kind": job.kind,
        "state": job.state,
        "profile": job.profile_slug or None,
        "deployment": job.deployment_id,
        "summary": job.summary,
        "result": job.result,
        "superseded_by": job.superseded_by_id,
    }


def finish(job: Job, *, wait: bool, as_json: bool) -> int:
    """Wait if asked, print, and return the exit code: 0 done or accepted, 1 the work said no."""
    shown = ""

    def tell(current: Job) -> None:
        nonlocal shown
        step = current.steps.filter(state=StepState.RUNNING).first()
        line = f"{step.title}: {step.detail}".rstrip(": ") if step else ""
        if line and line != shown and sys.stderr.isatty():
            print(f"  {round(current.progress * 100):3d} %  {line}", file=sys.stderr)
            shown = line

    if wait:
        job = wait_for(job, limit_seconds=WAIT_LIMIT_SECONDS, tell=tell)
    if as_json:
        print(json.dumps(job_dict(job)))
    if not job.is_final:
        if not as_json:
            print(f"Job {job.pk} is {job.state}.")
        return 0
    if job.state == JobState.SUCCEEDED:
        if not as_json:
            print(job.summary)
        return 0
    print(job.summary, file=sys.stderr)
    return 1
