"""Stored telemetry: means of ten seconds, rolled up to five minutes, pruned."""

from __future__ import annotations

import math
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any, cast

from django.db.models import Avg, Max, Sum
from django.utils import timezone

from apps.hardware.protocol import GpuReading, Reading
from apps.rigs.models import Rig
from apps.telemetry.frames import GPU_FIELDS
from apps.telemetry.models import Sample

FINE_SECONDS = 10
COARSE_SECONDS = 300
KEEP = {FINE_SECONDS: timedelta(days=2), COARSE_SECONDS: timedelta(days=90)}
MEANS = (
    "utilization_percent",
    "memory_used_bytes",
    "power_watts",
    "temperature_celsius",
    "memory_temperature_celsius",
    "fan_percent",
    "sm_clock_mhz",
    "nvlink_bytes_per_second",
)
_COLUMN = {name: GPU_FIELDS.index(name) for name in MEANS}
_WHOLE = frozenset({"memory_used_bytes"})


class SpanMeans:
    """Gathers frames of one span and gives the span's means when the next one begins."""

    def __init__(self, seconds: int = FINE_SECONDS) -> None:
        self._seconds = seconds
        self._span: int | None = None
        self._sums: dict[str, dict[str, tuple[float, int]]] = {}
        self._energy: dict[str, tuple[float, float]] = {}  # first and last counter of the span

    def add(self, reading: Reading, frame: dict[str, Any]) -> list[dict[str, Any]]:
        """Take one reading in; returns the finished span's rows (without the rig), mostly none."""
        span = math.floor(frame["at"] / self._seconds)
        finished: list[dict[str, Any]] = []
        if self._span is not None and span != self._span:
            finished = self._rows()
            # A span's energy runs to the first counter of the next, so that nothing falls between two.
            last = {u: (end, end) for u, (_, end) in self._energy.items()}
            self._sums, self._energy = {}, last if span == self._span + 1 else {}
        self._span = span
        for gpu, row in zip(reading.gpus, frame["gpus"], strict=True):
            self._add_card(gpu, row)
        return finished

    def _add_card(self, gpu: GpuReading, row: list[Any]) -> None:
        if gpu.lost:
            return
        sums = self._sums.setdefault(gpu.uuid, {})
        for name, column in _COLUMN.items():
            if row[column] is not None:
                total, count = sums.get(name, (0.0, 0))
                sums[name] = (total + row[column], count + 1)
        if gpu.energy_joules is not None:
            first, last = self._energy.get(gpu.uuid, (gpu.energy_joules, gpu.energy_joules))
            if gpu.energy_joules < last:  # the counter began anew with the driver
                first = gpu.energy_joules
            self._energy[gpu.uuid] = (first, gpu.energy_joules)

    def _rows(self) -> list[dict[str, Any]]:
        at = datetime.fromtimestamp((self._span or 0) * self._seconds, UTC)
        rows = []
        for uuid, sums in self._sums.items():
            means: dict[str, Any] = {name: total / count for name, (total, count) in sums.items()}
            means |= {name: round(means[name]) for name in _WHOLE if name in means}
            if uuid in self._energy:
                first, last = self._energy[uuid]
                means["energy_joules"] = last - first
            rows.append({"gpu_uuid": uuid, "at": at, "seconds": self._seconds, **means})
        return rows


def samples_store(rig_id: int, rows: Iterable[dict[str, Any]]) -> None:
    """Write finished spans. A span that is there already (the sampler was restarted within it) stays."""
    Sample.objects.bulk_create([Sample(rig_id=rig_id, **row) for row in rows], ignore_conflicts=True, batch_size=200)


def roll_up(rig: Rig, now: datetime | None = None) -> int:
    """Make the five-minute means of finished spans that have none. Safe to run twice. Returns how many rows."""
    end = _floor(now or timezone.now(), COARSE_SECONDS)
    fine = Sample.objects.filter(rig=rig, seconds=FINE_SECONDS)
    done = Sample.objects.filter(rig=rig, seconds=COARSE_SECONDS).aggregate(last=Max("at"))["last"]
    oldest = fine.order_by("at").values_list("at", flat=True).first()
    if oldest is None:
        return 0
    start = _floor(oldest, COARSE_SECONDS) if done is None else done + timedelta(seconds=COARSE_SECONDS)
    made = 0
    while start < end:
        stop = start + timedelta(seconds=COARSE_SECONDS)
        means = (
            fine.filter(at__gte=start, at__lt=stop)
            .values("gpu_uuid")
            .annotate(**{f"mean_{name}": Avg(name) for name in MEANS}, sum_energy=Sum("energy_joules"))
        )
        rows = []
        for mean in cast(Iterable[dict[str, Any]], means.order_by("gpu_uuid")):
            row: dict[str, Any] = {name: mean[f"mean_{name}"] for name in MEANS}
            row |= {name: None if row[name] is None else round(row[name]) for name in _WHOLE}
            energy = mean["sum_energy"]
            rows.append(
                {"gpu_uuid": mean["gpu_uuid"], "at": start, "seconds": COARSE_SECONDS, "energy_joules": energy, **row}
            )
        if rows:
            samples_store(rig.pk, rows)
            made += len(rows)
            start = stop
        else:  # a gap: the rig was off; go on where there is something
            later = fine.filter(at__gte=stop).order_by("at").values_list("at", flat=True).first()
            if later is None:
                break
            start = _floor(later, COARSE_SECONDS)
    return made


def prune(now: datetime | None = None) -> int:
    """Remove means that are older than they are kept. Returns how many."""
    now = now or timezone.now()
    return sum(Sample.objects.filter(seconds=seconds, at__lt=now - kept).delete()[0] for seconds, kept in KEEP.items())


def on_hourly(sender: object, rig_name: str, **_: Any) -> None:
    """The clock's hour on a rig: roll up its means, then prune."""
    rig = Rig.objects.filter(slug=rig_name).first()
    if rig is not None:
        roll_up(rig)
        prune()


def _floor(at: datetime, seconds: int) -> datetime:
    return datetime.fromtimestamp(math.floor(at.timestamp() / seconds) * seconds, UTC)
