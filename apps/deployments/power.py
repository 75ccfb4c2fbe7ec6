"""Power caps of profiles: set while they run, put back afterwards, and the budget of the supply.

Level-triggered: every tick compares what should be in force with what the card reports, so that a restarted
worker, a rebooted card and a lost message all come right by themselves.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import structlog
from django.conf import settings
from django.db import transaction

from apps.audit.services import record
from apps.common.actors import PANEL
from apps.common.realtime import page_changed
from apps.deployments.models import LIVE, GpuReservation, PowerCap, Status
from apps.hardware.client import HardwareClient
from apps.hardware.protocol import HardwareError, Refused
from apps.profiles.models import ProfileVersion
from apps.rigs.models import Gpu, Rig
from apps.rigs.selectors import rig_here
from apps.telemetry.selectors import is_live, latest

log = structlog.get_logger(__name__)
TOLERANCE_WATTS = 1.0
# A supply runs for years at 85 % of its label; the rest of such a machine draws about 240 W (CPU, board, disks, fans).
SUPPLY_SHARE = 0.85
REST_WATTS = 240.0
# Restoring waits for the engine to be gone; a card that comes up is capped before it loads.
CAPPED = LIVE - {Status.PENDING}


@dataclass(frozen=True, slots=True)
class Change:
    """What to do to one card: set ``watts`` (``restore``: that is its own limit again)."""

    gpu_id: int
    watts: float
    restore: bool = False


def changes(
    wanted: dict[int, float], now: dict[int, float | None], kept: dict[int, tuple[float, float | None, str]]
) -> list[Change]:
    """Pure. ``wanted``: cap per card; ``now``: limit that each card reports; ``kept``: per card the cap that was set,
    the limit before and the refusal. A refused cap is not asked for again until another one is wanted."""
    found = []
    for gpu, watts in wanted.items():
        cap, _, refused = kept.get(gpu, (None, None, ""))
        limit = now.get(gpu)
        if limit is None or (refused and cap == watts):
            continue
        if abs(limit - watts) > TOLERANCE_WATTS:
            found.append(Change(gpu, watts))
    for gpu, (_, before, refused) in kept.items():
        if gpu not in wanted and now.get(gpu) is not None:
            found.append(Change(gpu, before if before is not None and not refused else 0.0, restore=True))
    return found


def wanted_caps(rig: Rig) -> dict[int, float]:
    """The lowest cap among those that run on each card, within the card's own bounds."""
    held = GpuReservation.objects.filter(
        rig=rig, released_at=None, gpu__isnull=False, replica__deployment__status__in=CAPPED
    ).select_related("gpu", "replica__deployment__version")
    wanted: dict[int, float] = {}
    for one in held:
        cap = one.replica.deployment.version.power_limit_watts
        if cap is None or one.gpu is None:
            continue
        least, most = one.gpu.power_limit_min_watts or 0.0, one.gpu.power_limit_max_watts or float(cap)
        watts = min(max(float(cap), least), most)
        wanted[one.gpu.pk] = min(watts, wanted.get(one.gpu.pk, watts))
    return wanted


def keep_caps(**_: object) -> None:
    """Receiver of the rig's tick."""
    rig = rig_here()
    wanted = wanted_caps(rig)
    kept = {c.gpu_id: c for c in PowerCap.objects.filter(gpu__rig=rig).select_related("gpu")}
    if not wanted and not kept:
        return
    frame = latest(rig.slug)
    if frame is None or not is_live(frame):
        return
    gpus = {g.pk: g for g in rig.gpus.all()}
    readings = frame.gpus
    now = {pk: readings.get(g.uuid, {}).get("power_limit_watts") for pk, g in gpus.items()}
    todo = changes(wanted, now, {pk: (c.watts, c.before_watts, c.refused) for pk, c in kept.items()})
    if not todo:
        return
    client = HardwareClient(settings.SAMPLER_SOCKET)
    try:
        for change in todo:
            _apply(client, gpus[change.gpu_id], change, kept.get(change.gpu_id), now[change.gpu_id])
    except HardwareError as error:
        log.warning("power limits cannot be set now", error=str(error))  # the next tick tries again
    finally:
        client.close()


def _apply(client: HardwareClient, gpu: Gpu, change: Change, kept: PowerCap | None, before: float | None) -> None:
    """Set it, then write it down; a worker killed between the two does the same again."""
    if change.restore:
        if change.watts:
            client.set_power_limit(gpu.uuid, change.watts)
        with transaction.atomic():
            PowerCap.objects.filter(gpu=gpu).delete()
            if change.watts:
                _tell(gpu, "power_cap.restore", f"GPU {gpu.index} may draw {change.watts:.0f} W again")
        return
    original = kept.before_watts if kept is not None and not kept.refused else before
    if kept is None:  # first the limit to put back, then the change
        PowerCap.objects.update_or_create(gpu=gpu, defaults={"watts": change.watts, "before_watts": original})
    answer: Refused | None = client.set_power_limit(gpu.uuid, change.watts)
    refused = answer.reason[:300] if answer else ""
    with transaction.atomic():
        PowerCap.objects.update_or_create(
            gpu=gpu, defaults={"watts": change.watts, "before_watts": original, "refused": refused}
        )
        if refused:
            _tell(gpu, "power_cap.refused", f"GPU {gpu.index} was to be capped at {change.watts:.0f} W. {refused}")
        else:
            _tell(gpu, "power_cap.set", f"GPU {gpu.index} is capped at {change.watts:.0f} W")


def _tell(gpu: Gpu, action: str, sentence: str) -> None:
    record(PANEL, action, "gpu", gpu.pk, f"GPU {gpu.index}", {"summary": sentence})
    page_changed("rig")


def power_warnings(version: ProfileVersion, rig: Rig, chosen: Collection[int]) -> tuple[str, ...]:
    """What the plan says about the supply, if this version ran on ``chosen`` cards beside what runs now, and about a
    cap that the driver refused."""
    cards = [g for g in rig.gpus.all() if g.present]
    told = tuple(
        f"The power cap is not in force: {c.refused}"
        for c in PowerCap.objects.filter(gpu_id__in=chosen).exclude(refused="")[:1]
        if version.power_limit_watts
    )
    if not chosen or not version.power_limit_watts or not rig.power_supply_watts:
        return told
    running = wanted_caps(rig)
    limits = [
        float(version.power_limit_watts) if g.pk in chosen else running.get(g.pk, g.power_limit_default_watts)
        for g in cards
    ]
    over = over_budget(rig.power_supply_watts, limits)
    return (*told, over) if over else told


def over_budget(supply_watts: float, limits: Iterable[float | None]) -> str:
    """A sentence when the cards' limits and the rest of the machine exceed what the supply carries for long."""
    known = [limit for limit in limits if limit is not None]
    if not known:
        return ""
    room = SUPPLY_SHARE * supply_watts - REST_WATTS
    if sum(known) <= room:
        return ""
    return (
        f"The cards may draw {sum(known):.0f} W together. With about {REST_WATTS:.0f} W for the rest that is more than "
        f"{SUPPLY_SHARE:.0%} of the {supply_watts:.0f} W supply; cap each of the {len(known)} cards at "
        f"{int(room / len(known) // 10 * 10)} W."
    )
