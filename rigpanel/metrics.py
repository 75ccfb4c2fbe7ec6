"""``/metrics`` for Prometheus: this process, readiness, jobs, deployments and cards.

Open to scrapers on this machine and to signed-in people; a request that came through a proxy counts
as coming from outside, whatever address it carries.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from datetime import timedelta

from django.db.models import Count
from django.http import HttpRequest, HttpResponse
from django.utils import timezone
from django.views.decorators.http import require_safe
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, GCCollector, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from apps.common.access import public, role_of
from apps.common.errors import NotAllowed
from apps.deployments.models import Deployment
from apps.jobs.models import Job, JobState
from apps.telemetry.models import Sample
from rigpanel.health import parts

PROXY_HEADERS = {b"x-forwarded-for", b"x-real-ip", b"forwarded"}
LATEST_SAMPLE = timedelta(minutes=3)
CARD_GAUGES = {
    "utilization_percent": "Share of time in which a kernel ran.",
    "memory_used_bytes": "Card memory in use.",
    "power_watts": "Power draw.",
    "temperature_celsius": "Core temperature.",
    "memory_temperature_celsius": "Memory temperature.",
    "fan_percent": "Fan speed.",
    "sm_clock_mhz": "Clock of the multiprocessors.",
}


def came_from_this_machine(request: HttpRequest) -> bool:
    headers = {name.lower() for name, _ in getattr(request, "scope", {}).get("headers", [])}
    try:
        address = ipaddress.ip_address(request.META.get("REMOTE_ADDR", ""))
    except ValueError:
        return False
    return address.is_loopback and not headers & PROXY_HEADERS


@public
@require_safe
def metrics(request: HttpRequest) -> HttpResponse:
    if not came_from_this_machine(request) and role_of(request.user) is None:
        raise NotAllowed("Metrics are for scrapers on this machine and for people who are signed in.")
    return HttpResponse(generate_latest(registry()), content_type=CONTENT_TYPE_LATEST)


def registry() -> CollectorRegistry:
    found = CollectorRegistry()
    ProcessCollector(registry=found)
    GCCollector(registry=found)
    found.register(PanelCollector())
    return found


class PanelCollector(Collector):
    """Reads the database at each scrape; a card's value that is not reported has no line, never a zero."""

    def collect(self) -> Iterator[Metric]:
        yield _gauge(
            "rigpanel_part_ok", "Whether a part of the panel is well.", ["part"], [([p.name], p.ok) for p in parts()]
        )
        counts = {row["state"]: row["n"] for row in Job.objects.order_by().values("state").annotate(n=Count("pk"))}
        yield _gauge("rigpanel_jobs", "Jobs by state.", ["state"], [([s], counts.get(s, 0)) for s in JobState.values])
        deployments = Deployment.objects.order_by().values_list("status").annotate(n=Count("pk"))
        yield _gauge("rigpanel_deployments", "Deployments by status.", ["status"], [([s], n) for s, n in deployments])
        yield from _cards()


def _cards() -> Iterator[Metric]:
    newest: dict[tuple[str, str], Sample] = {}
    recent = Sample.objects.filter(at__gt=timezone.now() - LATEST_SAMPLE).select_related("rig").order_by("at")
    for sample in recent:
        newest[sample.rig.slug, sample.gpu_uuid] = sample
    for field, text in CARD_GAUGES.items():
        rows = [([rig, uuid], value) for (rig, uuid), s in newest.items() if (value := getattr(s, field)) is not None]
        yield _gauge(f"rigpanel_gpu_{field}", text, ["rig", "uuid"], rows)


def _gauge(name: str, text: str, labels: list[str], rows: list[tuple[list[str], float]]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=labels)
    for values, value in rows:
        family.add_metric(values, float(value))
    return family
