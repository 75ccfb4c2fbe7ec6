"""The telemetry page: charts of stored means, with the range in the address."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from django.http import HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import render
from django.utils.dateparse import parse_datetime
from django.views.decorators.http import require_GET

from apps.common.access import role_required
from apps.common.errors import Invalid
from apps.common.roles import Role
from apps.rigs.selectors import gpus_in_slot_order, rig_default
from apps.telemetry import selectors
from apps.telemetry.selectors import METRICS

RANGES = {
    "15m": timedelta(minutes=15),
    "1h": timedelta(hours=1),
    "6h": timedelta(hours=6),
    "24h": timedelta(days=1),
    "7d": timedelta(days=7),
    "90d": timedelta(days=90),
}
DEFAULT_RANGE = "1h"
CHARTS = (
    ("power", "Power", "W"),
    ("temperature", "Temperature", "°C"),
    ("memory_temperature", "Memory temperature", "°C"),
    ("utilization", "Busy", "%"),
    ("memory", "Memory", "GiB"),
    ("nvlink", "NVLink traffic", "GB/s"),
)
POINTS = 360


@require_GET
@role_required(Role.VIEWER)
def page(request: HttpRequest) -> HttpResponse:
    """Charts of all cards, or of one (``gpu``) and one metric; the table below them says the same in numbers."""
    rig = rig_default()
    start, end, range_name = _range(request)
    wanted = request.GET.get("metric", "")
    charts = [c for c in CHARTS if c[0] == wanted] or list(CHARTS)
    gpu = _gpu(request)
    frame = selectors.latest(rig.slug)
    gpus = gpus_in_slot_order(rig)
    context = {
        "rig": rig,
        "charts": charts,
        "all_charts": CHARTS,
        "ranges": RANGES,
        "range": range_name,
        "metric": wanted if wanted in METRICS else "",
        "gpu": "" if gpu is None else gpu,
        "gpus": gpus,
        "rows": [(g, frame.gpus.get(g.uuid, {}) if frame else {}) for g in gpus],
        "is_live": selectors.is_live(frame),
        "seen_at": selectors.last_seen(rig, frame),
        "start": start.timestamp(),
        "end": end.timestamp(),
    }
    return render(request, "telemetry/page.html", context)


@require_GET
@role_required(Role.VIEWER)
def data(request: HttpRequest) -> HttpResponse:
    """One metric's history for the charts: ``{"times": [...], "series": [{"gpu": 0, "values": [...]}]}``."""
    start, end, _ = _range(request)
    try:
        found = selectors.history(
            rig_default(), request.GET.get("metric", "power"), start=start, end=end, gpu=_gpu(request), points=POINTS
        )
    except Invalid as error:
        return JsonResponse(
            {"error": {"code": error.code, "message": error.message, "fields": error.fields}}, status=error.status
        )
    series: list[dict[str, Any]] = [{"gpu": s.gpu, "values": s.values} for s in found.series]
    return JsonResponse(
        {
            "metric": found.metric,
            "unit": found.unit,
            "step_seconds": found.step_seconds,
            "times": found.times,
            "series": series,
        }
    )


def _range(request: HttpRequest) -> tuple[datetime, datetime, str]:
    """``start`` and ``end`` (ISO 8601 or seconds), or a named ``range`` that ends now."""
    start, end = _time(request.GET.get("start", "")), _time(request.GET.get("end", ""))
    if start is not None and end is not None and start < end:
        return start, end, ""
    name = request.GET.get("range", DEFAULT_RANGE)
    name = name if name in RANGES else DEFAULT_RANGE
    now = datetime.now(UTC)
    return now - RANGES[name], now, name


def _time(text: str) -> datetime | None:
    try:
        if text.replace(".", "", 1).isdecimal():
            return datetime.fromtimestamp(float(text), UTC)
        found = parse_datetime(text)
    except (ValueError, OverflowError, OSError):
        return None
    return found.replace(tzinfo=UTC) if found is not None and found.tzinfo is None else found


def _gpu(request: HttpRequest) -> int | None:
    text = request.GET.get("gpu", "")
    return int(text) if text.isdecimal() and len(text) < 4 else None
