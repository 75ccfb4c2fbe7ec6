"""What the gateway tells Prometheus."""

from __future__ import annotations

import time
from collections.abc import Iterable

import psutil
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from apps.gateway.client import BodyBudget
from apps.gateway.keys import KeyCache
from apps.gateway.routes import RouteCache

NO_MODEL = ""
DURATION_BUCKETS_S = (0.005, 0.02, 0.1, 0.5, 2, 10, 30, 120, 600)


class Metrics:
    """Labels come from the routes, never from a client's text, so their number stays small."""

    def __init__(self, routes: RouteCache, keys: KeyCache, budget: BodyBudget) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "rigpanel_gateway_requests", "Answered requests.", ["model", "status", "outcome"], registry=self.registry
        )
        self.duration = Histogram(
            "rigpanel_gateway_request_duration_seconds",
            "From a request's head to its answer's end.",
            ["model"],
            buckets=DURATION_BUCKETS_S,
            registry=self.registry,
        )
        self.registry.register(_State(routes, keys, budget))

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _State(Collector):
    """Read when asked, so that the hot path keeps no gauges."""

    def __init__(self, routes: RouteCache, keys: KeyCache, budget: BodyBudget) -> None:
        self._routes = routes
        self._keys = keys
        self._budget = budget

    def collect(self) -> Iterable[Metric]:
        in_flight = GaugeMetricFamily(
            "rigpanel_gateway_in_flight", "Requests under way at engines.", labels=["deployment"]
        )
        for deployment_id, count in sorted(self._routes.in_flight().items()):
            in_flight.add_metric([str(deployment_id)], count)
        yield in_flight
        yield _gauge("rigpanel_gateway_waiting", "Requests that wait for a model.", self._routes.waiting)
        yield _gauge("rigpanel_gateway_keys", "Keys that may be used.", len(self._keys))
        yield _gauge("rigpanel_gateway_routes", "Models with a route.", len(self._routes.names()))
        yield _gauge("rigpanel_gateway_body_bytes", "Request bodies in memory.", self._budget.held_bytes)
        yield _gauge("rigpanel_gateway_resident_memory_bytes", "Resident memory.", psutil.Process().memory_info().rss)
        epochs = GaugeMetricFamily("rigpanel_gateway_epoch", "The applied epochs.", labels=["name"])
        for name, epoch in (("routes", self._routes.epoch), ("keys", self._keys.epoch)):
            if epoch is not None:
                epochs.add_metric([name], epoch)
        yield epochs
        if self._routes.confirmed_at is not None:
            age_s = time.monotonic() - self._routes.confirmed_at
            yield _gauge("rigpanel_gateway_routes_age_seconds", "Since the routes were last confirmed.", age_s)


def _gauge(name: str, text: str, value: float) -> Metric:
    gauge = GaugeMetricFamily(name, text)
    gauge.add_metric([], value)
    return gauge
