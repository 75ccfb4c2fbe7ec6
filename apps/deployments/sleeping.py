"""Models that sleep: their weights wait in the host's memory, and waking takes a second instead of a cold start.

An engine sleeps where its adapter can, its profile asks for it, and its first sleep right after the start went well:
that is the slow one, for the host's memory is taken and pinned then. A sleeper keeps its process, its port and about a
GiB of each card, holds a slot of its own there, and nothing is routed to it: it would let requests hang. Whatever goes
wrong on the way ends in the ordinary cold switch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor

import psutil
import structlog
from django.db import IntegrityError, connection, transaction

from apps.common.units import gib
from apps.deployments import launching
from apps.deployments.engine_http import ask, doors
from apps.deployments.equipment import engine_adapter
from apps.deployments.memory import RESIDUE_BYTES, card_use
from apps.deployments.models import CPU_SLOT, SLEEPER, WHOLE_CARD, Deployment, Desired, GpuReservation, Replica, Status
from apps.deployments.status import deployment_transition
from apps.engines.protocol import CanSleep, EngineKind
from apps.jobs.handlers import JobFailed
from apps.profiles.models import Device, ProfileVersion
from apps.rigs.models import Gpu, Rig
from apps.runners.protocol import ProcessState

log = structlog.get_logger(__name__)
FIRST_SLEEP_SECONDS = 300.0  # 25 s were measured for 18 GiB, on a host whose memory grew meanwhile
SLEEP_SECONDS = 60.0
# Measured: the pinned allocator rounds every tensor up to a power of two, 1.78-1.88 of the weights in all.
HOST_BYTES_PER_WEIGHT = 1.9
HOST_KEEPS_BYTES = 4 << 30
GIB = 1 << 30
# A starting engine's context and NCCL lie outside its own budget.
CONTEXT_BYTES = int(0.6 * GIB)
USUAL_UTILIZATION = 0.92


class SleepFailed(Exception):
    """The sentence why an engine did not fall asleep or wake up."""


def sleeps(deployment: Deployment) -> CanSleep | None:
    """The adapter's way to put it to sleep, or None where its profile does not ask for it or its first sleep failed."""
    engine = engine_adapter(deployment.version, deployment.rig)
    if not isinstance(engine, CanSleep) or not engine.may_sleep(deployment.version.options):
        return None
    return None if (deployment.sleep or {}).get("problem") else engine


def sleeper_of(version: ProfileVersion, rig: Rig) -> Deployment | None:
    """The deployment of this very version that sleeps and whose processes live."""
    for found in Deployment.objects.filter(rig=rig, version=version, status=Status.SLEEPING).select_related(
        "version__profile", "version__model", "rig"
    ):
        if all(launching.observe(r).state == ProcessState.RUNNING for r in doors(found.replicas.all())):
            return found
    return None


def sleepers_on(gpu_ids: Iterable[int]) -> list[Deployment]:
    """Who sleeps on these cards, the longest asleep first."""
    return list(
        Deployment.objects.filter(
            status=Status.SLEEPING,
            replicas__reservations__gpu_id__in=list(gpu_ids),
            replicas__reservations__released_at=None,
            replicas__reservations__slot__startswith=SLEEPER,
        )
        .select_related("version__profile", "version__model", "rig")
        .distinct()
        .order_by("pk")
    )


def is_at_rest(deployment: Deployment) -> bool:
    """Whether it sleeps in its own slots: nobody began to wake it."""
    held = GpuReservation.objects.filter(replica__deployment=deployment, released_at=None)
    return deployment.status == Status.SLEEPING and not held.exclude(slot__startswith=SLEEPER).exists()


# -- what may sleep ------------------------------------------------------------------------------


def host_memory_problem(deployment: Deployment) -> str:
    """Why the host cannot hold its weights while it sleeps; empty when it can, or when they are pinned already."""
    version = deployment.version
    if (
        (deployment.sleep or {}).get("first_seconds") is not None
        or deployment.simulated
        or version.device == Device.CPU
    ):
        return ""
    weights = version.model.weights_bytes
    if weights is None:
        return "how large its weights are is not known, so neither is what its sleep needs of the host's memory"
    needed = int(weights * version.replicas * HOST_BYTES_PER_WEIGHT)
    free = psutil.virtual_memory().available - HOST_KEEPS_BYTES
    if needed <= free:
        return ""
    return (
        f"its sleep needs {gib(needed)} of the host's memory ({HOST_BYTES_PER_WEIGHT} × its weights); "
        f"{gib(max(0, free))} are free"
    )


def fits_beside(version: ProfileVersion, gpu_ids: Iterable[int], sleepers: int) -> bool:
    """Whether an engine can start on cards that so many sleepers keep a part of: vLLM wants its whole share free."""
    if version.device == Device.CPU or version.engine == EngineKind.LLAMA_CPP:
        return True
    share = version.options.get("gpu_memory_utilization") or USUAL_UTILIZATION
    totals = Gpu.objects.filter(pk__in=list(gpu_ids)).values_list("memory_total_bytes", flat=True)
    smallest = min((t for t in totals if t), default=0)
    return smallest * (1 - float(share)) >= sleepers * RESIDUE_BYTES + CONTEXT_BYTES


def may_stay(deployment: Deployment, target: Deployment, gpu_ids: Iterable[int], *, waking: bool) -> bool:
    """Whether it sleeps rather than stops while ``target`` comes to its cards."""
    if deployment.status != Status.DRAINING or sleeps(deployment) is None:
        return False
    same = deployment.version.profile_id == target.version.profile_id or deployment.served_name == target.served_name
    if same:
        return False
    cards = list(gpu_ids)
    others = [s for s in sleepers_on(cards) if s.pk != target.pk]
    return waking or fits_beside(target.version, cards, len(others) + 1)


# -- asleep and awake ----------------------------------------------------------------------------


def fall_asleep(deployment: Deployment, why: str) -> str:
    """Put it to sleep and give its cards to the next; returns a sentence. Raises SleepFailed, with nothing changed."""
    began = time.monotonic()
    engine = sleeps(deployment)
    if engine is None:
        raise SleepFailed("it does not sleep")
    _each(deployment, engine.sleep_path, SLEEP_SECONDS, asleep=True, engine=engine)
    with transaction.atomic():
        GpuReservation.objects.filter(replica__deployment=deployment, released_at=None).update(
            slot=f"{SLEEPER}{deployment.pk}"
        )
        Deployment.objects.filter(pk=deployment.pk).update(desired=Desired.STOPPED)
        if not deployment_transition(deployment, Status.SLEEPING, why):
            raise SleepFailed("something else moved it meanwhile")
    return f"asleep after {time.monotonic() - began:.2f} s"


def wake_up(deployment: Deployment) -> str:
    """Give it its cards again and wake it; it serves once it is routed. Raises SleepFailed, or JobFailed when
    somebody else holds a card."""
    began = time.monotonic()
    engine = sleeps(deployment)
    if engine is None:
        raise SleepFailed("it does not sleep")
    slot = CPU_SLOT if deployment.version.device == Device.CPU else WHOLE_CARD
    try:
        with transaction.atomic():
            asleep = Deployment.objects.filter(pk=deployment.pk, status=Status.SLEEPING)
            if asleep.update(desired=Desired.SERVING) != 1:
                raise SleepFailed("it has ended meanwhile")  # its engine died, or an earlier try gave it up
            GpuReservation.objects.filter(replica__deployment=deployment, released_at=None).update(slot=slot)
    except IntegrityError:
        raise JobFailed("Another deployment took one of its cards in this moment; try again.") from None
    _each(deployment, engine.wake_path, SLEEP_SECONDS, asleep=False, engine=engine)
    return f"awake after {time.monotonic() - began:.2f} s"


def first_sleep(deployment: Deployment, write_log: Callable[[str], None]) -> None:
    """Sleep and wake once before anybody is told that it is ready, and keep what it leaves on the cards.

    Raises JobFailed when it does not wake again. When it does not fall asleep it serves all the same and is switched
    cold."""
    engine = sleeps(deployment)
    if engine is None or (deployment.sleep or {}).get("first_seconds") is not None:
        return
    if problem := host_memory_problem(deployment):
        _keep(deployment, problem=problem)
        write_log(f"It will not sleep: {problem}. Switches away from it stop it.")
        return
    uuids = set(
        Gpu.objects.filter(reservations__replica__deployment=deployment).values_list("uuid", flat=True).distinct()
    )
    began = time.monotonic()
    try:
        _each(deployment, engine.sleep_path, FIRST_SLEEP_SECONDS, asleep=True, engine=engine)
    except SleepFailed as failed:
        _keep(deployment, problem=str(failed))
        write_log(f"It will not sleep: {failed}. Switches away from it stop it.")
        return
    took = time.monotonic() - began
    residue = card_use(uuids)
    try:
        _each(deployment, engine.wake_path, SLEEP_SECONDS, asleep=False, engine=engine)
    except SleepFailed as failed:
        raise JobFailed(
            f"{deployment.profile_name} fell asleep for a test and did not wake: {failed}",
            cause="crashed",
            suggestion="Serve it without sleep: switches then stop and start it.",
            suggested_options={"enable_sleep_mode": False},
        ) from None
    _keep(deployment, first_seconds=round(took, 2), in_use_asleep_bytes=residue)
    most = max(residue.values(), default=0)
    write_log(f"The first sleep took {took:.1f} s; asleep, {gib(most)} of a card stay in use.")


def _keep(deployment: Deployment, **facts: object) -> None:
    deployment.sleep = {**(deployment.sleep or {}), **facts}
    Deployment.objects.filter(pk=deployment.pk).update(sleep=deployment.sleep)


def _each(deployment: Deployment, path: str, limit: float, *, asleep: bool, engine: CanSleep) -> None:
    """All servers at once, then each is asked whether it did. Raises SleepFailed; what did is turned back."""
    servers = doors(deployment.replicas.filter(released_at=None))

    def one(replica: Replica) -> str:
        try:
            status, text = ask(replica, "POST", path, limit_seconds=limit)
            if status != 200:
                return f"HTTP {status}: {text[:200]}" if status else text
            said = engine.is_asleep(ask(replica, "GET", engine.asleep_path)[1])
            return "" if said is asleep else f"it says {'awake' if asleep else 'asleep'}"
        finally:
            connection.close()

    with ThreadPoolExecutor(max_workers=max(1, len(servers))) as pool:
        problems = list(pool.map(one, servers))
    if any(problems):
        if asleep:
            for replica in servers:
                ask(replica, "POST", engine.wake_path, limit_seconds=limit)
        raise SleepFailed("; ".join(p for p in problems if p))


def room_for(
    version: ProfileVersion,
    cards: Iterable[int],
    *,
    keep: int,
    last: Collection[int] = (),
    without: Collection[int] = (),
) -> list[Deployment]:
    """The sleepers to stop so that this version's engine finds its share of each card free, the longest asleep first.

    ``keep`` more are about to sleep there: rather none of those is laid down than that a sleeper of the profiles in
    ``last`` ends. Deployments in ``without`` are not counted."""
    cards = list(cards)
    there = [s for s in sleepers_on(cards) if s.pk not in without]
    gone: list[Deployment] = []
    while there and not fits_beside(version, cards, len(there) + keep):
        others = [s for s in there if s.version.profile_id not in last]
        if others or not keep:
            gone.append((others or there)[0])
            there.remove(gone[-1])
        else:
            keep -= 1
    return gone
