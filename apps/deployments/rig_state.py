"""A rig's memory as the planner takes it: what CUDA sees of each card, and what others hold of it now."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

import structlog
from django.conf import settings

from apps.deployments.models import SLEEPER, WHOLE_CARD, Deployment, GpuReservation, Status
from apps.hardware.client import HardwareClient
from apps.hardware.protocol import HardwareError
from apps.profiles import fit
from apps.profiles.forecast import RigState
from apps.profiles.placement import RigFacts
from apps.rigs.models import Rig
from apps.runners.protocol import RunnerError
from apps.telemetry.frames import Frame
from apps.telemetry.selectors import latest

log = structlog.get_logger(__name__)
READ_SECONDS = 0.5


def live_frame(rig: Rig) -> Frame | None:
    """The cards as read within the last seconds."""
    frame = latest(rig.slug)
    return None if frame is None or frame.is_stale(time.time()) else frame


def with_readings(facts: RigFacts, frame: Frame | None) -> RigFacts:
    """The cards with the PCIe lanes they run on now and their temperatures, where they were read."""
    if frame is None:
        return facts
    rows = frame.gpus
    return replace(
        facts,
        cards=tuple(
            replace(
                card,
                pcie_width=rows.get(card.uuid, {}).get("pcie_width") or card.pcie_width,
                temperature_celsius=rows.get(card.uuid, {}).get("temperature_celsius"),
            )
            for card in facts.cards
        ),
    )


def rig_state(
    rig: Rig,
    facts: RigFacts,
    held: Collection[GpuReservation],
    replaced: Collection[Deployment],
    frame: Frame | None,
) -> RigState:
    """``held`` are the live reservations, ``replaced`` the deployments that a switch would stop first: what they hold
    counts as free. Sleepers are counted apart, by what one leaves on a card, since a switch may stop them too. What
    anybody else holds is in use."""
    asleep = {
        r.replica.deployment_id: r.replica.deployment
        for r in held
        if r.replica.deployment.status == Status.SLEEPING and r.slot.startswith(SLEEPER)
    }
    leaving = {d.pk: d for d in replaced}
    known = leaving | asleep
    theirs = {r.gpu.uuid for r in held if r.gpu and r.replica.deployment_id in known}
    of_others = {r.gpu.uuid for r in held if r.gpu and r.slot == WHOLE_CARD and r.replica.deployment_id not in known}
    sleeping = _sleepers(held, leaving)
    in_use = _in_use(rig, frame, theirs, known.values())
    memory = {}
    for card in facts.cards:
        total = card.cuda_total_bytes
        if not card.present or total is None:
            continue
        used = in_use.get(card.uuid)
        if card.uuid in of_others:  # whoever serves there keeps it
            memory[card.uuid] = fit.CardMemory(total, total)
        else:
            memory[card.uuid] = fit.CardMemory(total, used, sleeping.get(card.uuid, 0))
    available = None
    if frame is not None and frame.host.get("memory_total_bytes") and frame.host.get("memory_used_bytes") is not None:
        available = int(frame.host["memory_total_bytes"] - frame.host["memory_used_bytes"])
    return RigState(
        cards=memory,
        compute_capability=facts.compute_capability,
        host_total_bytes=rig.host_memory_bytes,
        host_available_bytes=available,
    )


def _sleepers(held: Collection[GpuReservation], gone: Collection[int]) -> Mapping[str, int]:
    count: dict[str, int] = {}
    for reservation in held:
        deployment = reservation.replica.deployment
        if reservation.gpu and deployment.pk not in gone and deployment.status == Status.SLEEPING:
            count[reservation.gpu.uuid] = count.get(reservation.gpu.uuid, 0) + 1
    return count


def _in_use(
    rig: Rig, frame: Frame | None, of_replaced: Collection[str], replaced: Collection[Deployment]
) -> dict[str, int]:
    """Bytes that others than ``replaced`` hold on each card; a card that nobody measured is not in it."""
    found: dict[str, int] = {}
    if frame is not None:
        for uuid, row in frame.gpus.items():
            used, by_processes = row.get("memory_used_bytes"), row.get("process_memory_bytes")
            if used is None:
                continue
            if uuid in of_replaced:
                # From a frame nobody can tell whose processes these are: they are taken for those that go.
                used = max(0, used - by_processes) if by_processes is not None else 0
            found[uuid] = int(used)
    if of_replaced and rig.slug == settings.RIG_NAME:
        found.update(_without(_pids(replaced), of_replaced))
    return found


def _pids(deployments: Iterable[Deployment]) -> set[int]:
    from apps.deployments.launching import observe  # it imports the plan, which needs this module

    found: set[int] = set()
    for deployment in deployments:
        for replica in deployment.replicas.filter(released_at=None):
            try:
                found.update(observe(replica).pids)
            except RunnerError as error:
                log.info("an engine cannot be looked at", replica=replica.pk, error=str(error))
    return found


def _without(pids: Collection[int], uuids: Collection[str]) -> dict[str, int]:
    """What is in use on these cards beside the processes that go. Empty where the cards cannot be read."""
    client = HardwareClient(settings.SAMPLER_SOCKET, timeout=READ_SECONDS)
    try:
        reading = client.read()
    except HardwareError:
        return {}
    finally:
        client.close()
    found = {}
    for card in reading.gpus:
        if card.uuid in uuids and card.memory_used_bytes is not None and card.processes is not None:
            theirs = sum(p.memory_used_bytes or 0 for p in card.processes if p.pid in pids)
            found[card.uuid] = max(0, card.memory_used_bytes - theirs)
    return found
