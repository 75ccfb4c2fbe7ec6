"""The switch's steps where somebody sleeps: who is laid down, makes room or is woken, and the cold way instead."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from django.db import transaction

from apps.deployments import launching, sleeping
from apps.deployments.memory import wait_for_memory
from apps.deployments.models import CPU_SLOT, LIVE, SERVING, WHOLE_CARD, Deployment, Status
from apps.deployments.plan import Plan, plan
from apps.deployments.status import deployment_transition
from apps.deployments.stop import stop_now
from apps.jobs.handlers import JobFailed
from apps.jobs.runner import JobContext
from apps.profiles.models import Device, ProfileVersion
from apps.rigs.models import Rig


def plan_to_wake(ctx: JobContext, asleep: Deployment, exclusive: bool) -> str:
    """It sleeps on its cards already: whoever is awake there makes room."""
    cards = cards_of(asleep)
    in_the_way = in_the_way_of_waking(asleep, exclusive)
    ctx.save_data(
        target=asleep.pk,
        wake=True,
        replaced=[d.pk for d in in_the_way],
        replaced_names=[d.profile_name for d in in_the_way],
        placement=cards,
        fallback=[
            *ctx.job.data.get("fallback", []),  # what a restart owes already
            *(d.version_id for d in in_the_way if d.status in SERVING),
        ],
    )
    ctx.set_deployment(asleep.pk)
    names = ctx.job.data["replaced_names"]
    return "it sleeps here and is woken" + (f", replaces {', '.join(names)}" if names else "")


def cards_of(asleep: Deployment) -> list[list[int]]:
    return [
        [x.gpu_id for x in sorted(r.reservations.all(), key=lambda x: x.pk) if x.gpu_id and x.released_at is None]
        for r in asleep.replicas.prefetch_related("reservations")
    ]


@dataclass(frozen=True, slots=True)
class Effect:
    """What a switch would do to what is there: ``replaced`` stops or is laid down, ``ended`` are other sleepers that
    are stopped to make room. ``cards`` are the ids of those it would use, ``wakes`` the sleeper that it would wake."""

    replaced: tuple[Deployment, ...]
    ended: tuple[Deployment, ...]
    cards: tuple[int, ...]
    wakes: Deployment | None = None


def effect_of(
    version: ProfileVersion,
    rig: Rig,
    *,
    exclusive: bool = False,
    keep: Collection[int] = (),
    the_plan: Plan | None = None,
) -> Effect:
    """One that sleeps is woken on its own cards, wherever the planner would lay a new one. ``keep`` are profiles whose
    sleepers end last (see ``sleepers_to_end``)."""
    asleep = None
    if version.pk is not None:  # not a draft
        sleeping_here = Deployment.objects.filter(rig=rig, version=version, status=Status.SLEEPING)
        asleep = sleeping_here.select_related("version__profile", "rig").order_by("pk").first()
    if asleep is not None:
        cards = tuple(gpu for gpus in cards_of(asleep) for gpu in gpus)
        return Effect(tuple(in_the_way_of_waking(asleep, exclusive)), (), cards, asleep)
    the_plan = the_plan or plan(version, rig, exclusive=exclusive)
    cards = tuple(gpu for gpus in the_plan.replica_gpus for gpu in gpus)
    # Those in the way may be laid down beside them: what must end at the least is what ends when none of them is.
    ended = sleeping.room_for(version, cards, keep=0, last=keep, without={d.pk for d in the_plan.in_the_way})
    return Effect(the_plan.in_the_way, tuple(ended), cards)


def in_the_way_of(version: ProfileVersion, rig: Rig, *, exclusive: bool = False) -> list[Deployment]:
    """All that a switch would replace."""
    return list(effect_of(version, rig, exclusive=exclusive).replaced)


def in_the_way_of_waking(asleep: Deployment, exclusive: bool) -> list[Deployment]:
    """Who is awake where it sleeps, or answers to its name."""
    chosen = {gpu for gpus in cards_of(asleep) for gpu in gpus}
    on_cpu = asleep.version.device == Device.CPU
    in_the_way = []
    live = Deployment.objects.filter(rig=asleep.rig, status__in=LIVE).exclude(pk=asleep.pk)
    for deployment in live.select_related("version__profile").prefetch_related("replicas__reservations").order_by("pk"):
        held = [x for r in deployment.replicas.all() for x in r.reservations.all() if x.released_at is None]
        awake_there = any(
            (x.gpu_id in chosen and x.slot == WHOLE_CARD) or (on_cpu and x.gpu_id is None and x.slot == CPU_SLOT)
            for x in held
        )
        same = (
            deployment.version.profile_id == asleep.version.profile_id or deployment.served_name == asleep.served_name
        )
        if awake_there or same or exclusive:
            in_the_way.append(deployment)
    return in_the_way


def sleepers_to_end(
    ctx: JobContext, target: Deployment, old: Sequence[Deployment], spare: Mapping[int, str]
) -> list[Deployment]:
    """The sleepers on the target's cards, beside ``old``, that would leave it too little: vLLM wants its share of a
    card free.

    ``spare`` says of profiles why they may not end: before one of theirs does, none of ``old`` is laid down beside it.
    Raises JobFailed where that does not help."""
    if ctx.job.data.get("wake"):
        return []
    cards = [gpu for gpus in ctx.job.data["placement"] for gpu in gpus]
    coming = sum(sleeping.may_stay(d, target, cards, waking=True) for d in old)
    leaving = {d.pk for d in old} - set(ctx.job.data.get("slept", []))  # those were laid down by an earlier try
    ending = sleeping.room_for(target.version, cards, keep=coming, last=spare, without=leaving)
    if told := [spare[d.version.profile_id] for d in ending if d.version.profile_id in spare]:
        raise JobFailed(told[0], cause="pinned")
    return ending


def make_room(ctx: JobContext, ending: Sequence[Deployment]) -> list[str]:
    """Stop these; a sentence each."""
    told = []
    for sleeper in ending:
        why = f"it slept on cards that {ctx.job.profile_name} needs"
        if deployment_transition(sleeper, Status.STOPPING, why):
            told.append(f"{sleeper.profile_name}, which slept: {launching.stop_processes(sleeper)}")
            deployment_transition(sleeper, Status.STOPPED, why)
    return told


def lay_down(ctx: JobContext, deployment: Deployment, target: Deployment, why: str) -> str | None:
    """Put it to sleep where that is possible; None where it has to stop."""
    if deployment.status == Status.SLEEPING and deployment.pk in ctx.job.data.get("slept", []):
        return "sleeps already"  # an earlier try of this step laid it down
    cards = [gpu for gpus in ctx.job.data["placement"] for gpu in gpus]
    waking = bool(ctx.job.data.get("wake"))
    if ctx.job.params.get("exclusive") or not sleeping.may_stay(deployment, target, cards, waking=waking):
        return None
    ctx.save_data(slept=[*ctx.job.data.get("slept", []), deployment.pk])
    try:
        return sleeping.fall_asleep(deployment, why)
    except sleeping.SleepFailed as failed:
        ctx.log(f"{deployment.profile_name} did not fall asleep and is stopped: {failed}.")
        return None


def start_cold_instead(ctx: JobContext, sleeper: Deployment) -> None:
    """A sleeper that does not wake ends; a new deployment of the same version takes its place in this switch."""
    stop_now(sleeper, "it did not wake up")
    with transaction.atomic():
        target = Deployment.objects.create(
            rig=sleeper.rig,
            version=sleeper.version,
            served_name=sleeper.served_name,
            simulated=sleeper.simulated,
            started_by_name=ctx.job.user_name,
            job_id=ctx.job.pk,
        )
        ctx.save_data(target=target.pk, wake=False)
        ctx.set_deployment(target.pk)
    wait_for_memory(ctx.job.data["placement"], ctx.sleep)
