"""Many clients that mean harm or do not read, and one beside them that only wants its answers."""

from __future__ import annotations

import http.client
import json
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from apps.deployments import routes
from apps.gateway import server
from apps.gateway.server import GatewayProtocol
from tests.gateway.conftest import GatewayProcess, House
from tests.gateway.helpers import ANSWER, DEADLINE_S, chat, until
from tests.gateway.test_dialects import form
from tests.gateway.test_streams import nothing_runs, open_request, read_until, request_bytes

pytestmark = pytest.mark.django_db(transaction=True)
CHAT = "/v1/chat/completions"
MIB = 2**20


class Neighbour(threading.Thread):
    """A well-behaved client that asks one request after the other, and keeps what was wrong with an answer."""

    def __init__(self, gateway: GatewayProcess, key: str) -> None:
        super().__init__(daemon=True)
        self.answered = 0
        self.wrong: list[str] = []
        self._gateway, self._key = gateway, key
        self._over = threading.Event()
        self.start()

    def run(self) -> None:
        while not self._over.is_set():
            try:
                answer = self._gateway.ask("POST", CHAT, chat("coder"), key=self._key)
            except OSError as error:
                self.wrong.append(repr(error))
                return
            if answer.body != ANSWER.replace(b"MODEL", b"coder"):
                self.wrong.append(f"{answer.status}: {answer.body[:300]!r}")
            self.answered += 1

    def goes_on(self) -> None:
        wanted = self.answered + 3
        until(lambda: self.wrong or self.answered >= wanted, "the neighbour's requests are not answered")
        assert self.wrong == []

    def end(self) -> None:
        self._over.set()
        self.join(DEADLINE_S)


@pytest.fixture
def neighbour(house: House, gateway: GatewayProcess, bobs_key: str) -> Iterator[Neighbour]:
    house.serve(gateway, "coder", house.engine("coder"))
    made = Neighbour(gateway, bobs_key)
    made.goes_on()
    yield made
    made.end()
    assert made.wrong == []


def grows_by(gateway: GatewayProcess, act: Callable[[], None]) -> float:
    """MiB that the process is larger after the second of two rounds: what grows only once has grown in the first."""
    act()
    before = gateway.resident_bytes
    act()
    return (gateway.resident_bytes - before) / MIB


def test_idle_and_dripping_connections_cost_little_and_disturb_nobody(
    gateway: GatewayProcess, neighbour: Neighbour
) -> None:
    def crowd() -> None:
        with ExitStack() as stack:
            for number in range(300):
                one = stack.enter_context(socket.create_connection(("127.0.0.1", gateway.port), timeout=DEADLINE_S))
                if number % 3:
                    one.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nX-Slow: ")
                if number % 3 == 2:
                    one.sendall(b"drip")
            neighbour.goes_on()

    assert grows_by(gateway, crowd) < 8


def test_bad_keys_disturb_nobody(gateway: GatewayProcess, neighbour: Neighbour) -> None:
    """Over four connections, with bodies; test_keys sends ten thousand and watches memory."""

    def guess() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=DEADLINE_S)
        for _ in range(500):
            headers = {"Authorization": f"Bearer rp-{secrets.token_urlsafe(32)}"}
            connection.request("POST", CHAT, json.dumps(chat("coder")), headers)
            answer = connection.getresponse()
            assert answer.status == 401
            assert json.load(answer)["error"]["code"] == "invalid_api_key"
        connection.close()

    threads = [threading.Thread(target=guess) for _ in range(4)]
    for thread in threads:
        thread.start()
    neighbour.goes_on()
    for thread in threads:
        thread.join(300)


def test_bodies_of_a_hundred_megabytes_are_refused_with_flat_memory(
    gateway: GatewayProcess, bobs_key: str, neighbour: Neighbour
) -> None:
    """Their clients send all of it, as most do, and still read the refusal; said beforehand or not."""
    block = b"x" * MIB

    def send(chunked: bool) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=DEADLINE_S)
        headers = {"Authorization": f"Bearer {bobs_key}"} | ({} if chunked else {"Content-Length": str(100 * MIB)})
        connection.request("POST", CHAT, (block for _ in range(100)), headers, encode_chunked=chunked)
        answer = connection.getresponse()
        assert answer.status == 413
        assert json.load(answer)["error"]["code"] == "request_too_large"
        connection.close()

    def both() -> None:
        for chunked in (False, True):
            send(chunked)
            neighbour.goes_on()

    assert grows_by(gateway, both) < 16
    until(lambda: gateway.metric("rigpanel_gateway_body_bytes") == 0, "the refused bodies are still counted")


def test_a_form_of_a_hundred_megabytes_streams_through_with_flat_memory(
    house: House, gateway: GatewayProcess, bobs_key: str, neighbour: Neighbour
) -> None:
    whisper = house.engine("whisper", body_bytes_max=128 * MIB)
    house.serve(gateway, "whisper", whisper)
    body = form(('name="model"', b"whisper"), ('name="file"; filename="a.wav"', bytes(100 * MIB)))

    def send() -> None:
        headers = {"Content-Type": "multipart/form-data; boundary=b0"}
        answer = gateway.ask("POST", "/v1/audio/transcriptions", body, key=bobs_key, headers=headers)
        assert answer.status == 200
        assert len(whisper.received.pop().body) == len(body)
        neighbour.goes_on()

    assert grows_by(gateway, send) < 16


def test_readers_that_do_not_read_cost_no_memory_and_disturb_nobody(
    house: House, gateway: GatewayProcess, bobs_key: str, neighbour: Neighbour
) -> None:
    """Twenty floods into sockets that nobody empties: engines stand still, the gateway holds a buffer each."""
    before = gateway.resident_bytes
    with ExitStack() as stack:
        for _ in range(20):
            one = stack.enter_context(open_request(gateway, bobs_key, chat("coder", stream=True, script="flood")))
            read_until(one, b"xxxx")
        engine = house.engines[0]
        still = [-1, -2]
        until(
            lambda: still.append(engine.flooded_bytes) or neighbour.goes_on() or still[-1] == still[-2],
            "the engine never stood still",
        )
        assert gateway.resident_bytes - before < 40 * MIB
    until(lambda: engine.abandoned == 20, "the engine still works for clients that left")


MALFORMED_HEADS = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 40,  # TLS spoken to a plain port
    b"nonsense\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET /\x00 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET / HTTP/1.1\r\nNo colon here\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nX: a\x00b\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
]


def test_what_is_not_http_is_refused_in_words(gateway: GatewayProcess, neighbour: Neighbour) -> None:
    for head in MALFORMED_HEADS:
        with socket.create_connection(("127.0.0.1", gateway.port), timeout=DEADLINE_S) as connection:
            connection.sendall(head)
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        status, _, body = answer.partition(b"\r\n\r\n")
        assert status.startswith(b"HTTP/1.1 400"), head
        assert json.loads(body)["error"]["code"] == "invalid_request", head
    neighbour.goes_on()


@pytest.mark.parametrize(("kib", "status"), [(63, b"200"), (65, b"400"), (250, b"400")])
def test_a_head_has_its_limit_also_where_it_is_read_in_one_piece(
    within: Any, monkeypatch: pytest.MonkeyPatch, kib: int, status: bytes
) -> None:
    head = b"GET /healthz HTTP/1.1\r\nConnection: close\r\nX-Long: " + b"x" * (kib * 1024) + b"\r\n\r\n"
    received, pieces = GatewayProtocol.data_received, []

    def in_one_piece(self: GatewayProtocol, data: bytes) -> None:
        pieces.append(data)
        if sum(map(len, pieces)) == len(head):
            received(self, b"".join(pieces))

    monkeypatch.setattr(GatewayProtocol, "data_received", in_one_piece)
    with socket.create_connection(("127.0.0.1", within().port), timeout=DEADLINE_S) as connection:
        connection.sendall(head)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 " + status)
    assert (b"longer than 64 KiB" in answer) == (status == b"400")


# -- how long they may do so: with limits shortened, in a gateway within this process -----------------


@pytest.fixture
def impatient(house: House, within: Any, bobs_key: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(server, "LOOK_EVERY_SECONDS", 0.1)
    monkeypatch.setattr(server, "HEAD_SECONDS", 1.0)
    monkeypatch.setattr(server, "STALLED_SECONDS", 1.0)
    gateway = within()
    routes.open_to(house.deploy("coder", house.engine("coder")))
    house.applied(gateway)
    return gateway


def rest_of(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(65536), b""))


def test_a_connection_without_a_request_is_closed(impatient: Any) -> None:
    with socket.create_connection(("127.0.0.1", impatient.port), timeout=DEADLINE_S) as connection:
        assert rest_of(connection) == b""


def test_a_head_that_drips_is_answered_408_and_closed(impatient: Any) -> None:
    with socket.create_connection(("127.0.0.1", impatient.port), timeout=DEADLINE_S) as connection:
        over = threading.Event()

        def drip() -> None:
            try:
                connection.sendall(b"GET /v1/models HTTP/1.1\r\nX-Slow: ")
                while not over.wait(0.05):
                    connection.sendall(b"x")
            except OSError:
                return

        dripping = threading.Thread(target=drip)
        dripping.start()
        try:
            answer = connection.recv(65536)
        finally:
            over.set()
            dripping.join(DEADLINE_S)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"request_timeout"' in answer


def test_a_reader_that_takes_nothing_is_cut_and_its_engine_is_free(house: House, impatient: Any, bobs_key: str) -> None:
    (engine,) = house.engines
    with open_request(impatient, bobs_key, chat("coder", stream=True, script="flood")) as connection:
        read_until(connection, b"xxxx")
        until(lambda: engine.abandoned == 1, "the engine still works for a client that does not read")
        nothing_runs(impatient)
    assert impatient.ask("POST", CHAT, chat("coder"), key=bobs_key).status == 200


def test_a_client_that_waits_long_for_its_answer_is_not_taken_for_an_idle_one(
    house: House, impatient: Any, bobs_key: str
) -> None:
    (engine,) = house.engines
    with open_request(impatient, bobs_key, chat("coder", script="hang")) as connection:
        until(lambda: engine.running == 1, "the request did not arrive")
        # An idle one beside it is closed meanwhile, so the limit has passed for this one too.
        with socket.create_connection(("127.0.0.1", impatient.port), timeout=DEADLINE_S) as idle:
            assert rest_of(idle) == b""
        house.loop.run(engine.release())
        assert b"200 OK" in read_until(connection, b'"usage"')
        # Between two requests as well: the connection is kept, and closed when no other request comes.
        connection.sendall(request_bytes(bobs_key, chat("coder")))
        assert b"200 OK" in read_until(connection, b'"usage"')
        assert rest_of(connection) == b""
