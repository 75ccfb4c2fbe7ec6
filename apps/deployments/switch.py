"""The switch: from what serves now to a target profile, with automatic return on failure.

plan → preflight → hold traffic → drain → stop the old → wait for the memory → start → readiness →
smoke → route. Every step may run twice: a killed worker's switch is carried on by the next worker.
What has to be undone is read from ``job.data``, written before the act it speaks of.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from django.utils import timezone

from apps.common.units import seconds
from apps.deployments import switch_back as back
from apps.deployments import switch_forward as forward
from apps.jobs.handlers import Step
from apps.jobs.models import Job
from apps.rigs.models import Rig


def exclusion(rig: Rig) -> str:
    """Of the jobs that move engines on one rig at most one runs: a constraint of the jobs table."""
    return f"engines:{rig.slug}"


class SwitchHandler:
    kind = "switch"

    def steps(self, job: Job) -> Sequence[Step]:
        return (
            Step("plan", "Plan", forward.plan_step, 0.1),
            Step("preflight", "Check before anything is stopped", forward.preflight_step, 0.1),
            Step("hold", "Hold traffic", forward.hold_step, 0.2),
            Step("drain", "Let running answers finish", forward.drain_step, 0.5),
            Step("stop", "Stop the old model", forward.stop_step, 1.0, cancellable=False),
            Step("memory", "Wait until the GPU memory is free", forward.memory_step, 0.5),
            Step("start", "Start the engine", forward.start_step, 0.3),
            Step("ready", "Load the model", forward.ready_step, 20.0),
            Step("smoke", "Ask for one real token", forward.smoke_step, 0.3),
            Step("route", "Send traffic to it", forward.route_step, 0.2, cancellable=False),
            Step("restore", "Bring back what is not in its way", back.restore, 0.1, cancellable=False),
        )

    def compensation(self, job: Job) -> Sequence[Step]:
        return (
            Step("clean_up", "Stop what was half started", back.clean_up, 1.0),
            Step("bring_back", "Bring the old model back", back.bring_back, 20.0, undo_cancellable=True),
            Step("release", "Release traffic", back.release, 0.2),
        )

    def summary(self, job: Job) -> dict[str, Any]:
        name = job.profile_name
        also = f" {job.data['aftermath']}" if job.data.get("aftermath") else ""
        if job.data.get("nothing_to_do"):
            return {"summary": f"{name} was already serving; nothing changed.{also}", "nothing_to_do": True}
        took = seconds((timezone.now() - job.started_at).total_seconds()) if job.started_at else "unknown"
        replaced = job.data.get("replaced_names") or []
        instead = f" instead of {', '.join(replaced)}" if replaced else ""
        return {"summary": f"{name} is serving{instead}; ready after {took}.{also}", "deployment": job.deployment_id}
