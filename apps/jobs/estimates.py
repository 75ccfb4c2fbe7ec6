"""How long steps take here: the median of this rig's own earlier runs, else the step's weight.

A weight is a share of the progress bar and no time that anybody is told: without history there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from apps.jobs.handlers import Step
from apps.jobs.models import Job, JobState, JobStep, StepState

HISTORY = 5
LOOKED_AT = 20
# Marks in ``Job.data`` that make a run another thing than one without them: its times say nothing of the other's.
OTHER_WAYS = ("nothing_to_do", "wake")
MOMENT_WEIGHT = 1.0  # steps below it end in a moment, whether they were seen before or not


@dataclass(frozen=True, slots=True)
class Expected:
    """Seconds per step name; ``known`` are those that were seen here before."""

    seconds: dict[str, float]
    known: frozenset[str]

    def left(self, steps: Sequence[Step]) -> float | None:
        """What these steps take together; None where one that takes long was never seen."""
        if any(step.name not in self.known and step.weight >= MOMENT_WEIGHT for step in steps):
            return None
        return sum(self.seconds[step.name] for step in steps)


def earlier_runs(job: Job, *kinds: str) -> list[Job]:
    """The last ones of the same kind (or of these), profile and rig that succeeded in the same way, newest first."""
    runs = Job.objects.filter(
        kind__in=kinds or (job.kind,), profile_slug=job.profile_slug, rig_name=job.rig_name, state=JobState.SUCCEEDED
    )
    latest = runs.exclude(pk=job.pk).defer("result").order_by("-pk")[:LOOKED_AT]
    return [run for run in latest if _way(run) == _way(job)][:HISTORY]


def _way(job: Job) -> tuple[bool, ...]:
    return tuple(bool(job.data.get(mark)) for mark in OTHER_WAYS)


def expected(job: Job, steps: Sequence[Step]) -> Expected:
    """From the earlier runs of this job, as far as it is known by now what kind of run it is."""
    seen: dict[str, list[float]] = {}
    for row in JobStep.objects.filter(job__in=earlier_runs(job), state=StepState.DONE):
        if row.duration_seconds is not None:
            seen.setdefault(row.name, []).append(row.duration_seconds)
    return Expected(
        {s.name: max(0.05, median(seen[s.name])) if s.name in seen else s.weight for s in steps}, frozenset(seen)
    )


def typical_seconds(kind: str, profile_slug: str, rig_name: str) -> float | None:
    """The median duration of the last successful runs that did the whole work, or None without history."""
    like = Job(kind=kind, profile_slug=profile_slug, rig_name=rig_name)
    times = [
        (run.finished_at - run.started_at).total_seconds()
        for run in earlier_runs(like)
        if run.started_at and run.finished_at
    ]
    return median(times) if times else None


def typical_seconds_each(kind: str, rig_name: str, recent: int = 200) -> dict[str, float]:
    """``typical_seconds`` of every profile among the ``recent`` last successes, in one query."""
    runs = Job.objects.filter(kind=kind, rig_name=rig_name, state=JobState.SUCCEEDED).order_by("-finished_at")
    times: dict[str, list[float]] = {}
    for slug, started, finished, *ways in runs.values_list(
        "profile_slug", "started_at", "finished_at", *(f"data__{mark}" for mark in OTHER_WAYS)
    )[:recent]:
        if started and finished and not any(ways) and len(times.setdefault(slug, [])) < HISTORY:
            times[slug].append((finished - started).total_seconds())
    return {slug: median(seconds) for slug, seconds in times.items() if seconds}
