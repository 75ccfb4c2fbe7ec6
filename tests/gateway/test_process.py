"""The process: how it starts and ends, and what it does while database and store are away."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from django.db import connection

from apps.deployments import routes
from apps.deployments.models import GatewayProcess as Row
from apps.gateway.server import listening_socket
from tests.factories.profiles import llama_cpp_profile, simulated_profile
from tests.gateway.conftest import ROOT, GatewayProcess, House
from tests.gateway.helpers import chat, until
from tests.gateway.test_streams import open_request, read_until

pytestmark = pytest.mark.django_db(transaction=True)
CHAT = "/v1/chat/completions"
Start = Callable[..., GatewayProcess]


@contextmanager
def database_away() -> Iterator[None]:
    """Every look of the gateway fails with an error of the database itself."""
    with connection.cursor() as cursor:
        cursor.execute("ALTER TABLE common_epoch RENAME TO common_epoch_away")
    try:
        yield
    finally:
        with connection.cursor() as cursor:
            cursor.execute("ALTER TABLE common_epoch_away RENAME TO common_epoch")


def own_row(process: GatewayProcess) -> Any:
    assert process.process is not None
    return Row.objects.filter(key__contains=f":{process.process.pid}:")


def test_the_list_of_models_costs_no_planner_and_no_engine(house: House, own_process: Start, bobs_key: str) -> None:
    """They check options with pydantic, whose library is seen from outside: 10 MB."""
    gateway = own_process()
    llama_cpp_profile("tiny")
    simulated_profile("marked", members_may_switch=True)
    routes.routes_changed()
    house.applied(gateway)
    listed = gateway.ask("GET", "/v1/models", key=bobs_key).json["data"]
    assert [model["id"] for model in listed] == ["marked"]
    assert gateway.process is not None
    libraries = Path(f"/proc/{gateway.process.pid}/maps").read_text()
    assert "sqlite" in libraries or "psycopg" in libraries
    assert "pydantic" not in libraries


def test_sigterm_lets_streams_finish_and_signs_off(house: House, own_process: Start, bobs_key: str) -> None:
    gateway = own_process()
    engine = house.engine("coder")
    house.serve(gateway, "coder", engine)
    stream = open_request(gateway, bobs_key, chat("coder", stream=True, gate=True))
    read_until(stream, b"t0")
    assert own_row(gateway).exists()

    gateway.signal(signal.SIGTERM)

    until(lambda: refuses_connections(gateway.port), "it still takes new connections")
    house.loop.run(engine.release())
    read_until(stream, b"[DONE]")
    stream.close()
    assert gateway.process is not None
    gateway.process.wait(60)
    assert not own_row(gateway).exists()


def refuses_connections(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except ConnectionRefusedError:
        return True
    return False


def test_one_that_was_killed_is_not_waited_for_and_the_next_one_takes_over(
    house: House, own_process: Start, bobs_key: str
) -> None:
    gateway = own_process()
    engine = house.engine("coder")
    house.serve(gateway, "coder", engine)
    stream = open_request(gateway, bobs_key, chat("coder", stream=True, gate=True))
    read_until(stream, b"t0")

    gateway.signal(signal.SIGKILL)
    assert gateway.process is not None
    gateway.process.wait(60)

    until(lambda: engine.abandoned == 1, "the engine still works for a dead gateway's client")
    killed = own_row(gateway).get()
    assert killed.key not in [g.key for g in routes.live_gateways()]
    gateway.start()
    until(lambda: own_row(gateway).exists(), "the new process has no row")
    assert gateway.ask("POST", CHAT, chat("coder"), key=bobs_key).status == 200


def test_with_the_database_away_known_keys_and_routes_go_on(
    house: House, gateway: GatewayProcess, bobs_key: str
) -> None:
    house.serve(gateway, "coder", house.engine("coder"))
    with database_away():
        until(lambda: "what='database'" in gateway.log.read_text(), "the gateway did not notice")
        for _ in range(3):
            assert gateway.ask("POST", CHAT, chat("coder"), key=bobs_key).status == 200
        assert gateway.ask("GET", "/v1/models", key="rp-unknown").status == 401
    until(lambda: "back in reach" in gateway.log.read_text(), "the gateway did not come back")
    routes.hold(["coder"], job_id=1, eta_at=None)
    house.applied(gateway)


def test_when_it_was_away_too_long_everything_is_refused_in_words(house: House, within: Any, bobs_key: str) -> None:
    deployment = house.deploy("coder", house.engine("coder"))
    routes.open_to(deployment)
    gateway = within(stale_s=1.0, poll_s=0.1)
    house.applied(gateway)
    assert gateway.ask("POST", CHAT, chat("coder"), key=bobs_key).status == 200
    with database_away():
        until(lambda: gateway.ask("POST", CHAT, chat("coder"), key=bobs_key).status == 503, "nothing was refused")
        answer = gateway.ask("GET", "/v1/models", key=bobs_key)
        assert (answer.status, answer.error["code"]) == (503, "database_unreachable")
        assert "retry-after" in answer.headers
        assert gateway.ask("GET", "/healthz").status == 200
    until(lambda: gateway.ask("POST", CHAT, chat("coder"), key=bobs_key).status == 200, "it did not come back")


def test_it_starts_without_a_database_and_says_so(house: House, own_process: Start, bobs_key: str) -> None:
    house.deploy("coder", house.engine("coder"))
    with database_away():
        gateway = own_process()
        answer = gateway.ask("GET", "/v1/models", key=bobs_key)
        assert (answer.status, answer.error["code"]) == (503, "starting")
    until(lambda: gateway.ask("GET", "/v1/models", key=bobs_key).status == 200, "it did not come up")


def test_a_taken_port_and_a_wrong_setting_are_one_sentence_each(gateway: GatewayProcess) -> None:
    def start_with(**environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "apps.gateway"],
            cwd=ROOT,
            env={**gateway.environment, **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )

    taken = start_with()
    assert taken.returncode == 1
    assert f"{gateway.port} cannot be used: Address already in use" in taken.stderr
    wrong = start_with(RIGPANEL_GATEWAY_WAIT_S="soon")
    assert wrong.returncode == 1
    assert "RIGPANEL_GATEWAY_WAIT_S must be a number of seconds" in wrong.stderr
    assert "Traceback" not in taken.stderr + wrong.stderr


def test_a_shutdown_that_cannot_wait_ends_streams_with_an_error_event(
    house: House, own_process: Start, bobs_key: str
) -> None:
    gateway = own_process(RIGPANEL_GATEWAY_DRAIN_S="1")
    engine = house.engine("coder")
    house.serve(gateway, "coder", engine)
    stream = open_request(gateway, bobs_key, chat("coder", stream=True, gate=True))
    waiting = open_request(gateway, bobs_key, chat("coder", script="hang"))
    read_until(stream, b"t0")
    until(lambda: engine.running == 2, "the second request did not arrive")
    gateway.signal(signal.SIGTERM)
    assert b'"code": "stopping"' in read_until(stream, b"[DONE]")
    assert b"503" in read_until(waiting, b'"stopping"')
    until(lambda: engine.abandoned == 2, "the engine still works")
    stream.close()
    waiting.close()
    assert gateway.process is not None
    gateway.process.wait(60)
    assert "Traceback" not in gateway.log.read_text()


def test_who_asks_while_the_gateway_is_still_reading_its_routes_waits_instead_of_being_refused() -> None:
    listener = listening_socket("127.0.0.1", 0)
    with listener, socket.create_connection(listener.getsockname(), timeout=5):
        pass  # nobody has accepted it yet
