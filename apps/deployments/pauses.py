"""Cards that the guard took work from: who may load there again, and when.

A card that was stopped for heat is cool within seconds, and as hot again minutes after the next load. So nothing comes
there by itself (requests, the calendar, the way home, restarts) until the card has been read and well for ``PAUSE``; an
operator who has looked at it says so, with a switch or by lifting the pause. The time that nobody reads a card does not
count: only a look at its readings (``pauses_look``) ends a pause.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

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
from apps.telemetry.frames import STALE_AFTER_SECONDS

GAP = timedelta(seconds=STALE_AFTER_SECONDS)  # without a reading for longer, nobody knows how the card is


def paused_cards(rig: Rig) -> dict[int, PausedCard]:
    """By card id."""
    now = timezone.now()
    return {row.gpu_id: _fact(row, now) for row in CardPause.objects.filter(gpu__rig=rig).select_related("gpu")}


def _fact(row: CardPause, now: datetime) -> PausedCard:
    free_at = row.well_since + PAUSE if row.well_since else None
    return PausedCard(row.pk, row.gpu.index, row.why, row.at, free_at, is_read=now - row.read_at <= GAP)


def pause_words(cards: Iterable[PausedCard], rig: Rig) -> str:
    now, zone = timezone.now(), policy_of(rig).zone
    return "; ".join(card.words(now, zone) for card in cards)


@dataclass(frozen=True, slots=True)
class Shown:
    """A paused card for people: ``sentence`` says since when, why and for how long; ``free_at`` is None while nobody
    can tell."""

    id: int
    gpu: int
    why: str
    at: datetime
    free_at: datetime | None
    sentence: str


def paused_shown(rig: Rig) -> list[Shown]:
    found = sorted(paused_cards(rig).values(), key=lambda card: card.index)
    return [Shown(c.pk, c.index, c.why, c.at, c.expected_at, f"{pause_words([c], rig)}.") for c in found]


def pause_get(pk: int) -> CardPause:
    found = CardPause.objects.filter(pk=pk).select_related("gpu__rig").first()
    if found is None:
        raise NotFound("That card is not paused any more.")
    return found


def pause_card(gpu: Gpu, why: str, sentence: str) -> None:
    """From now on, also where it was paused already: it was in danger again."""
    now = timezone.now()
    with transaction.atomic():
        CardPause.objects.update_or_create(
            gpu=gpu, defaults={"at": now, "why": why, "well_since": None, "read_at": now}
        )
        record(PANEL, "card.pause", "gpu", gpu.pk, str(gpu), {"why": sentence})
        page_changed("policy", gpu=gpu.pk)


def pause_lift(pause: CardPause, *, actor: Actor) -> None:
    """An operator says that the card may serve again."""
    _end(pause, actor)


def pauses_look(pauses: Iterable[CardPause], looks: Mapping[int, Sequence[tuple[datetime, bool]]]) -> None:
    """End the pauses of cards that have been well for long enough.

    ``looks`` are, by card id and oldest first, the times of its last readings and whether nothing was wrong with it."""
    now = timezone.now()
    for row in pauses:
        since, read_at = _looked(row, looks[row.gpu_id], now)
        if since is not None and read_at - since >= PAUSE:
            _end(row, PANEL)
        elif (since, read_at) != (row.well_since, row.read_at):
            CardPause.objects.filter(pk=row.pk, at=row.at).update(well_since=since, read_at=read_at)
            if since != row.well_since:
                page_changed("policy", gpu=row.gpu_id)


def _looked(row: CardPause, looks: Sequence[tuple[datetime, bool]], now: datetime) -> tuple[datetime | None, datetime]:
    """Since when it has been well without a gap, and when it was last read.

    A time in the future is from before the clock was set."""
    since, read_at = row.well_since, row.read_at
    if read_at > now:
        since, read_at = None, now - GAP
    for at, well in looks:
        if not read_at < at <= now:
            continue
        before = since if at - read_at <= GAP else None
        since, read_at = (min(before or at, at) if well else None), at
    return (since if now - read_at <= GAP else None), read_at


def _end(pause: CardPause, actor: Actor) -> None:
    with transaction.atomic():
        if CardPause.objects.filter(pk=pause.pk, at=pause.at).delete()[0]:
            record(actor, "card.allow", "gpu", pause.gpu_id, str(pause.gpu), {"paused_at": pause.at.isoformat()})
            page_changed("policy", gpu=pause.gpu_id)
