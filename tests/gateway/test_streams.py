"""Clients that leave, engines that die, readers that do not read."""

from __future__ import annotations

import json
import re
import socket
from typing import Any

import openai
import pytest

from apps.deployments import routes
from apps.deployments.models import Replica
from tests.gateway.conftest import GatewayProcess, House
from tests.gateway.helpers import Engine, chat, events, free_port, raw_exchange, until

pytestmark = pytest.mark.django_db(transaction=True)
CHAT = "/v1/chat/completions"


def open_request(gateway: Any, key: str, body: dict[str, Any]) -> socket.socket:
    """A request on its way; the caller reads, or does not."""
    connection = socket.create_connection(("127.0.0.1", gateway.port), timeout=60)
    connection.sendall(request_bytes(key, body))
    return connection


def request_bytes(key: str, body: dict[str, Any]) -> bytes:
    raw = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nContent-Length: {len(raw)}\r\n\r\n"
    return head.encode() + raw


def read_until(connection: socket.socket, wanted: bytes) -> bytes:
    got = b""
    while wanted not in got:
        part = connection.recv(65536)
        assert part, f"the connection ended before {wanted!r}: {got[-300:]!r}"
        got += part
    return got


def nothing_runs(gateway: Any) -> None:
    until(
        lambda: b"rigpanel_gateway_in_flight{" not in gateway.ask("GET", "/metrics").body,
        "requests are still counted as under way",
    )


def in_mid_stream(house: House, gateway: GatewayProcess, key: str) -> tuple[Engine, socket.socket]:
    """An engine that has said its first token and goes on once it is let, and the connection of its client."""
    engine = house.engine("coder")
    house.serve(gateway, "coder", engine)
    connection = open_request(gateway, key, chat("coder", stream=True, gate=True))
    read_until(connection, b"t0")
    return engine, connection


def leave(connection: socket.socket, engine: Engine, gateway: GatewayProcess) -> None:
    """The client goes, and the engine works for nobody."""
    connection.close()
    until(lambda: engine.abandoned == 1, "the engine was not told that the client left")
    nothing_runs(gateway)


def test_a_client_that_leaves_in_mid_stream_stops_the_engine(
    house: House, gateway: GatewayProcess, bobs_key: str
) -> None:
    engine, connection = in_mid_stream(house, gateway, bobs_key)
    leave(connection, engine, gateway)


def test_a_client_that_leaves_before_the_first_token_stops_the_engine(
    house: House, gateway: GatewayProcess, bobs_key: str
) -> None:
    engine = house.engine("coder")
    house.serve(gateway, "coder", engine)
    connection = open_request(gateway, bobs_key, chat("coder", script="hang"))
    until(lambda: engine.running == 1, "the request did not arrive")
    leave(connection, engine, gateway)


def test_a_client_that_pipelines_a_second_request_and_leaves_stops_the_first(
    house: House, gateway: GatewayProcess, bobs_key: str
) -> None:
    engine, connection = in_mid_stream(house, gateway, bobs_key)
    connection.sendall(request_bytes(bobs_key, chat("coder")))
    leave(connection, engine, gateway)


def test_pipelined_requests_are_answered_in_turn(house: House, gateway: GatewayProcess, bobs_key: str) -> None:
    house.serve(gateway, "coder", house.engine("coder"))
    connection = open_request(gateway, bobs_key, chat("coder", stream=True, chunks=50))
    connection.sendall(request_bytes(bobs_key, chat("coder")))
    got = read_until(connection, b'chat.completion",')
    assert got.index(b"[DONE]") < got.rindex(b"HTTP/1.1 200")
    connection.close()


NO_REQUEST = b"this is no request\r\n\r\n"
BROKEN_BODY = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nno length\r\n".encode()
UPGRADE = b"POST / HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: h2c\r\nContent-Length: 2\r\n\r\n{}"
LONG_HEAD = b"GET /healthz HTTP/1.1\r\nX: " + b"x" * 2**17


def answers(got: bytes) -> list[bytes]:
    """From their status on."""
    return re.split(rb"HTTP/1\.1 (?=\d{3} )", got)[1:]


@pytest.mark.parametrize("wrong", [NO_REQUEST, BROKEN_BODY, UPGRADE, LONG_HEAD])
@pytest.mark.parametrize("body", [{"stream": True, "gate": True}, {"script": "hang"}])
def test_what_is_wrong_with_a_pipelined_request_is_said_after_the_earlier_answers(
    house: House, gateway: GatewayProcess, bobs_key: str, body: dict[str, Any], wrong: bytes
) -> None:
    engine = house.engine("coder")
    house.serve(gateway, "coder", engine)
    with open_request(gateway, bobs_key, chat("coder", **body)) as connection:
        until(lambda: engine.running == 1, "the request did not arrive")
        connection.sendall(request_bytes(bobs_key, chat("coder", seed=7)) + wrong)
        connection.sendall(b"what comes then is not looked at")
        assert gateway.ask("GET", "/healthz").status == 200  # it was read
        house.loop.run(engine.release())
        got = b"".join(iter(lambda: connection.recv(65536), b""))
    first, second, refusal = answers(got)
    assert first.startswith(b"200 ")
    assert (b"[DONE]" in first) is ("stream" in body)
    assert first.endswith(b"0\r\n\r\n" if "stream" in body else b"}")
    assert second.startswith(b"200 ")
    assert second.endswith(b"}")
    assert refusal.startswith(b"400 ")
    assert json.loads(refusal.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_request"
    assert len(engine.received) == 2
    nothing_runs(gateway)


def test_an_answer_without_a_body_comes_before_the_refusal_of_what_follows(gateway: GatewayProcess) -> None:
    got = raw_exchange(gateway.port, b"HEAD /healthz HTTP/1.1\r\nHost: x\r\n\r\n" + NO_REQUEST, half_close=False)
    assert [answer[:4] for answer in answers(got)] == [b"200 ", b"400 "]


def test_a_client_that_leaves_after_a_broken_pipelined_request_stops_the_engine(
    house: House, gateway: GatewayProcess, bobs_key: str
) -> None:
    engine, connection = in_mid_stream(house, gateway, bobs_key)
    connection.sendall(NO_REQUEST)
    assert gateway.ask("GET", "/healthz").status == 200  # it was read
    assert engine.abandoned == 0
    leave(connection, engine, gateway)


def test_a_request_whose_own_body_is_broken_is_refused_itself(gateway: GatewayProcess, bobs_key: str) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {bobs_key}\r\nTransfer-Encoding: chunked\r\n\r\n"
    got = raw_exchange(gateway.port, head.encode() + b"2\r\n{}\r\nno length\r\n", half_close=False)
    assert got.startswith(b"HTTP/1.1 400 ")
    assert got.count(b"HTTP/1.1") == 1


def test_an_engine_that_dies_in_mid_stream_ends_it_with_an_error_event(
    house: House, gateway: GatewayProcess, bobs_key: str
) -> None:
    house.serve(gateway, "coder", house.engine("coder"))
    answer = gateway.ask("POST", CHAT, chat("coder", stream=True, script="die_within"), key=bobs_key)

    whole, error, done, rest = answer.body.rsplit(b"\n\n", 3)
    assert whole + b"\n\n" == b"".join(events("coder", 3)[:2])  # the torn third event is not passed on
    assert json.loads(error.removeprefix(b"data: "))["error"]["code"] == "engine_died"
    assert (done, rest) == (b"data: [DONE]", b"")

    client = openai.OpenAI(base_url=f"http://127.0.0.1:{gateway.port}/v1", api_key=bobs_key, max_retries=0)
    messages: Any = [{"role": "user", "content": "Hello"}]
    stream = client.chat.completions.create(
        model="coder", messages=messages, stream=True, extra_body={"script": "die_within"}
    )
    with pytest.raises(openai.APIError, match="ended the connection"):
        list(stream)
    nothing_runs(gateway)


def test_an_engine_that_dies_before_its_answer_is_a_502(house: House, gateway: GatewayProcess, bobs_key: str) -> None:
    engine = house.engine("coder")
    house.serve(gateway, "coder", engine)
    answer = gateway.ask("POST", CHAT, chat("coder", script="die_before"), key=bobs_key)
    assert (answer.status, answer.error["code"]) == (502, "engine_died")
    assert len(engine.received) == 1  # not sent again: what killed it once would kill it again
    nothing_runs(gateway)


def test_a_request_that_kills_an_engine_on_a_used_connection_spares_the_other_replica(
    house: House, gateway: GatewayProcess, bobs_key: str
) -> None:
    first, second = house.engine("coder"), house.engine("coder")
    house.serve(gateway, "coder", first, second)
    for number in range(4):  # leaves idle connections to both
        body = {"model": "coder", "messages": [{"role": "user", "content": f"conversation {number}"}]}
        assert gateway.ask("POST", CHAT, body, key=bobs_key).status == 200
    asked = len(first.received) + len(second.received)
    answer = gateway.ask("POST", CHAT, chat("coder", script="die_before"), key=bobs_key)
    assert answer.status == 502
    killed = [len(e.received) for e in (first, second)]
    assert sum(killed) - asked <= 2
    assert abs(killed[0] - killed[1]) <= 2
    assert min(killed) == 2


def test_an_engine_that_cannot_be_reached_is_a_503_in_words(
    house: House, gateway: GatewayProcess, bobs_key: str
) -> None:
    engine = house.engine("coder")
    deployment = house.serve(gateway, "coder", engine)
    Replica.objects.filter(deployment=deployment).update(base_url=f"http://127.0.0.1:{free_port()}")
    routes.routes_changed()
    house.applied(gateway)
    answer = gateway.ask("POST", CHAT, chat("coder"), key=bobs_key)
    assert (answer.status, answer.error["code"]) == (503, "no_model")
    assert "cannot be reached" in answer.error["message"]
    assert int(answer.headers["retry-after"]) > 0


def test_a_replica_that_is_down_is_passed_over(house: House, gateway: GatewayProcess, bobs_key: str) -> None:
    up, down = house.engine("coder"), house.engine("coder")
    house.serve(gateway, "coder", down, up)
    house.loop.run(down.stop())
    for _ in range(6):
        assert gateway.ask("POST", CHAT, chat("coder"), key=bobs_key).status == 200
    assert len(up.received) == 6


def test_an_engine_with_another_key_is_not_taken_for_ours(house: House, gateway: GatewayProcess, bobs_key: str) -> None:
    stranger = house.engine("coder")
    deployment = house.serve(gateway, "coder", stranger)
    Replica.objects.filter(deployment=deployment).update(engine_key="the key of the engine that was here")
    routes.routes_changed()
    house.applied(gateway)
    answer = gateway.ask("POST", CHAT, chat("coder"), key=bobs_key)
    assert (answer.status, answer.error["code"]) == (503, "no_model")  # not the engine's 401: the member's key is fine
    assert stranger.received == []


def test_an_idle_connection_that_the_engine_closed_costs_nobody_a_request(
    house: House, gateway: GatewayProcess, bobs_key: str
) -> None:
    engine = house.engine("coder")
    house.serve(gateway, "coder", engine)
    for _ in range(5):
        assert gateway.ask("POST", CHAT, chat("coder"), key=bobs_key).status == 200
        house.loop.run(engine.stop())  # closes the connections that the gateway keeps
        house.loop.run(engine.start())


def test_a_slow_reader_slows_its_engine_and_not_our_memory(
    house: House, gateway: GatewayProcess, bobs_key: str
) -> None:
    engine = house.engine("coder")
    house.serve(gateway, "coder", engine)
    before = gateway.resident_bytes
    readers = [open_request(gateway, bobs_key, chat("coder", stream=True, script="flood")) for _ in range(8)]
    until(lambda: engine.running == 8, "not all streams began")
    state: dict[str, int] = {"last": -1}

    def blocked() -> bool:
        """No more bytes come than came 0.02 s ago, many times in a row."""
        same = state["last"] == engine.flooded_bytes
        state["times"] = state.get("times", 0) + 1 if same else 0
        state["last"] = engine.flooded_bytes
        return state["times"] > 50

    until(blocked, "the engine could write without end although nobody reads")
    # Per stream: kernel buffers on both hops (some MiB on loopback), and the small ones in the gateway.
    assert engine.flooded_bytes < 8 * 16 * 2**20
    assert gateway.resident_bytes - before < 8 * 2 * 2**20
    assert gateway.ask("POST", CHAT, chat("coder"), key=bobs_key).status == 200  # others are unharmed
    for reader in readers:
        reader.close()
    until(lambda: engine.abandoned == 8, "the engine still writes for readers that left")
    nothing_runs(gateway)


def test_a_first_token_may_take_as_long_as_it_takes(house: House, within: Any, bobs_key: str) -> None:
    engine = house.engine("coder")
    deployment = house.deploy("coder", engine)
    routes.open_to(deployment)
    gateway = within(connect_s=0.2, body_s=0.2, wait_s=0.2)
    house.applied(gateway)
    connection = open_request(gateway, bobs_key, chat("coder", script="hang"))
    until(lambda: engine.running == 1, "the request did not arrive")
    connection.settimeout(1.0)
    with pytest.raises(TimeoutError):  # every limit has passed several times
        connection.recv(1)
    house.loop.run(engine.release())
    connection.settimeout(60)
    assert b"200 OK" in read_until(connection, b"total_tokens")
    connection.close()
