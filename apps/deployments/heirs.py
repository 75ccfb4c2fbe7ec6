"""Who owes a stopped model its return, when switches supersede one another.

A superseded switch leaves the bringing back to the one that superseded it; that one may be superseded, refused
or cancelled in its turn. So the debt is read from the whole chain, never copied.
"""

from __future__ import annotations

from django.db.models import QuerySet

from apps.jobs.models import Job, JobState


def owed(job: Job) -> list[int]:
    """Version ids that this switch and those before it in the chain stopped."""
    own = list(job.data.get("fallback", [])) if job.data.get("stopped_old") else []
    return list(dict.fromkeys([*inherited(job), *own]))


def inherited(job: Job) -> list[int]:
    """Version ids that superseded switches stopped and left to this one."""
    return list(dict.fromkeys(v for earlier in _given_up_for(job) for v in owed(earlier)))


def to_return(job: Job) -> list[int]:
    """Version ids that this switch brings back when it is given up: what it owes, but for the version that had died
    and that it was to start again itself."""
    again = None if restart_of(job) is None else job.params.get("version_id")
    return [version_id for version_id in owed(job) if version_id != again]


def restart_of(job: Job) -> int | None:
    """The deployment that had died, of a restart and of a switch to the same version that took a restart's place."""
    if "restart_of" in job.data:
        return int(job.data["restart_of"])
    same = (one for one in _given_up_for(job) if one.params.get("version_id") == job.params["version_id"])
    return next((died for earlier in same if (died := restart_of(earlier)) is not None), None)


def asked_for(deployment_id: int) -> Job | None:
    """The switch by which somebody asked for what runs now; None where it was only started again."""
    switches = Job.objects.filter(kind="switch", deployment_id=deployment_id, state=JobState.SUCCEEDED)
    last = switches.order_by("-pk").first()
    return None if last is None or "restart_of" in last.data else last


def _given_up_for(job: Job) -> QuerySet[Job]:
    """The jobs that it superseded. One that came to its end all the same has done what was asked, and owes nothing."""
    return job.supersedes.exclude(state=JobState.SUCCEEDED).order_by("pk")


def heir(job: Job) -> Job | None:
    """The switch that takes over from a superseded one: the end of the chain if that still lives."""
    last, seen = job, {job.pk}
    while last.superseded_by is not None and last.superseded_by_id not in seen:
        last = last.superseded_by
        seen.add(last.pk)
    return last if last.pk != job.pk and not last.is_final else None
