"""Cards that the guard took work from: who may load there again, and when.

A card that was stopped for heat is cool within seconds, and as hot again minutes after the next load. So nothing comes
there by itself (requests, the calendar, the way home, restarts) until the card has been well for ``PAUSE``; an operator
who has looked at it says so, with a switch or by lifting the pause.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime

from django.db import transaction
from django.utils import timezone

from apps.audit.services import record
from apps.common.actors import PANEL, Actor
from apps.common.errors import NotFound
from apps.common.realtime import page_changed
from apps.deployments.models import CardPause
from apps.deployments.policies.decide import PAUSE, PausedCard
from apps.deployments.policies.selectors import policy_of
from apps.rigs.models import Gpu, Rig


def paused_cards(rig: Rig) -> dict[int, PausedCard]:
    """By card id; without those whose time is over."""
    now = timezone.now()
    found = {row.gpu_id: _fact(row) for row in CardPause.objects.filter(gpu__rig=rig).select_related("gpu")}
    return {gpu: card for gpu, card in found.items() if card.free_at is None or card.free_at > now}


def _fact(row: CardPause) -> PausedCard:
    return PausedCard(row.pk, row.gpu.index, row.why, row.at, row.well_since + PAUSE if row.well_since else None)


def pause_words(cards: Iterable[PausedCard], rig: Rig) -> str:
    now, zone = timezone.now(), policy_of(rig).zone
    return "; ".join(card.words(now, zone) for card in cards)


@dataclass(frozen=True, slots=True)
class Shown:
    """A paused card for people: ``sentence`` says since when, why and for how long."""

    id: int
    gpu: int
    why: str
    at: datetime
    free_at: datetime | None
    sentence: str


def paused_shown(rig: Rig) -> list[Shown]:
    found = sorted(paused_cards(rig).values(), key=lambda card: card.index)
    return [Shown(c.pk, c.index, c.why, c.at, c.free_at, f"{pause_words([c], rig)}.") for c in found]


def pause_get(pk: int) -> CardPause:
    found = CardPause.objects.filter(pk=pk).select_related("gpu__rig").first()
    if found is None:
        raise NotFound("That card is not paused any more.")
    return found


def pause_card(gpu: Gpu, why: str, sentence: str) -> None:
    """From now on, also where it was paused already: it was in danger again."""
    with transaction.atomic():
        CardPause.objects.update_or_create(gpu=gpu, defaults={"at": timezone.now(), "why": why, "well_since": None})
        record(PANEL, "card.pause", "gpu", gpu.pk, str(gpu), {"why": sentence})
        page_changed("policy", gpu=gpu.pk)


def pause_lift(pause: CardPause, *, actor: Actor) -> None:
    """An operator says that the card may serve again."""
    _end(pause, actor)


def pauses_look(pauses: Iterable[CardPause], well: Mapping[int, bool]) -> None:
    """``well`` says of each card that was read now whether nothing is wrong with it.

    A time in the future is from before the clock was set."""
    now = timezone.now()
    for row in pauses:
        if row.gpu_id not in well:
            continue
        since = (row.well_since or now) if well[row.gpu_id] else None
        since = min(since, now) if since else None
        if since is not None and now - since >= PAUSE:
            _end(row, PANEL)
        elif since != row.well_since:
            CardPause.objects.filter(pk=row.pk).update(well_since=since)
            page_changed("policy", gpu=row.gpu_id)


def _end(pause: CardPause, actor: Actor) -> None:
    with transaction.atomic():
        if CardPause.objects.filter(pk=pause.pk, at=pause.at).delete()[0]:
            record(actor, "card.allow", "gpu", pause.gpu_id, str(pause.gpu), {"paused_at": pause.at.isoformat()})
            page_changed("policy", gpu=pause.gpu_id)
