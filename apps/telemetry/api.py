"""Live and stored readings in the API."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import Any

from django.http import HttpRequest
from ninja import Router, Schema
from pydantic import Field

from apps.common.api import needs
from apps.common.roles import Role
from apps.rigs.models import Rig
from apps.rigs.selectors import gpu_list, rig_default, rig_get
from apps.telemetry import selectors

router = Router(tags=["telemetry"])
DEFAULT_RANGE = timedelta(hours=1)


class GpuReadingOut(Schema):
    """Null is "not reported". ``throttle`` names reasons that slow the card because something is wrong."""

    index: int | None
    uuid: str
    utilization_percent: float | None = None
    memory_used_bytes: int | None = None
    process_memory_bytes: int | None = None
    power_watts: float | None = None
    power_limit_watts: float | None = None
    temperature_celsius: float | None = None
    memory_temperature_celsius: float | None = None
    fan_percent: float | None = None
    sm_clock_mhz: float | None = None
    pcie_gen: int | None = None
    pcie_width: int | None = None
    nvlink_active_lanes: int | None = None
    nvlink_bytes_per_second: float | None = None
    throttle: str | None = None
    lost: bool = False


class HostReadingOut(Schema):
    cpu_percent: float | None = None
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None


class AlertOut(Schema):
    kind: str
    uuid: str


class LatestOut(Schema):
    """``at`` is null when nothing was read for an hour; ``stale`` says that the reading is old."""

    rig: str
    at: datetime | None
    age_s: float | None
    stale: bool
    gpus: list[GpuReadingOut]
    host: HostReadingOut
    alerts: list[AlertOut]


class SeriesOut(Schema):
    """``values[i]`` belongs to ``times[i]``; null where nothing is known."""

    gpu: int
    uuid: str
    values: list[float | None]


class HistoryOut(Schema):
    """``times`` are UTC seconds on one grid for all cards."""

    rig: str
    metric: str
    unit: str
    start: float
    end: float
    step_seconds: int
    times: list[int] = Field(description="UTC seconds since 1970")
    series: list[SeriesOut]


def _rig(reference: str | None) -> Rig:
    return rig_get(reference) if reference else rig_default()


@router.get("/telemetry/latest", response=LatestOut, auth=needs(Role.VIEWER), summary="The last live reading")
def latest(request: HttpRequest, rig: str | None = None) -> dict[str, Any]:
    here = _rig(rig)
    frame = selectors.latest(here.slug)
    empty: dict[str, Any] = {
        "rig": here.slug,
        "at": None,
        "age_s": None,
        "stale": True,
        "gpus": [],
        "host": {},
        "alerts": [],
    }
    if frame is None:
        return empty
    now = time.time()
    index = {gpu.uuid: gpu.index for gpu in gpu_list(here)}
    return empty | {
        "at": datetime.fromtimestamp(frame.at, UTC),
        "age_s": round(frame.age_seconds(now), 3),
        "stale": frame.is_stale(now),
        "gpus": [{"index": index.get(uuid), "uuid": uuid, **values} for uuid, values in frame.gpus.items()],
        "host": dict(frame.host),
        "alerts": [{"kind": kind, "uuid": uuid} for kind, uuid in frame.alerts],
    }


@router.get("/telemetry/history", response=HistoryOut, auth=needs(Role.VIEWER), summary="Stored means of a metric")
def history(
    request: HttpRequest,
    metric: str,
    gpu: int | None = None,
    start: datetime | None = None,
    end: datetime | None = None,
    points: int = 300,
    rig: str | None = None,
) -> dict[str, Any]:
    """The last hour unless ``start`` and ``end`` say otherwise (ISO 8601)."""
    here = _rig(rig)
    end = _aware(end) or datetime.now(UTC)
    start = _aware(start) or end - DEFAULT_RANGE
    found = selectors.history(here, metric, start=start, end=end, gpu=gpu, points=points)
    return {
        "rig": here.slug,
        "metric": found.metric,
        "unit": found.unit,
        "start": found.start,
        "end": found.end,
        "step_seconds": found.step_seconds,
        "times": list(found.times),
        "series": [{"gpu": s.gpu, "uuid": s.uuid, "values": list(s.values)} for s in found.series],
    }


def _aware(at: datetime | None) -> datetime | None:
    """Times without a zone are UTC."""
    return at.replace(tzinfo=UTC) if at is not None and at.tzinfo is None else at
