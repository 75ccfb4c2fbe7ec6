"""When a load is done, told phase by phase from how earlier loads of the same profile went on this rig.

A load that finds its compiled kernels is minutes shorter than the first; which it will be shows with its phases. So the
time is told anew whenever a phase begins: the median of what was left from there.
"""

from __future__ import annotations

import time
from statistics import median

from apps.deployments import routes
from apps.jobs.estimates import earlier_runs
from apps.jobs.runner import JobContext

LOADS = ("switch", "restart")  # both load the same engine
READY = "ready"


class LoadClock:
    """Keeps in the job's data when each phase began, in seconds since the load did."""

    def __init__(self, ctx: JobContext) -> None:
        self.ctx = ctx
        self.began = time.monotonic()
        self.phases: dict[str, float] = {}
        self.earlier = [dict(p) for run in earlier_runs(ctx.job, *LOADS) if (p := run.data.get("phases"))]

    def entered(self, phase: str) -> float | None:
        """Call it with the phase that the load is in: seconds left, when a new one began that was seen before."""
        if phase in self.phases:
            return None
        self.phases[phase] = round(time.monotonic() - self.began, 2)
        left = [run[READY] - run[phase] for run in self.earlier if READY in run and phase in run]
        return max(0.0, median(left)) if left else None

    def tell(self, fraction: float, text: str) -> None:
        """Progress of the load, in the job and to those who wait for it. ``text`` begins with the phase."""
        phase = text.partition(" ")[0]
        left = self.entered(phase) if phase else None
        self.ctx.progress(fraction, text, left)
        if left is not None:
            routes.expect(self.ctx.job.pk, self.ctx.job.eta_at)

    def done(self) -> None:
        self.entered(READY)
        if self.ctx.job.attempts == 1:  # else this clock began in the middle of the load
            self.ctx.save_data(phases=self.phases)
