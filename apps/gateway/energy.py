"""What requests cost in energy: an estimate from the cards' own counters.

The joules of a deployment's cards in each ten seconds are shared among the requests that were under way there, by the
time each of them took of it: J × overlap / max(all overlaps, the span). One request that fills a fifth of the span gets
a fifth; twenty that fill it get a twentieth each. What cards use while nobody asks belongs to nobody, and the rest of
the machine (processor, fans, supply) is not measured.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from django.db import transaction
from django.utils import timezone

from apps.deployments.models import GpuReservation
from apps.gateway.ledger import DayKey, day_add, day_key
from apps.gateway.models import RUNNING, UsageRecord
from apps.telemetry.models import Sample
from apps.telemetry.services import FINE_SECONDS, KEEP

SETTLED_AFTER = timedelta(minutes=2)  # then every sample and every line has come in
LOOK_BACK = timedelta(hours=24)
LONGEST = timedelta(hours=2)  # how long before a span a request that reaches into it may have begun
BATCH = 2000


@dataclass(frozen=True, slots=True)
class Interval:
    """POSIX seconds."""

    of: int
    start: float
    end: float


def shares(spans: dict[int, float], intervals: Iterable[Interval], seconds: int = FINE_SECONDS) -> dict[int, float]:
    """Joules per interval's ``of``, from joules per span (by its start)."""
    overlaps: dict[int, list[tuple[int, float]]] = {}
    for one in intervals:
        span = int(one.start // seconds) * seconds
        while span < one.end:
            if span in spans:
                overlap = min(one.end, span + seconds) - max(one.start, span)
                if overlap > 0:
                    overlaps.setdefault(span, []).append((one.of, overlap))
            span += seconds
    found: dict[int, float] = {}
    for span, parts in overlaps.items():
        per_second = spans[span] / max(sum(overlap for _, overlap in parts), seconds)
        for of, overlap in parts:
            found[of] = found.get(of, 0.0) + per_second * overlap
    return found


def attribute(now: datetime | None = None) -> int:
    """Give finished requests of the last day their energy, each once. Returns how many got theirs."""
    now = now or timezone.now()
    since = max(now - LOOK_BACK, now - KEEP[FINE_SECONDS])
    waiting = UsageRecord.objects.filter(
        at__gte=since, at__lt=now - SETTLED_AFTER, energy_joules=None, deployment_id__isnull=False, duration_ms__gt=0
    )
    done = 0
    for deployment_id in list(waiting.order_by().values_list("deployment_id", flat=True).distinct()):
        assert deployment_id is not None  # noqa: S101 - filtered above
        done += _attribute(deployment_id, waiting.filter(deployment_id=deployment_id), now)
    return done


def on_hourly(sender: object, **_: Any) -> None:
    attribute()


def _attribute(deployment_id: int, waiting: Any, now: datetime) -> int:
    cards = _cards(deployment_id)
    if not cards:
        return 0  # on the processor, or before cards were reserved: not measured
    done = 0
    while True:
        rows = [r for r in waiting.order_by("at")[:BATCH] if _ends_at(r) < (now - SETTLED_AFTER).timestamp()]
        if not rows:
            return done
        first, last = rows[0].at, max(_ends_at(row) for row in rows)
        spans = _spans(cards, first, datetime.fromtimestamp(last, tz=first.tzinfo))
        others = UsageRecord.objects.filter(
            deployment_id=deployment_id, at__gte=first - LONGEST, at__lte=datetime.fromtimestamp(last, tz=first.tzinfo),
            duration_ms__gt=0,
        ).exclude(outcome=RUNNING)  # fmt: skip
        intervals = [
            Interval(pk, at.timestamp(), at.timestamp() + (ms or 0) / 1000)
            for pk, at, ms in others.values_list("pk", "at", "duration_ms").iterator()
        ]
        joules = shares(spans, intervals)
        done += _store(rows, joules)


def _store(rows: list[UsageRecord], joules: dict[int, float]) -> int:
    """Records and their days in one transaction; the conditional UPDATE sees to it that each counts once."""
    done = 0
    with transaction.atomic():
        days: dict[DayKey, float] = {}
        for row in rows:
            amount = joules.get(row.pk, 0.0)
            if UsageRecord.objects.filter(pk=row.pk, energy_joules=None).update(energy_joules=amount):
                done += 1
                days[day_key(row)] = days.get(day_key(row), 0.0) + amount
        for key in sorted(days, key=str):
            day_add(key, {"energy_joules": days[key]})
    return done


def _cards(deployment_id: int) -> list[tuple[int, str]]:
    reserved = GpuReservation.objects.filter(replica__deployment_id=deployment_id, gpu__isnull=False)
    return list(reserved.values_list("rig_id", "gpu__uuid").distinct())


def _spans(cards: list[tuple[int, str]], start: datetime, end: datetime) -> dict[int, float]:
    rig_ids, uuids = {rig for rig, _ in cards}, {uuid for _, uuid in cards}
    samples = Sample.objects.filter(
        rig_id__in=rig_ids, gpu_uuid__in=uuids, seconds=FINE_SECONDS, energy_joules__isnull=False,
        at__gte=start - timedelta(seconds=FINE_SECONDS), at__lte=end,
    )  # fmt: skip
    found: dict[int, float] = {}
    for at, joules in samples.values_list("at", "energy_joules").iterator():
        span = int(at.timestamp())
        found[span] = found.get(span, 0.0) + (joules or 0.0)
    return found


def _ends_at(row: UsageRecord) -> float:
    return float(row.at.timestamp() + (row.duration_ms or 0) / 1000)
