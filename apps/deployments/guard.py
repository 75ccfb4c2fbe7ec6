"""Stops what runs on a card that is too hot or gone, before the hardware does it in its own way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import structlog

from apps.common.actors import PANEL
from apps.common.errors import Conflict
from apps.deployments.models import COMING_UP, LIVE, CardPause, Deployment, GpuReservation, Status
from apps.deployments.pauses import pause_card, pauses_look
from apps.deployments.services import stop_request
from apps.jobs.models import LIVE_STATES, Job
from apps.rigs.models import Gpu
from apps.rigs.selectors import rig_here
from apps.telemetry.frames import Frame
from apps.telemetry.selectors import is_live, recent

log = structlog.get_logger(__name__)
HOT_SECONDS = 8  # the fan and the card's own brake get this long
LOST_SECONDS = 3  # one reading may fail
GOING = frozenset({Status.DRAINING, Status.STOPPING})


@dataclass(frozen=True, slots=True)
class Danger:
    """``why`` is the same in a few words that follow the card's name."""

    gpu_index: int
    sentence: str
    why: str


def danger(card: Gpu, readings: Sequence[Mapping[str, Any]]) -> Danger | None:
    """Pure: what ``readings`` (one a second, oldest first) of a card say. Critical is the temperature at which the card
    slows itself down in hardware (95 °C on a 3090, 3 °C below its shutdown): a card that stays there is not cooled."""
    lately = readings[-LOST_SECONDS:]
    if len(lately) == LOST_SECONDS and all(r.get("lost") for r in lately):
        return Danger(
            card.index,
            f"GPU {card.index} fell off the bus. Switch the machine off at the supply, then look at the card's cables.",
            "fell off the bus",
        )
    critical = card.temperature_slowdown_celsius
    lately = readings[-HOT_SECONDS:]
    degrees = [r.get("temperature_celsius") for r in lately]
    if critical is None or len(lately) < HOT_SECONDS or any(d is None or d < critical for d in degrees):
        return None
    return Danger(
        card.index,
        f"GPU {card.index} has been at {degrees[-1]:.0f} °C, over its critical {critical} °C, for {HOT_SECONDS} s. "
        "Check its fan and the air between the cards before it is used again.",
        "was stopped for heat",
    )


def is_well(card: Gpu, reading: Mapping[str, Any]) -> bool:
    """Pure: whether nothing is wrong with a card at this moment; not while nobody can tell."""
    if reading.get("lost"):
        return False
    critical, degrees = card.temperature_slowdown_celsius, reading.get("temperature_celsius")
    return critical is None or (degrees is not None and degrees < critical)


def looks(card: Gpu, frames: Sequence[Frame]) -> list[tuple[datetime, bool]]:
    """When it was read, and whether it was well."""
    return [(datetime.fromtimestamp(f.at, UTC), is_well(card, f.gpus.get(card.uuid, {"lost": 1}))) for f in frames]


def dangers(cards: Sequence[Gpu], frames: Sequence[Frame]) -> dict[int, Danger]:
    """Per card id. Nothing without fresh frames: an old reading stops nobody's work."""
    if not frames or not is_live(frames[-1]):
        return {}
    readings = [frame.gpus for frame in frames]
    found = {}
    for card in cards:
        # A driver that was loaded anew does not list a card that is gone.
        seen = danger(card, [r.get(card.uuid, {"lost": 1}) for r in readings])
        if seen is not None:
            found[card.pk] = seen
    return found


def _told_already(deployment: Deployment) -> bool:
    """Its start, or its return, was cancelled a moment ago and goes its way."""
    starting = Job.objects.filter(pk=deployment.job_id, state__in=LIVE_STATES).first() if deployment.job_id else None
    if starting is None or deployment.status not in COMING_UP or starting.cancel_requested_at is None:
        return False
    return starting.failure is None or starting.undo_cancel_at is not None


def guard(**_: object) -> None:
    """Receiver of the rig's tick."""
    rig = rig_here()
    held = list(
        GpuReservation.objects.filter(
            rig=rig, released_at=None, gpu__isnull=False, replica__deployment__status__in=LIVE - GOING
        ).select_related("gpu", "replica__deployment__version__profile")
    )
    pauses = list(CardPause.objects.filter(gpu__rig=rig).select_related("gpu"))
    if not held and not pauses:
        return
    frames = recent(rig.slug, HOT_SECONDS + 2)
    pauses_look(pauses, {p.gpu_id: looks(p.gpu, frames) for p in pauses})
    cards = {r.gpu.pk: r.gpu for r in held if r.gpu is not None}
    found = dangers(list(cards.values()), frames)
    if not found:
        return
    asked = set()
    for reservation in held:
        deployment = reservation.replica.deployment
        seen = found.get(reservation.gpu_id or 0)
        if seen is None or deployment.pk in asked:
            continue
        asked.add(deployment.pk)
        under_way = Job.objects.filter(
            kind="stop", state__in=LIVE_STATES, params={"deployment_id": deployment.pk}, cancel_requested_at=None
        )
        if under_way.exists() or _told_already(deployment):
            continue
        log.warning("a card is in danger", gpu=seen.gpu_index, deployment=deployment.pk)
        its = {r.gpu_id for r in held if r.gpu_id is not None and r.replica.deployment_id == deployment.pk}
        for card_id in its & found.keys():
            # Before it is stopped: whoever asks for a model in that moment must not get it loaded there again.
            pause_card(cards[card_id], found[card_id].why, found[card_id].sentence)
        try:
            # A pin says who may want another model, not that a card may burn; passing over it is recorded.
            stop_request(deployment=deployment, actor=PANEL, reason=seen.sentence, override=True)
        except Conflict:
            continue  # it ended in this moment
