"""Reads of live and stored telemetry."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import redis
from django.db.models import Avg, F, FloatField, IntegerField, Max, Sum
from django.db.models.functions import Cast

from apps.common.errors import Invalid
from apps.common.store import store
from apps.rigs.models import Rig
from apps.rigs.selectors import gpus_in_slot_order
from apps.telemetry.epoch import EpochSeconds
from apps.telemetry.frames import RING_LENGTH, Frame, latest_key, parse, ring_key
from apps.telemetry.models import Sample
from apps.telemetry.services import COARSE_SECONDS, FINE_SECONDS, KEEP

# What can be asked for, its unit and the column it is in. Energy is summed, everything else averaged.
METRICS: dict[str, tuple[str, str]] = {
    "utilization": ("%", "utilization_percent"),
    "memory": ("bytes", "memory_used_bytes"),
    "power": ("W", "power_watts"),
    "temperature": ("°C", "temperature_celsius"),
    "memory_temperature": ("°C", "memory_temperature_celsius"),
    "fan": ("%", "fan_percent"),
    "sm_clock": ("MHz", "sm_clock_mhz"),
    "nvlink": ("bytes/s", "nvlink_bytes_per_second"),
    "energy": ("J", "energy_joules"),
}
FINE_RANGE = timedelta(hours=6)
POINTS_MAX = 2000


def latest(rig_name: str) -> Frame | None:
    """The last live frame, however old; None when there is none or the store is down."""
    try:
        raw = store().get(latest_key(rig_name))
    except redis.RedisError:
        return None
    return parse(json.loads(str(raw))) if raw else None


def recent(rig_name: str, count: int = RING_LENGTH) -> list[Frame]:
    """The last frames at one per second, oldest first; empty when the store is down."""
    return live(rig_name, count)[1]


def live(rig_name: str, count: int = RING_LENGTH) -> tuple[Frame | None, list[Frame]]:
    """The latest frame and the ring in one round trip."""
    try:
        with store().pipeline(transaction=False) as pipe:
            pipe.get(latest_key(rig_name))
            pipe.lrange(ring_key(rig_name), -count, -1)
            raw, ring = pipe.execute()
    except redis.RedisError:
        return None, []
    return (parse(json.loads(raw)) if raw else None), [parse(json.loads(line)) for line in ring]


def last_seen(rig: Rig, frame: Frame | None) -> datetime | None:
    """When the cards were last read, from the frame, else from what was stored."""
    if frame is not None:
        return datetime.fromtimestamp(frame.at, UTC)
    at = Sample.objects.filter(rig=rig, seconds=FINE_SECONDS).aggregate(last=Max("at"))["last"]
    return at + timedelta(seconds=FINE_SECONDS) if at else rig.inventory_at


def is_live(frame: Frame | None) -> bool:
    return frame is not None and not frame.is_stale(time.time())


@dataclass(frozen=True, slots=True)
class Series:
    """One card's line; ``values[i]`` belongs to ``History.times[i]`` and is None where nothing is known."""

    gpu: int
    uuid: str
    values: tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class History:
    """``times`` are UTC seconds, ``step_seconds`` apart, on one grid for all cards."""

    metric: str
    unit: str
    start: float
    end: float
    step_seconds: int
    times: tuple[int, ...]
    series: tuple[Series, ...]


def history(
    rig: Rig, metric: str, *, start: datetime, end: datetime, gpu: int | None = None, points: int = 300
) -> History:
    """Stored means of a metric between two times, at most ``points`` per card.

    ``gpu`` is a card's index, None for all. Ranges over six hours, or older than two days, come from
    the five-minute means, with the newest hour from the ten-second ones. Raises Invalid.
    """
    if metric not in METRICS:
        raise Invalid(
            f"There is no metric {metric!r:.40}; there are {', '.join(METRICS)}.", fields={"metric": ["unknown"]}
        )
    if end <= start:
        raise Invalid("The end must be later than the start.", fields={"end": ["not later than start"]})
    if not 2 <= points <= POINTS_MAX:
        raise Invalid(f"Ask for 2 to {POINTS_MAX} points.", fields={"points": ["out of range"]})
    now = datetime.now(UTC)
    base = FINE_SECONDS if end - start <= FINE_RANGE and now - start < KEEP[FINE_SECONDS] else COARSE_SECONDS
    span = (end - start).total_seconds()
    step = base * max(1, -(-int(span) // (base * points)))
    first = int(start.timestamp()) // step * step
    times = tuple(range(first, max(first + 1, int(end.timestamp())), step))
    cards = [g for g in gpus_in_slot_order(rig) if gpu is None or g.index == gpu]
    if gpu is not None and not cards:
        raise Invalid(f"There is no GPU {gpu} on {rig}.", fields={"gpu": ["unknown"]})
    unit, column = METRICS[metric]
    found = _buckets(rig, column, [g.uuid for g in cards], start, end, step, base)
    series = tuple(Series(g.index, g.uuid, tuple(found.get((g.uuid, t)) for t in times)) for g in cards)
    return History(metric, unit, start.timestamp(), end.timestamp(), step, times, series)


def _buckets(
    rig: Rig, column: str, uuids: Sequence[str], start: datetime, end: datetime, step: int, base: int
) -> dict[tuple[str, int], float]:
    rows = Sample.objects.filter(rig=rig, gpu_uuid__in=uuids, at__gte=start - timedelta(seconds=base), at__lt=end)
    if base == FINE_SECONDS:
        return _grouped(rows.filter(seconds=FINE_SECONDS), column, step)
    coarse = rows.filter(seconds=COARSE_SECONDS)
    rolled = coarse.aggregate(last=Max("at"))["last"]
    found = _grouped(coarse, column, step)
    # What has not been rolled up yet is less than about an hour of fine rows.
    tail_from = start if rolled is None else rolled + timedelta(seconds=COARSE_SECONDS)
    tail = _grouped(rows.filter(seconds=FINE_SECONDS, at__gte=tail_from), column, step)
    return tail | found


def _grouped(rows: Any, column: str, step: int) -> dict[tuple[str, int], float]:
    how = Sum if column == "energy_joules" else Avg
    # Times are after 1970, so that casting to a whole number rounds the same way on both databases.
    bucket = Cast(EpochSeconds("at"), IntegerField()) / step * step
    grouped = (
        rows.exclude(**{column: None})
        .annotate(bucket=bucket)
        .values("gpu_uuid", "bucket")
        .annotate(value=how(Cast(F(column), FloatField())))
        .order_by()
    )
    return {(r["gpu_uuid"], int(r["bucket"])): float(r["value"]) for r in grouped}
