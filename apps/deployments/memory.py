"""Waits until cards are really free: an engine that has exited may still hold memory for a moment."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence

import structlog
from django.conf import settings

from apps.common.units import gib
from apps.deployments.models import SLEEPER, GpuReservation
from apps.hardware.client import HardwareClient
from apps.hardware.protocol import GpuReading, HardwareError
from apps.rigs.models import Gpu

log = structlog.get_logger(__name__)
LIMIT_SECONDS = 30.0
SETTLED_SECONDS = 2.0
# What a driver keeps on an idle card with no process: well below this on every card seen
# (facts: an idle 3090 reports up to some hundred MiB with a display).
FREE_BELOW_BYTES = 1 << 30
# What a sleeping engine keeps of a card: 0.93 GiB eager, 1.05-1.10 with CUDA graphs (measured with 0.26).
RESIDUE_BYTES = int(1.1 * (1 << 30))


def wait_for_memory(replica_gpus: Sequence[Sequence[int]], pause: Callable[[float], None]) -> str:
    """Wait until the cards hold under 1 GiB each besides what sleepers keep, or what they hold has stopped falling.

    Memory that stays belongs to somebody else; the engine's own start-up check then has the last word.
    """
    ids = {g for gpus in replica_gpus for g in gpus}
    uuids = set(Gpu.objects.filter(pk__in=ids).values_list("uuid", flat=True))
    if not uuids:
        return "no card is needed"
    asleep = GpuReservation.objects.filter(gpu_id__in=ids, released_at=None, slot__startswith=SLEEPER)
    most = max(Counter(asleep.values_list("gpu_id", flat=True)).values(), default=0)
    free_below = FREE_BELOW_BYTES + most * RESIDUE_BYTES
    client = HardwareClient(settings.SAMPLER_SOCKET)
    began = time.monotonic()
    lowest: int | None = None
    fell_at = began
    try:
        while True:
            used = _used(client, uuids)
            now = time.monotonic()
            if used is not None:
                if max(used.values(), default=0) < free_below:
                    return f"free after {now - began:.1f} s"
                total = sum(used.values())
                if lowest is None or total < lowest:
                    lowest, fell_at = total, now
                if now - fell_at > SETTLED_SECONDS:
                    return f"{gib(total)} stay in use by others"
            if now - began > LIMIT_SECONDS:
                return (
                    "the cards could not be read; going on"
                    if used is None
                    else f"{gib(sum(used.values()))} still in use"
                )
            pause(0.1)
    finally:
        client.close()


def free_memory(uuids: Collection[str]) -> dict[str, int]:
    """Bytes free on each of these cards now, as the sampler reads them; a card that it does not tell is left out."""
    if not uuids:
        return {}
    client = HardwareClient(settings.SAMPLER_SOCKET)
    try:
        reading = client.read()
        totals = {g.uuid: g.memory_total_bytes for g in Gpu.objects.filter(uuid__in=uuids)}
    except HardwareError as error:
        log.info("cards not readable; going by their size", error=str(error))
        return {}
    finally:
        client.close()
    return {
        g.uuid: max(0, total - g.memory_used_bytes)
        for g in reading.gpus
        if g.memory_used_bytes is not None and (total := totals.get(g.uuid))
    }


def card_use(uuids: Collection[str]) -> dict[str, int]:
    """Bytes in use on each of these cards now, by everybody; {} when the sampler does not tell."""
    if not uuids:
        return {}
    client = HardwareClient(settings.SAMPLER_SOCKET)
    try:
        return _used(client, set(uuids)) or {}
    finally:
        client.close()


def _used(client: HardwareClient, uuids: set[str]) -> dict[str, int] | None:
    try:
        reading = client.read()
    except HardwareError as error:
        log.info("cards not readable yet", error=str(error))
        return None
    cards: list[GpuReading] = [g for g in reading.gpus if g.uuid in uuids]
    return {g.uuid: g.memory_used_bytes for g in cards if g.memory_used_bytes is not None}
