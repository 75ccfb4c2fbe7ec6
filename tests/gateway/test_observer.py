"""What a ledger, a quota and a queue see and may do."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from apps.deployments import routes
from apps.gateway import errors
from apps.gateway.observer import Exchange, Observer
from tests.gateway.conftest import House
from tests.gateway.helpers import chat, until
from tests.gateway.test_streams import open_request, read_until

pytestmark = pytest.mark.django_db(transaction=True)
CHAT = "/v1/chat/completions"


class Recorder(Observer):
    """Writes down what it is told. ``slots``: how many may be at engines at once."""

    def __init__(self, slots: int = 1000) -> None:
        self.told: list[str] = []
        self.closed: list[Exchange] = []
        self.slots = slots
        self.queue: list[asyncio.Future[None]] = []
        self.refuse = False

    def admit(self, exchange: Exchange) -> None:
        self.told.append("admit")
        exchange.answer_headers.append((b"x-ratelimit-limit-requests", b"60"))
        if self.refuse:
            raise errors.GatewayError(429, "rate_limit_exceeded", "Too many requests.", retry_after_s=7)

    def open(self, exchange: Exchange) -> None:
        self.told.append("open")

    def turn(self, exchange: Exchange) -> asyncio.Future[None] | None:
        self.told.append("turn")
        if self.slots:
            self.slots -= 1
            return None
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.queue.append(future)
        return future

    def turn_over(self, exchange: Exchange) -> None:
        self.told.append("turn_over")
        self.slots += 1
        while self.queue:
            future = self.queue.pop(0)
            if not future.done():
                self.slots -= 1
                future.set_result(None)
                return

    def close(self, exchange: Exchange) -> None:
        self.told.append("close")
        self.closed.append(exchange)


def test_a_request_is_seen_from_its_admission_to_its_end(house: House, within: Any, bobs_key: str, bob: Any) -> None:
    recorder = Recorder()
    deployment = house.deploy("coder", house.engine("coder"))
    routes.open_to(deployment)
    gateway = within(recorder)
    house.applied(gateway)

    answer = gateway.ask("POST", CHAT, chat("coder"), key=bobs_key)

    until(lambda: recorder.closed, "the end was not told")
    until(lambda: "turn_over" in recorder.told, "the turn was not given back")
    assert recorder.told[:3] == ["admit", "open", "turn"]
    assert sorted(recorder.told[3:]) == ["close", "turn_over"]
    seen = recorder.closed[0]
    assert (seen.user_id, seen.key_owner_id, seen.model, seen.asked_model) == (bob.pk, bob.pk, "coder", "coder")
    assert (seen.deployment_id, seen.version_id) == (deployment.pk, deployment.version_id)
    assert (seen.status, seen.outcome, seen.path) == (200, "ok", CHAT)
    assert abs(seen.began_at - time.time()) < 60
    assert seen.first_token_s is not None
    assert seen.duration_s is not None
    assert 0 < seen.first_token_s <= seen.duration_s
    assert answer.headers["x-ratelimit-limit-requests"] == "60"


def test_what_is_not_admitted_is_neither_opened_nor_forwarded(house: House, within: Any, bobs_key: str) -> None:
    recorder = Recorder()
    recorder.refuse = True
    engine = house.engine("coder")
    routes.open_to(house.deploy("coder", engine))
    gateway = within(recorder)
    house.applied(gateway)
    answer = gateway.ask("POST", CHAT, chat("coder"), key=bobs_key)
    assert (answer.status, answer.error["code"], answer.headers["retry-after"]) == (429, "rate_limit_exceeded", "7")
    assert answer.headers["x-ratelimit-limit-requests"] == "60"
    assert recorder.told == ["admit"]
    assert engine.received == []


def test_requests_wait_for_their_turn_and_streams_are_kept_alive(house: House, within: Any, bobs_key: str) -> None:
    recorder = Recorder(slots=1)
    engine = house.engine("coder")
    routes.open_to(house.deploy("coder", engine))
    gateway = within(recorder, comment_after_s=0.05, comment_every_s=0.05)
    house.applied(gateway)
    first = open_request(gateway, bobs_key, chat("coder", stream=True, gate=True))
    read_until(first, b"t0")
    second = open_request(gateway, bobs_key, chat("coder", stream=True))
    read_until(second, b": waiting for a turn at coder")
    leaves = open_request(gateway, bobs_key, chat("coder"))
    until(lambda: len(recorder.queue) == 2, "the third does not queue")
    leaves.close()
    until(lambda: len(recorder.closed) == 1, "nobody saw that it left")
    assert recorder.closed[0].outcome == "client_gone"
    assert len(engine.received) == 1

    house.loop.run(engine.release())
    read_until(first, b"[DONE]")
    read_until(second, b"[DONE]")
    until(lambda: len(recorder.closed) == 3, "not all ends were told")
    until(lambda: recorder.slots == 1, "a turn was not given back")
    assert recorder.told.count("turn_over") == 2
    first.close()
    second.close()


def test_how_it_ended_is_told(house: House, within: Any, bobs_key: str) -> None:
    recorder = Recorder()
    routes.open_to(house.deploy("coder", house.engine("coder")))
    gateway = within(recorder)
    house.applied(gateway)
    ends = [
        (chat("coder", script="status", status=400), 400, "refused"),
        (chat("coder", script="die_before"), 502, "engine_died"),
        (chat("coder", script="die_within", stream=True), 200, "engine_died"),
        (chat("nothing"), 404, "model_not_found"),
    ]
    for number, (body, status, outcome) in enumerate(ends):
        gateway.ask("POST", CHAT, body, key=bobs_key)
        until(lambda n=number: len(recorder.closed) == n + 1, "the end was not told")  # type: ignore[misc]
        assert (recorder.closed[-1].status, recorder.closed[-1].outcome) == (status, outcome)

    def uncounted() -> list[str]:
        told = gateway.ask("GET", "/metrics").body.decode()
        return [outcome for _, status, outcome in ends if f'outcome="{outcome}",status="{status}"' not in told]

    until(lambda: uncounted() == [], "the counters tell another end than the ledger")
