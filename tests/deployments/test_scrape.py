"""What engines say about themselves, and when open pages hear of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from channels.layers import get_channel_layer

from apps.common.realtime import PAGES_GROUP
from apps.deployments.models import Deployment, GatewayProcess, Replica
from apps.deployments.scrape import engine_facts, scrape
from tests.factories.profiles import simulated_profile
from tests.telemetry.conftest import live_store, valkey_server

__all__ = ["live_store", "valkey_server"]


class Metrics(BaseHTTPRequestHandler):
    """An engine that is idle: the same numbers whenever one asks."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"vllm:num_requests_running 0\nvllm:num_requests_waiting 0\nvllm:kv_cache_usage_perc 0.25\n")

    def log_message(self, *_: Any) -> None:
        return


@pytest.fixture
def engine_url() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Metrics)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def deployment(rig: Any, engine_url: str) -> Deployment:
    version = simulated_profile("coder", tp=2).current
    made = Deployment.objects.create(rig=rig, version=version, served_name="coder", status="ready", desired="serving")
    Replica.objects.create(
        deployment=made, index=0, launch_id="coder", host="127.0.0.1", port=int(engine_url.rpartition(":")[2]),
        base_url=engine_url, engine_key="k", healthy=True,
    )  # fmt: skip
    return made


@pytest.fixture
def heard(settings: Any) -> Iterator[Any]:
    """``heard()``: how many messages open pages got since the last call."""
    # In memory also where the suite runs on Redis: what is counted is what was sent, not how it travels.
    settings.CHANNEL_LAYERS = {"default": {"BACKEND": "channels.layers.InMemoryChannelLayer"}}
    layer: Any = get_channel_layer()
    async_to_sync(layer.group_add)(PAGES_GROUP, "test.page")

    def count() -> int:
        queue = layer.channels.get("test.page")
        found = 0
        while queue is not None and not queue.empty():
            queue.get_nowait()
            found += 1
        return found

    yield count
    async_to_sync(layer.group_discard)(PAGES_GROUP, "test.page")


@pytest.mark.django_db(transaction=True)
def test_open_pages_hear_when_an_answer_ends_though_the_engine_has_long_said_so(
    rig: Any, deployment: Deployment, live_store: Any, heard: Any
) -> None:
    """Gateways report their counts seconds after the engine's; the page went on saying "1 stream" for ever."""
    gateway = GatewayProcess.objects.create(key="elsewhere:1:1", in_flight={str(deployment.pk): 1})
    scrape(rig.slug)
    assert heard() == 1
    scrape(rig.slug)
    assert heard() == 0  # nothing changed
    GatewayProcess.objects.filter(pk=gateway.pk).update(in_flight={})
    scrape(rig.slug)
    assert heard() == 1


@pytest.mark.django_db(transaction=True)
def test_what_an_engine_says_is_kept_for_the_page(rig: Any, deployment: Deployment, live_store: Any) -> None:
    scrape(rig.slug)
    facts = engine_facts([deployment.pk])[deployment.pk]
    assert facts.kv_cache_usage_ratio == 0.25
    assert facts.generation_tokens_per_second is None  # never reported: not 0
