"""The switch's way forward, step by step. Every step may run twice."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from django.db import transaction

from apps.common.units import seconds
from apps.deployments import boots, launching, probing, routes, sleeping, switch_sleep
from apps.deployments.draining import DRAIN_SECONDS, drain
from apps.deployments.equipment import engine_install, engine_label
from apps.deployments.giving_up import give_up_for
from apps.deployments.load_times import LoadClock
from apps.deployments.memory import wait_for_memory
from apps.deployments.models import SERVING, Deployment, Desired, Replica, Status
from apps.deployments.plan import Plan, placed, plan
from apps.deployments.settled import settled_plan
from apps.deployments.smoke import smoke
from apps.deployments.status import deployment_transition
from apps.deployments.switch_policy import ask_again, spared
from apps.jobs.handlers import JobFailed
from apps.jobs.runner import JobContext
from apps.profiles.models import ProfileVersion
from apps.rigs.selectors import rig_get


def _version(ctx: JobContext) -> ProfileVersion:
    return ProfileVersion.objects.select_related("profile", "model").get(pk=ctx.job.params["version_id"])


def target_of(ctx: JobContext) -> Deployment:
    return Deployment.objects.select_related("version__profile", "version__model", "rig").get(pk=ctx.job.data["target"])


def replaced_by(ctx: JobContext) -> list[Deployment]:
    ids = ctx.job.data.get("replaced", [])
    return list(Deployment.objects.select_related("version__profile", "rig").filter(pk__in=ids).order_by("pk"))


def nothing_to_do(ctx: JobContext) -> bool:
    return bool(ctx.job.data.get("nothing_to_do"))


def plan_step(ctx: JobContext) -> str:
    version, rig = _version(ctx), rig_get(ctx.job.rig_name)
    same = Deployment.objects.filter(rig=rig, version=version, status__in=SERVING, desired=Desired.SERVING).first()
    exclusive = bool(ctx.job.params.get("exclusive"))
    if same is not None and not exclusive:
        ctx.save_data(nothing_to_do=True)
        ctx.set_deployment(same.pk)
        return "it already serves"
    if "target" not in ctx.job.data:
        ask_again(ctx.job, version, rig)
    asleep = sleeping.sleeper_of(version, rig)
    if asleep is not None and "target" not in ctx.job.data:
        return switch_sleep.plan_to_wake(ctx, asleep, exclusive)
    if ctx.job.data.get("wake"):
        return "it sleeps here and is woken"
    the_plan = _planned(ctx, exclusive=exclusive)
    if refusals := _refusals(ctx, the_plan):
        raise JobFailed(
            f"{version.profile} cannot start on {rig}: {' '.join(refusals)}",
            cause="does_not_fit",
            suggestion=next((s.sentence for s in the_plan.forecast.suggestions), ""),
            suggested_options=_suggested(the_plan),
        )
    if "target" not in ctx.job.data:
        with transaction.atomic():
            target = Deployment.objects.create(
                rig=rig,
                version=version,
                served_name=version.served_name,
                simulated=the_plan.simulated,
                started_by_name=ctx.job.user_name,
                job_id=ctx.job.pk,
            )
            ctx.save_data(
                target=target.pk,
                replaced=[d.pk for d in the_plan.in_the_way],
                replaced_names=[d.profile_name for d in the_plan.in_the_way],
                placement=[list(gpus) for gpus in the_plan.replica_gpus],
                fallback=[
                    *ctx.job.data.get("fallback", []),
                    *(d.version_id for d in the_plan.in_the_way if d.status in SERVING),
                ],
            )
            ctx.set_deployment(target.pk)
    for warning in the_plan.warnings:
        ctx.log(warning)
    where = _placement_words(the_plan)
    names = ctx.job.data["replaced_names"]
    return f"{version.layout} {where}" + (f", replaces {', '.join(names)}" if names else ", replaces nothing")


def _planned(ctx: JobContext, *, exclusive: bool = False) -> Plan:
    version, rig = _version(ctx), rig_get(ctx.job.rig_name)
    if "restart_of" in ctx.job.data:  # not refused for memory
        return plan(version, rig, exclusive=exclusive)
    return settled_plan(version, rig, ctx.sleep, exclusive=exclusive)


def _refusals(ctx: JobContext, the_plan: Plan) -> tuple[str, ...]:
    """A restart is tried whatever the memory seems to be: what died may still be letting go of it."""
    return the_plan.problems if "restart_of" in ctx.job.data else the_plan.refusals


def _suggested(the_plan: Plan) -> dict[str, Any]:
    """What the first suggestion changes, options and layout, as a click on the job applies it."""
    version = the_plan.version
    for found in the_plan.forecast.suggestions[:1]:
        options = {name: value for name, value in found.options.items() if version.options.get(name) != value}
        layout = ("replicas", "tensor_parallel_size", "pipeline_parallel_size")
        return options | {n: getattr(found, n) for n in layout if getattr(found, n) != getattr(version, n)}
    return {}


def _placement_words(the_plan: Plan) -> str:
    if not any(the_plan.replica_gpus):
        return "on the CPU"
    index = {g.pk: g.index for g in the_plan.rig.gpus.all()}
    return "on GPUs " + " and ".join("+".join(str(index[g]) for g in gpus) for gpus in the_plan.replica_gpus)


def preflight_step(ctx: JobContext) -> str:
    if nothing_to_do(ctx):
        return "nothing to check"
    if ctx.job.data.get("wake"):
        return "its weights are in the host's memory"
    the_plan = _planned(ctx)
    if refusals := _refusals(ctx, the_plan):
        raise JobFailed(" ".join(refusals), cause="does_not_fit")
    _sleepers_to_end(ctx, replaced_by(ctx))
    launching.free_ports(len(the_plan.servers))
    return "engine, weights and ports are there"


def hold_step(ctx: JobContext) -> str:
    if nothing_to_do(ctx):
        return "nothing to hold"
    names = sorted({target_of(ctx).served_name, *(d.served_name for d in replaced_by(ctx) if d.is_live)})
    epoch = routes.hold(names, job_id=ctx.job.pk, eta_at=ctx.job.eta_at)
    if not routes.wait_acknowledged(epoch, ctx.sleep):
        ctx.log("A gateway did not acknowledge the hold in time; going on without it.")
        return "held; one gateway stayed silent"
    return f"requests for {', '.join(names)} wait"


def drain_step(ctx: JobContext) -> str:
    old = [d for d in replaced_by(ctx) if d.is_live]
    if not old:
        return "nothing to drain"
    for deployment in old:
        if deployment.status in SERVING:
            deployment_transition(deployment, Status.DRAINING, f"a switch to {ctx.job.profile_name} is under way")
    limit = float(ctx.job.params.get("drain_seconds", DRAIN_SECONDS))
    return drain(ctx, [d.pk for d in old], limit)


def stop_step(ctx: JobContext) -> str:
    old = replaced_by(ctx)
    told = [] if nothing_to_do(ctx) else switch_sleep.make_room(ctx, _sleepers_to_end(ctx, old))
    if not old:
        return "; ".join(told) or "nothing to stop"
    ctx.save_data(stopped_old=True)  # before the first signal: from here on there is something to bring back
    # What sleeps goes first: whoever is laid down after it finds its place.
    for deployment in sorted(old, key=lambda d: d.status != Status.SLEEPING):
        why = f"replaced by {ctx.job.profile_name}"
        if (slept := switch_sleep.lay_down(ctx, deployment, target_of(ctx), why)) is not None:
            told.append(f"{deployment.profile_name}: {slept}")
            continue
        # Also of one that has just died: nobody is to start it again in the place of what was asked for.
        Deployment.objects.filter(pk=deployment.pk).update(desired=Desired.STOPPED)
        if deployment.is_live and deployment.status != Status.STOPPING:
            deployment_transition(deployment, Status.STOPPING, why)
        told.append(f"{deployment.profile_name}: {launching.stop_processes(deployment)}")
        if deployment.status == Status.STOPPING:
            deployment_transition(deployment, Status.STOPPED, why)
    return "; ".join(told)


def _sleepers_to_end(ctx: JobContext, old: list[Deployment]) -> list[Deployment]:
    """The sleepers to end for it. Raises JobFailed where a pin keeps one of them, which it may since the plan step."""
    target = target_of(ctx)
    return switch_sleep.sleepers_to_end(ctx, target, old, spared(ctx.job, target.rig))


def memory_step(ctx: JobContext) -> str:
    if nothing_to_do(ctx):
        return "nothing to wait for"
    return wait_for_memory(ctx.job.data["placement"], ctx.sleep)


def start_step(ctx: JobContext) -> str:
    if nothing_to_do(ctx):
        return "nothing to start"
    target = target_of(ctx)
    if ctx.job.data.get("wake"):
        try:
            return sleeping.wake_up(target)
        except sleeping.SleepFailed as failed:
            ctx.log(f"It did not wake ({failed}); it is stopped and started cold.")
            switch_sleep.start_cold_instead(ctx, target)
            target = target_of(ctx)
    # The cards of the plan step, also when others have become free since: what was told is what is done.
    return start_deployment(target, placed(plan(target.version, target.rig), ctx.job.data["placement"]))


def start_deployment(deployment: Deployment, the_plan: Plan) -> str:
    """Reserve and launch; carries on wherever an earlier try was cut off. Raises JobFailed."""
    if the_plan.problems:
        raise JobFailed(" ".join(the_plan.problems), cause="does_not_fit")
    if deployment.status == Status.PENDING:
        deployment_transition(deployment, Status.PREPARING)
    replicas = launching.reserve(deployment, the_plan)
    if deployment.status == Status.PREPARING:
        deployment_transition(deployment, Status.STARTING, engine_version=_engine_version(deployment))
    boots.predicted(deployment, the_plan.forecast, the_plan.uncorrected)
    launching.launch(deployment, the_plan)
    if deployment.status == Status.STARTING:
        deployment_transition(deployment, Status.LOADING)
    ports = ", ".join(str(r.port) for r in replicas)
    stand_in = " (the simulated engine stands in)" if deployment.simulated else ""
    return f"{len(replicas)} process{'es' if len(replicas) > 1 else ''} on port {ports}{stand_in}"


def _engine_version(deployment: Deployment) -> str:
    return engine_label(engine_install(deployment.version, deployment.rig))


def ready_step(ctx: JobContext) -> str:
    if nothing_to_do(ctx):
        return "it already serves"
    began = time.monotonic()
    if ctx.job.data.get("wake"):
        return "nothing to load"  # the smoke step asks it for a token
    wait_for_deployment(ctx, target_of(ctx))
    return f"loaded in {seconds(time.monotonic() - began)}"


def wait_for_deployment(ctx: JobContext, deployment: Deployment) -> None:
    follow_start(ctx, deployment)
    boots.came_up(deployment)
    sleeping.first_sleep(deployment, ctx.log)


def follow_start(ctx: JobContext, deployment: Deployment, replicas: Sequence[Replica] | None = None) -> None:
    """Wait until these replicas (all, unless given) are ready, with their progress, time left and log in the job."""
    last, told = "", 0.0
    clock = LoadClock(ctx) if deployment.pk == ctx.job.deployment_id else None  # not of one that is brought back

    def tell(fraction: float, phase: str) -> None:
        nonlocal last, told
        if phase != last or fraction - told > 0.02:
            last, told = phase, fraction
            if clock:
                clock.tell(fraction, phase)
            else:
                ctx.progress(fraction, phase)

    launching.wait_ready(
        deployment, replicas, pause=ctx.sleep, tell=tell, write_log=lambda text: ctx.log(text, "engine")
    )
    if clock:
        clock.done()


def smoke_step(ctx: JobContext) -> str:
    return "it already serves" if nothing_to_do(ctx) else smoke(target_of(ctx), ctx.sleep)


def route_step(ctx: JobContext) -> str:
    if nothing_to_do(ctx):
        routes.release(ctx.job.pk)  # holds that a superseded switch left to this one
        return "traffic goes there already"
    target = target_of(ctx)
    epoch = open_traffic(target)
    routes.release(ctx.job.pk)
    if "restart_of" not in ctx.job.data:
        for name in give_up_for(target, alone=bool(ctx.job.params.get("exclusive"))):
            ctx.log(f"{name}, which had died, is not started again.")
    routes.wait_acknowledged(epoch, ctx.sleep)
    return f"requests for {target.served_name} go to it"


def open_traffic(deployment: Deployment) -> int:
    """Ready and routed in one transaction: the gateway never sees one without the other."""
    probing.forget(deployment.replicas.all())
    with transaction.atomic():
        if deployment.status in (Status.LOADING, Status.SLEEPING):
            deployment_transition(deployment, Status.READY, "answered a test request")
        return routes.open_to(deployment)
