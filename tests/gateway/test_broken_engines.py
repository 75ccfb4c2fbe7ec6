"""Engines that do not speak HTTP, or not to its end: what their clients are told."""

from __future__ import annotations

import asyncio
import json
import socket
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest

from apps.deployments import routes
from apps.gateway import proxy
from tests.gateway.conftest import GatewayProcess, House
from tests.gateway.helpers import USAGE_EVENT, chat, events, until
from tests.gateway.test_observer import Recorder
from tests.gateway.test_streams import open_request, read_until

OK = b"HTTP/1.1 200 OK\r\n"
DEADLINE_S = 20.0


@dataclass
class RawEngine:
    """Answers everything with these bytes and closes."""

    wire: bytes
    key: str = "engine-key"
    port: int = 0

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        self.requests = 0
        self.listening = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        self.port = self.listening.sockets[0].getsockname()[1]

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        self.requests += 1
        writer.write(self.wire)
        with suppress(ConnectionError):
            await writer.drain()
        writer.close()

    async def release(self) -> None:
        pass

    async def stop(self) -> None:
        self.listening.close()


@pytest.mark.parametrize(
    ("wire", "status", "code"),
    [
        (OK + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", 502, "engine_error"),
        (OK + b"X: a\r\n b\r\n\r\n", 502, "engine_error"),
        (b"garbage\r\n\r\n", 502, "engine_error"),
        (b"HTTP/1.1 200 O", 502, "engine_died"),
        (b"", 502, "engine_died"),
    ],
)
def test_broken_answers_are_502_in_words(
    house: House, gateway: GatewayProcess, bobs_key: str, wire: bytes, status: int, code: str
) -> None:
    engine: Any = RawEngine(wire)
    house.loop.run(engine.start())
    house.engines.append(engine)
    house.serve(gateway, "coder", engine)
    answer = gateway.ask("POST", "/v1/chat/completions", chat("coder"), key=bobs_key)
    assert (answer.status, answer.error["code"]) == (status, code)
    assert engine.requests == 1


def test_an_answer_cut_off_in_its_body_is_seen_as_broken_and_not_as_short(
    house: House, gateway: GatewayProcess, bobs_key: str
) -> None:
    engine: Any = RawEngine(OK + b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
    house.loop.run(engine.start())
    house.engines.append(engine)
    house.serve(gateway, "coder", engine)
    raw = json.dumps(chat("coder")).encode()
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=DEADLINE_S) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer %b\r\ncontent-length: %d\r\n\r\n%b"
            % (bobs_key.encode(), len(raw), raw)
        )
        got = b""
        while part := connection.recv(65536):
            got += part
    assert b"hello" in got
    assert not got.endswith(b"0\r\n\r\n")


STREAM = OK + b"Content-Type: text/event-stream\r\n"


def raw_engine(house: House, wire: bytes) -> Any:
    engine: Any = RawEngine(wire)
    house.loop.run(engine.start())
    house.engines.append(engine)
    return engine


ROLE = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}\n\n'
TEXT = b'data: {"choices":[{"index":0,"delta":{"content":"Hi"},"finish_reason":null}]}\n\n'


@pytest.mark.parametrize(
    ("stream", "begun"),
    [
        (b": ping\n\n", False),
        (b": ping\n\ndata: {}\n\n", True),
        (ROLE + b"data: [DONE]\n\n", False),
        (ROLE + TEXT + b"data: [DONE]\n\n", True),
    ],
)
def test_a_streams_first_token_is_its_first_text_and_not_its_head_or_its_role(
    house: House, within: Any, bobs_key: str, stream: bytes, begun: bool
) -> None:
    recorder = Recorder()
    routes.open_to(house.deploy("coder", raw_engine(house, STREAM + b"\r\n" + stream)))
    gateway = within(recorder)
    house.applied(gateway)
    answer = gateway.ask("POST", "/v1/chat/completions", chat("coder", stream=True), key=bobs_key)
    assert answer.body == stream
    until(lambda: recorder.closed, "the end was not told")
    assert (recorder.closed[0].first_token_s is not None) is begun


def test_a_stream_whose_length_was_told_is_whole_without_the_figures(
    house: House, gateway: GatewayProcess, bobs_key: str
) -> None:
    *words, done = events("coder", 3)
    stream = b"".join([*words, USAGE_EVENT, done])
    house.serve(gateway, "coder", raw_engine(house, STREAM + b"Content-Length: %d\r\n\r\n%b" % (len(stream), stream)))
    answer = gateway.ask("POST", "/v1/chat/completions", chat("coder", stream=True), key=bobs_key)
    assert answer.body == b"".join([*words, done])


def waited_for(house: House, within: Any, key: str, wire: bytes, model: str = "coder") -> tuple[bytes, Any, Any]:
    """What a stream that began while it waited ends with, and its exchange, where the engine answers with ``wire``;
    and the gateway."""
    recorder = Recorder(slots=0)
    routes.open_to(house.deploy(model, raw_engine(house, wire)))
    gateway = within(recorder, comment_after_s=0.05, comment_every_s=0.05)
    house.applied(gateway)
    with open_request(gateway, key, chat(model, stream=True)) as connection:
        read_until(connection, b": waiting for a turn")
        house.loop.loop.call_soon_threadsafe(recorder.turn_over, None)
        got = read_until(connection, b"[DONE]")
    until(lambda: recorder.closed, "the end was not told")
    return got, recorder.closed[0], gateway


@pytest.mark.parametrize("body", [b"Hello", b"", b"null", b'{"choices":['])
def test_an_answer_that_is_neither_stream_nor_json_ends_a_stream_with_an_error(
    house: House, within: Any, bobs_key: str, body: bytes
) -> None:
    got, exchange, _ = waited_for(house, within, bobs_key, OK + b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
    assert b'"code": "engine_error"' in got
    assert b"data: null" not in got
    assert exchange.outcome == "engine_error"


def test_an_answer_that_is_no_stream_is_an_event_of_one_and_its_figures_count(
    house: House, within: Any, bobs_key: str
) -> None:
    body = b'{"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 7}}'
    got, exchange, _ = waited_for(house, within, bobs_key, OK + b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
    assert b"data: " + body + b"\n\n" in got
    assert (exchange.outcome, exchange.tokens_in, exchange.tokens_out) == ("ok", 5, 7)


@pytest.mark.parametrize("body", [b'{"error": {"message": "too long"}}', b"too long"])
def test_an_engines_refusal_within_a_stream_that_has_begun_is_no_success(
    house: House, within: Any, bobs_key: str, body: bytes
) -> None:
    """Its client got a 200 before, which stays in the ledger, and the refusal as an event."""
    wire = b"HTTP/1.1 400 Bad Request\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    got, exchange, gateway = waited_for(house, within, bobs_key, wire)
    assert b"too long" in got
    assert (exchange.outcome, exchange.status) == ("refused", 200)
    sample = 'rigpanel_gateway_requests_total{model="coder",outcome="refused",status="200"}'
    until(lambda: gateway.metric(sample) == 1, "it is not counted as refused")


def test_an_answer_that_is_no_stream_is_an_event_only_up_to_a_size(
    house: House, within: Any, bobs_key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy, "AS_EVENT_BYTES_MAX", 1000)
    for length, ends in ((1000, b"xxxx"), (1001, b'"code": "engine_error"')):
        body = b'{"x": "%b"}' % (b"x" * (length - 9))
        wire = OK + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
        got, exchange, _ = waited_for(house, within, bobs_key, wire, f"coder-{length}")
        assert len(body) == length
        assert ends in got
        assert (b"xxxx" in got) is (length == 1000)
        assert exchange.outcome == ("ok" if length == 1000 else "engine_error")
