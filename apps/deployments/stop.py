"""Stopping a deployment on purpose, as a job."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from apps.common.actors import PANEL
from apps.deployments import launching, routes, sleeping
from apps.deployments.draining import drain
from apps.deployments.models import COMES_BACK, LIVE, SERVING, Deployment, Desired, Status
from apps.deployments.status import deployment_transition
from apps.jobs.handlers import Step
from apps.jobs.models import Job
from apps.jobs.runner import JobContext


class StopHandler:
    kind = "stop"

    def steps(self, job: Job) -> Sequence[Step]:
        return (
            Step("close", "Take its traffic away", _close, 0.2),
            Step("drain", "Let running answers finish", _drain, 0.5),
            Step("stop", "Stop the engine", _stop, 1.0, cancellable=False),
        )

    def compensation(self, job: Job) -> Sequence[Step]:
        return (Step("reopen", "Give its traffic back", _reopen, 0.2),)

    def summary(self, job: Job) -> dict[str, Any]:
        how = "sleeps" if job.data.get("slept") else "was stopped"
        return {"summary": f"{job.profile_name} {how}.", "deployment": job.deployment_id}


def _deployment(ctx: JobContext) -> Deployment:
    return Deployment.objects.select_related("version__profile", "rig").get(pk=ctx.job.params["deployment_id"])


def _close(ctx: JobContext) -> str:
    deployment = _deployment(ctx)
    if deployment.status not in LIVE:
        Deployment.objects.filter(pk=deployment.pk).update(desired=Desired.STOPPED)
        routes.end_wait_for_restart(deployment)
        return "it has ended already"
    if deployment.status in SERVING:
        deployment_transition(deployment, Status.DRAINING, f"stopped by {ctx.job.user_name}")
    epoch = routes.close(deployment)
    routes.wait_acknowledged(epoch, ctx.sleep)
    return "no new requests"


def _drain(ctx: JobContext) -> str:
    deployment = _deployment(ctx)
    return drain(ctx, [deployment.pk]) if deployment.status in LIVE else "nothing to drain"


def _stop(ctx: JobContext) -> str:
    deployment = _deployment(ctx)
    if ctx.job.data.get("rest") and (told := _rest(ctx, deployment)):
        return told
    if ctx.job.user_name != PANEL.name:
        # While a sleeper slept on, a return of the same version may have failed that waits for a card: nobody wants it
        # now. What the guard ends is wanted still.
        returns = Deployment.objects.filter(COMES_BACK, rig=deployment.rig_id, version=deployment.version_id)
        returns.update(desired=Desired.STOPPED)
    return stop_now(deployment, f"stopped by {ctx.job.user_name}")


def _rest(ctx: JobContext, deployment: Deployment) -> str:
    """Put it to sleep where it can; empty where it has to be stopped after all."""
    if deployment.status == Status.SLEEPING:
        return "it sleeps already"  # an earlier try of this step laid it down
    if deployment.status != Status.DRAINING or sleeping.sleeps(deployment) is None:
        return ""
    try:
        told = sleeping.fall_asleep(deployment, ctx.job.reason or "idle")
    except sleeping.SleepFailed as failed:
        ctx.log(f"{deployment.profile_name} did not fall asleep and is stopped: {failed}.")
        return ""
    ctx.save_data(slept=True)
    return told


def stop_now(deployment: Deployment, why: str) -> str:
    """Stop the processes and note the end; safe to run on what has ended already."""
    Deployment.objects.filter(pk=deployment.pk).update(desired=Desired.STOPPED)
    if deployment.status in LIVE and deployment.status != Status.STOPPING:
        deployment_transition(deployment, Status.STOPPING, why)
    told = launching.stop_processes(deployment)
    if deployment.status == Status.STOPPING:
        deployment_transition(deployment, Status.STOPPED, why)
    return told


def _reopen(ctx: JobContext) -> str:
    deployment = _deployment(ctx)
    if deployment.status == Status.DRAINING:
        deployment_transition(deployment, Status.READY, "the stop was cancelled")
    if deployment.status in SERVING:
        routes.open_to(deployment)
        return "it serves on"
    return "nothing to give back"
