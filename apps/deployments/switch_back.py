"""The switch's way back: what was half started goes, what served before returns."""

from __future__ import annotations

from typing import Any

from django.db import transaction

from apps.deployments import launching, routes, sleeping
from apps.deployments.heirs import asked_for, heir, inherited, restart_of, to_return
from apps.deployments.memory import wait_for_memory
from apps.deployments.models import COMING_UP, LIVE, SERVING, Deployment, Desired, Status
from apps.deployments.plan import plan
from apps.deployments.smoke import smoke
from apps.deployments.status import deployment_transition
from apps.deployments.stop import stop_now
from apps.deployments.switch_forward import (
    open_traffic,
    replaced_by,
    start_deployment,
    target_of,
    wait_for_deployment,
)
from apps.deployments.switch_policy import why_not_back
from apps.deployments.switch_sleep import effect_of
from apps.jobs.estimates import typical_seconds
from apps.jobs.handlers import JobCancelled, JobFailed
from apps.jobs.runner import JobContext
from apps.profiles.models import ProfileVersion
from apps.rigs.models import Rig
from apps.rigs.selectors import rig_get


def clean_up(ctx: JobContext) -> str:
    target_id = ctx.job.data.get("target")
    if target_id is None:
        _give_the_wish_back(ctx)
        return "nothing was started"
    target = target_of(ctx)
    failure = ctx.job.failure or {}
    cancelled = failure.get("state") == "cancelled"
    why = str(failure.get("message", ""))
    # Also of one that was woken and that the reconciler found dead meanwhile: its wish would outlive the switch.
    if cancelled or "restart_of" not in ctx.job.data:  # a restart that failed is tried again, as its policy says
        Deployment.objects.filter(pk=target.pk).update(desired=Desired.STOPPED)
    if target.status not in LIVE:
        return "nothing runs"
    if ctx.job.data.get("wake") and sleeping.is_at_rest(target):
        _give_the_wish_back(ctx)
        return "it sleeps on"
    if not cancelled:
        evidence = {"log_tail": "\n".join(launching.log_tail(r) for r in target.replicas.all())}
        evidence.update(failure.get("evidence") or {})
        Deployment.objects.filter(pk=target.pk).update(evidence=evidence)
    if target.status == Status.PENDING and cancelled:
        deployment_transition(target, Status.STOPPED, why)
        return "nothing had been started"
    if target.status != Status.STOPPING:
        deployment_transition(target, Status.STOPPING, why)
    told = launching.stop_processes(target)
    deployment_transition(target, Status.STOPPED if cancelled else Status.FAILED, why)
    return told


def _give_the_wish_back(ctx: JobContext) -> None:
    """A restart, or a click in its place, took the wish from what had failed, and made nothing that carries it on: it
    is asked for again later, unless somebody cancelled it or owes its return by now."""
    cancelled = (ctx.job.failure or {}).get("state") == "cancelled"
    died = restart_of(ctx.job)
    if died is not None and not cancelled and heir(ctx.job) is None:
        Deployment.objects.filter(pk=died, status=Status.FAILED).update(desired=Desired.SERVING)


def bring_back(ctx: JobContext) -> str:
    for deployment in replaced_by(ctx):  # those that only drained serve on
        if deployment.status == Status.DRAINING:
            deployment_transition(deployment, Status.READY, "the switch was given up")
    successor = heir(ctx.job)
    if successor is not None:
        return f"left to job {successor.pk}, which superseded this one"
    rig = rig_get(ctx.job.rig_name)
    wanted = _not_serving(to_return(ctx.job), rig) or list(ctx.job.data.get("returning", {}))
    if not wanted:
        ctx.save_data(aftermath=_nothing_lost(ctx))
        return "nothing to bring back"
    names: list[str] = []
    failed: JobFailed | None = None
    for version in ProfileVersion.objects.select_related("profile", "model").filter(pk__in=wanted):
        try:
            _return_version(ctx, version, rig)
        except JobFailed as failure:  # one that does not come back must not keep the others down
            failed = failed or failure
        else:
            names.append(version.profile.name)
            ctx.save_data(aftermath=f"Brought back {', '.join(names)}.", brought_back_names=names)
    if failed is not None:
        raise JobFailed(f"The old model could not be brought back either: {failed.message}", **failed.evidence)
    return f"{', '.join(names)} serves again"


def restore(ctx: JobContext) -> str:
    """After a switch that superseded others: what they stopped returns where it is not in the way now.

    A failure here does not fail the switch, which has done what was asked; it is told beside its success."""
    rig = rig_get(ctx.job.rig_name)
    if ctx.job.params.get("exclusive"):
        return "it runs alone, as asked"
    told = []
    for version in ProfileVersion.objects.select_related("profile", "model").filter(
        pk__in=_not_serving(inherited(ctx.job), rig)
    ):
        coming = str(version.pk) in ctx.job.data.get("returning", {})
        the_plan = plan(version, rig)
        in_the_way = effect_of(version, rig, the_plan=the_plan).replaced  # not what sleeps of it and is woken
        if not coming and (in_the_way or the_plan.problems):
            told.append(f"{version.profile.name} was not brought back: it does not fit beside what runs now.")
            continue
        try:
            _return_version(ctx, version, rig)
            told.append(f"Brought back {version.profile.name}.")
        except JobFailed as failure:
            told.append(f"{version.profile.name} could not be brought back: {failure.message}")
        except JobCancelled:  # that ends the return alone: the switch has done what was asked
            sentence = ctx.cancel_sentence()
            told.append(f"{version.profile.name} was not brought back: {sentence[:1].lower()}{sentence[1:]}")
    if told:
        ctx.save_data(aftermath=" ".join(told))
    return " ".join(told) or "nothing to bring back"


def _not_serving(version_ids: list[int], rig: Rig) -> list[int]:
    serving = set(Deployment.objects.filter(rig=rig, status__in=SERVING).values_list("version_id", flat=True))
    return [v for v in version_ids if v not in serving]


def _nothing_lost(ctx: JobContext) -> str:
    if "restart_of" in ctx.job.data:
        return "Nothing else was touched."
    if ctx.job.data.get("fallback") or to_return(ctx.job):
        return "What served before serves on."
    if "target" in ctx.job.data and not ctx.job.data.get("replaced"):
        return "Nothing served before, so nothing was brought back."
    return "Nothing was stopped."


def _return_version(ctx: JobContext, version: ProfileVersion, rig: Rig) -> None:
    """Start a version again and send its traffic back to it; carries on where an earlier try was cut off.

    Where it may not be loaded now, it fails and stays wanted: the reconciler asks for it again (``restarting``), and
    what sleeps of it is woken then."""
    asleep = sleeping.sleeper_of(version, rig)
    if asleep is not None and _woken_again(ctx, asleep):
        return
    deployment = _returning(ctx, version, rig)
    if deployment.status not in COMING_UP:
        return
    takes = typical_seconds("switch", version.profile.slug, rig.slug)
    if takes is not None:
        ctx.progress(0.0, f"{version.profile} comes back", takes)
        routes.expect(ctx.job.pk, ctx.job.eta_at)
    the_plan = plan(version, rig)
    cards = [gpu for gpus in the_plan.replica_gpus for gpu in gpus]
    if why_not := why_not_back(ctx.job, deployment, cards, the_plan.in_the_way):
        # This job may have waited, cancelled, while a later one ran: that ends the wish, as it would have later.
        since = [d.profile_name for d in the_plan.in_the_way if (by := asked_for(d.pk)) and by.pk > ctx.job.pk]
        if since:
            stop_now(deployment, f"{', '.join(since)} was asked for since and runs in its place.")
        else:
            _give_back_up(deployment, why_not.message, {})
        raise why_not
    if asleep is not None and asleep.status == Status.SLEEPING:
        stop_now(asleep, "a card of it pauses, and it is started on others")
    try:
        with ctx.cancellable():  # also where the switch has come to its end: a load is long
            wait_for_memory(the_plan.replica_gpus, ctx.sleep)
            start_deployment(deployment, the_plan)
            wait_for_deployment(ctx, deployment)
            smoke(deployment, ctx.sleep)
    except JobFailed as failure:
        _give_back_up(deployment, failure.message, failure.evidence)
        raise
    except JobCancelled:
        later = ctx.job.superseded_by_id
        if later is not None and ctx.job.failure is None:  # it owes nothing: this switch has done what was asked
            _give_back_up(deployment, f"Its return gave way to job {later}.", {})
        else:
            stop_now(deployment, "its return was cancelled")
        raise
    open_traffic(deployment)


def _woken_again(ctx: JobContext, asleep: Deployment) -> bool:
    """What the switch laid down to sleep gets up again; where that fails it ends, and the version is started cold. On a
    card that pauses it sleeps on, unless the version can be started on others."""
    held = asleep.replicas.values_list("reservations__gpu_id", flat=True).filter(reservations__released_at=None)
    cards = [gpu for gpu in held if gpu]
    if why_not_back(ctx.job, asleep, cards):
        return False
    wait_for_memory([cards], ctx.sleep)
    try:
        sleeping.wake_up(asleep)
        smoke(asleep, ctx.sleep)
    except (sleeping.SleepFailed, JobFailed) as failed:
        ctx.log(f"{asleep.profile_name} did not wake ({failed}); it is stopped and started cold.")
        stop_now(asleep, "it did not wake up")
        return False
    except JobCancelled:
        stop_now(asleep, "its return was cancelled")
        raise
    open_traffic(asleep)
    return True


def _returning(ctx: JobContext, version: ProfileVersion, rig: Rig) -> Deployment:
    """The deployment that brings a version back: the one an earlier try made, or a new one."""
    known: dict[str, int] = dict(ctx.job.data.get("returning", {}))
    found = Deployment.objects.filter(pk=known.get(str(version.pk), 0)).exclude(status=Status.FAILED).first()
    if found is not None:
        return found
    with transaction.atomic():
        deployment = Deployment.objects.create(
            rig=rig,
            version=version,
            served_name=version.served_name,
            simulated=plan(version, rig).simulated,
            started_by_name="panel",
            job_id=ctx.job.pk,
        )
        ctx.save_data(returning={**known, str(version.pk): deployment.pk})
    return deployment


def _give_back_up(deployment: Deployment, why: str, evidence: dict[str, Any]) -> None:
    """Stop what does not come back. It stays wanted: its restart policy takes over."""
    Deployment.objects.filter(pk=deployment.pk).update(desired=Desired.SERVING, evidence=evidence)
    if deployment.status != Status.STOPPING:
        deployment_transition(deployment, Status.STOPPING, why)
    launching.stop_processes(deployment)
    deployment_transition(deployment, Status.FAILED, why)


def release(ctx: JobContext) -> str:
    successor = heir(ctx.job)
    routes.release(ctx.job.pk, heir_id=successor.pk if successor else None)
    return f"what does not serve waits on for job {successor.pk}" if successor else "requests are no longer held"
