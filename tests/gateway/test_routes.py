"""Replicas, held routes, the epoch and its acknowledgement."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from datetime import timedelta
from typing import Any

import aiohttp
import openai
import pytest
from django.utils import timezone

from apps.common.models import Epoch
from apps.deployments import routes
from apps.deployments.models import Deployment
from apps.deployments.models import GatewayProcess as Row
from tests.gateway.conftest import GatewayProcess, House
from tests.gateway.helpers import DEADLINE_S, chat, events, until
from tests.gateway.test_streams import nothing_runs, open_request, read_until

pytestmark = pytest.mark.django_db(transaction=True)
CHAT = "/v1/chat/completions"


def waiting(gateway: Any, count: int) -> None:
    until(lambda: gateway.metric("rigpanel_gateway_waiting") == count, f"there are never {count} waiting requests")


def test_replicas_share_requests_by_who_has_the_fewest(house: House, gateway: GatewayProcess, bobs_key: str) -> None:
    one, two = house.engine("coder"), house.engine("coder")
    house.serve(gateway, "coder", one, two)
    connections = []
    for count in range(1, 9):
        body = chat("coder", script="hang")
        body["messages"][0]["content"] = f"conversation {count}"
        connections.append(open_request(gateway, bobs_key, body))
        until(lambda n=count: one.running + two.running == n, "a request did not arrive")  # type: ignore[misc]
    assert (one.running, two.running) == (4, 4)
    for connection in connections:
        connection.close()


def test_requests_for_a_held_route_wait_and_are_then_served(
    house: House, gateway: GatewayProcess, bobs_key: str
) -> None:
    engine = house.engine("coder")
    deployment = house.deploy("coder", engine)
    routes.hold(["coder"], job_id=1, eta_at=timezone.now() + timedelta(seconds=90))
    house.applied(gateway)

    plain = open_request(gateway, bobs_key, chat("coder"))
    stream = open_request(gateway, bobs_key, chat("coder", stream=True))
    head = read_until(stream, b"\n\n\r\n")  # the first comment, as a chunk
    assert b"200 OK" in head
    assert b"content-type: text/event-stream" in head
    assert b": waiting for coder, about " in head
    waiting(gateway, 2)
    assert engine.received == []

    routes.open_to(deployment)
    assert b"200 OK" in read_until(plain, b"total_tokens")
    rest = read_until(stream, b"[DONE]")
    assert [line for line in rest.splitlines() if line.startswith(b"data:")]
    assert rest.count(b"data: ") == 4
    waiting(gateway, 0)
    plain.close()
    stream.close()


def test_waiting_requests_are_served_in_the_order_they_came(
    house: House, gateway: GatewayProcess, bobs_key: str
) -> None:
    engine = house.engine("coder")
    deployment = house.deploy("coder", engine)
    routes.hold(["coder"], job_id=1, eta_at=None)
    house.applied(gateway)
    connections = []
    for number in range(12):
        connections.append(open_request(gateway, bobs_key, chat("coder", number=number)))
        waiting(gateway, number + 1)
    routes.open_to(deployment)
    for connection in connections:
        read_until(connection, b"total_tokens")
        connection.close()
    order = [json.loads(r.body)["number"] for r in engine.received]
    # They leave in order; which of twelve new connections the engine takes first is its own affair.
    assert sorted(order) == list(range(12))
    assert all(abs(place - number) <= 4 for place, number in enumerate(order)), order


def test_the_official_client_passes_over_the_waiting_comments(
    house: House, gateway: GatewayProcess, bobs_key: str
) -> None:
    deployment = house.deploy("coder", house.engine("coder"))
    routes.hold(["coder"], job_id=1, eta_at=None)
    house.applied(gateway)

    async def said() -> str:
        async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{gateway.port}/v1", api_key=bobs_key) as client:
            messages: Any = [{"role": "user", "content": "Hello"}]
            stream = await client.chat.completions.create(model="coder", messages=messages, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    answer = house.loop.spawn(said())
    waiting(gateway, 1)
    time.sleep(1.2)  # the first comment is out by then; the test holds either way
    routes.open_to(deployment)
    assert answer.result(DEADLINE_S) == "t0 t1 t2 "


def test_a_client_that_strips_what_arrives_does_not_take_the_answer_for_a_comment(
    house: House, gateway: GatewayProcess, bobs_key: str
) -> None:
    """``vllm bench serve`` reads completions so: comments and the first event ran into one line, and the answer was
    taken for none."""
    deployment = house.deploy("coder", house.engine("coder"))
    routes.hold(["coder"], job_id=1, eta_at=None)
    house.applied(gateway)
    waited = asyncio.Event()

    async def said() -> list[str]:
        url, headers = f"http://127.0.0.1:{gateway.port}{CHAT}", {"Authorization": f"Bearer {bobs_key}"}
        buffer, messages = "", []
        async with (
            aiohttp.ClientSession() as session,
            session.post(url, json=chat("coder", stream=True), headers=headers) as answer,
        ):
            async for piece in answer.content.iter_any():
                waited.set()
                buffer += piece.decode().strip()
                while "\n\n" in buffer:
                    message, _, buffer = buffer.partition("\n\n")
                    messages.append(message)
                if buffer.startswith("data: "):
                    messages.append(buffer)
                    buffer = ""
        return [message for message in messages if message.startswith("data: {")]

    answer = house.loop.spawn(said())
    until(waited.is_set, "there was no comment")
    routes.open_to(deployment)
    assert len(answer.result(DEADLINE_S)) == 3


def test_past_the_wait_limit_requests_get_503_and_streams_an_error_event(
    house: House, within: Any, bobs_key: str
) -> None:
    routes.hold(["coder"], job_id=1, eta_at=timezone.now() + timedelta(minutes=4))
    gateway = within(wait_s=0.5, comment_after_s=0.1, comment_every_s=0.1)
    house.applied(gateway)

    answer = gateway.ask("POST", CHAT, chat("coder"), key=bobs_key)
    assert (answer.status, answer.error["code"]) == (503, "model_loading")
    assert 200 < int(answer.headers["retry-after"]) <= 241
    assert "should be ready in about 3 min 5" in answer.error["message"]

    streamed = gateway.ask("POST", CHAT, chat("coder", stream=True), key=bobs_key)
    assert streamed.status == 200
    comments, _, rest = streamed.body.partition(b"data: ")
    assert comments.count(b": waiting for coder") >= 2
    error, done, end = rest.split(b"\n\n")
    assert json.loads(error)["error"]["code"] == "model_loading"
    assert (done, end) == (b"data: [DONE]", b"")
    waiting(gateway, 0)


def test_a_route_that_disappears_while_requests_wait_ends_them_in_words(
    house: House, gateway: GatewayProcess, bobs_key: str
) -> None:
    routes.hold(["coder"], job_id=77, eta_at=None)
    house.applied(gateway)
    plain = open_request(gateway, bobs_key, chat("coder"))
    stream = open_request(gateway, bobs_key, chat("coder", stream=True))
    read_until(stream, b": waiting for coder\n\n")
    waiting(gateway, 2)

    routes.release(77)  # the switch failed, and nothing was there to come back

    assert b"404" in read_until(plain, b"model_not_found")
    assert b'"code": "model_not_found"' in read_until(stream, b"[DONE]")
    plain.close()
    stream.close()


def test_a_client_that_leaves_while_it_waits_frees_its_place(
    house: House, gateway: GatewayProcess, bobs_key: str
) -> None:
    engine = house.engine("coder")
    deployment = house.deploy("coder", engine)
    routes.hold(["coder"], job_id=1, eta_at=None)
    house.applied(gateway)
    leaves = open_request(gateway, bobs_key, chat("coder", who="leaves"))
    leaves_too = open_request(gateway, bobs_key, chat("coder", stream=True, who="leaves"))
    stays = open_request(gateway, bobs_key, chat("coder", who="stays"))
    waiting(gateway, 3)
    leaves.close()
    leaves_too.close()
    waiting(gateway, 1)
    routes.open_to(deployment)
    read_until(stays, b"total_tokens")
    assert [json.loads(r.body)["who"] for r in engine.received] == ["stays"]
    stays.close()


def test_an_engines_refusal_reaches_a_stream_that_had_to_wait_as_an_event(
    house: House, gateway: GatewayProcess, bobs_key: str
) -> None:
    deployment = house.deploy("coder", house.engine("coder"))
    routes.hold(["coder"], job_id=1, eta_at=None)
    house.applied(gateway)
    stream = open_request(gateway, bobs_key, chat("coder", stream=True, script="status", status=400))
    read_until(stream, b": waiting for coder\n\n")
    routes.open_to(deployment)
    assert b'data: {"error": {"message": "as asked", "code": "asked"}}\n\n' in read_until(stream, b"[DONE]")
    stream.close()


def test_the_row_says_which_epoch_is_applied_and_what_still_runs(
    house: House, gateway: GatewayProcess, bobs_key: str
) -> None:
    engine = house.engine("coder")
    deployment = house.serve(gateway, "coder", engine)
    connection = open_request(gateway, bobs_key, chat("coder", stream=True, gate=True))
    read_until(connection, b"t0")

    epoch = routes.hold(["coder"], job_id=1, eta_at=None)

    row = until(lambda: Row.objects.filter(acknowledged_epoch=epoch).first(), "the epoch was not acknowledged")
    assert row.in_flight == {str(deployment.pk): 1}  # already in the acknowledgement itself
    assert routes.wait_acknowledged(epoch, time.sleep, limit_seconds=DEADLINE_S)
    assert routes.in_flight([deployment.pk]) == 1
    house.loop.run(engine.release())
    read_until(connection, b"[DONE]")
    until(lambda: routes.in_flight([deployment.pk]) == 0, "the end of the last request was not reported")
    connection.close()


def test_pages_learn_of_answers_that_begin_and_end_without_waiting_for_a_heartbeat(
    house: House, within: Any, bobs_key: str
) -> None:
    gateway = within(heartbeat_s=3600.0)
    engine = house.engine("coder")
    deployment = house.serve(gateway, "coder", engine)
    connection = open_request(gateway, bobs_key, chat("coder", stream=True, gate=True))
    read_until(connection, b"t0")
    until(lambda: routes.in_flight([deployment.pk]) == 1, "the request was not reported")
    house.loop.run(engine.release())
    read_until(connection, b"[DONE]")
    until(lambda: routes.in_flight([deployment.pk]) == 0, "its end was not reported")
    connection.close()


def test_a_route_that_is_closed_is_drained_as_quickly_as_a_held_one(
    house: House, gateway: GatewayProcess, bobs_key: str
) -> None:
    engine = house.engine("coder")
    deployment = house.serve(gateway, "coder", engine)
    connection = open_request(gateway, bobs_key, chat("coder", stream=True, gate=True))
    read_until(connection, b"t0")
    epoch = routes.close(deployment)
    until(lambda: Row.objects.filter(acknowledged_epoch=epoch).exists(), "the epoch was not acknowledged")
    seen_at = Row.objects.get().seen_at
    house.loop.run(engine.release())
    read_until(connection, b"[DONE]")
    until(lambda: routes.in_flight([deployment.pk]) == 0, "the end of the last request was not reported")
    assert Row.objects.get().seen_at > seen_at
    connection.close()


def test_no_stream_is_lost_or_misled_while_routes_flip_under_fifty_of_them(
    house: House, gateway: GatewayProcess, bobs_key: str
) -> None:
    """Two names and two deployments take turns, as deployments does it: hold, wait for the acknowledgement, drain,
    kill the old engine, start the new one on the same port (with another key and model), open."""
    names = ["alpha", "beta"]
    flips = 6
    engine = house.engine("alpha")
    deployment = house.serve(gateway, "alpha", engine)
    routes.hold(["beta"], job_id=1, eta_at=None)
    house.applied(gateway)
    stop = asyncio.Event()
    outcomes: Counter[str] = Counter()

    async def one_client(session: aiohttp.ClientSession, number: int) -> None:
        while not stop.is_set():
            model = names[number % 2]
            body = chat(model, stream=True, chunks=8, pause_s=0.005)
            headers = {"Authorization": f"Bearer {bobs_key}"}
            async with session.post(f"http://127.0.0.1:{gateway.port}{CHAT}", json=body, headers=headers) as answer:
                content = await answer.read()
            data = b"".join(part + b"\n\n" for part in content.split(b"\n\n") if part.startswith(b"data: "))
            outcomes["whole" if data == b"".join(events(model, 8)) else f"{answer.status} {data[:300]!r}"] += 1

    async def all_clients() -> None:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as session, asyncio.TaskGroup() as group:
            for number in range(50):
                group.create_task(one_client(session, number))

    clients = house.loop.spawn(all_clients())
    engines = [engine]
    for flip in range(flips):
        old, new = names[flip % 2], names[(flip + 1) % 2]
        done = outcomes["whole"]
        until(lambda d=done: outcomes["whole"] > d + 20 or clients.done(), "no stream gets through")  # type: ignore[misc]
        epoch = routes.hold(names, job_id=1, eta_at=None)
        until(lambda e=epoch: Row.objects.filter(acknowledged_epoch__gte=e).exists(), "not acknowledged")  # type: ignore[misc]
        until(lambda d=deployment: routes.in_flight([d.pk]) == 0, "the old engine does not drain")  # type: ignore[misc]
        assert engine.running == 0, f"{old} was said to be drained and still has requests"
        house.loop.run(engine.stop())
        house.retire(deployment)
        engine = house.engine(new, port=engine.port)
        engines.append(engine)
        deployment = house.deploy(new, engine)
        routes.open_to(deployment)
    house.loop.loop.call_soon_threadsafe(stop.set)
    other = house.deploy(names[(flips + 1) % 2], house.engine(names[(flips + 1) % 2]))
    routes.open_to(other)  # so that those that still wait for the other name can end
    clients.result(DEADLINE_S)

    assert set(outcomes) == {"whole"}, outcomes
    assert outcomes["whole"] > flips * 20
    assert [e.wrong for e in engines] == [0] * len(engines)
    nothing_runs(gateway)


def test_a_request_that_its_engines_end_left_unanswered_goes_to_the_next_one(
    house: House, gateway: GatewayProcess, bobs_key: str
) -> None:
    """A drain has a deadline: what has no answer by then is served by the deployment that comes next."""
    engine = house.engine("coder")
    house.serve(gateway, "coder", engine)
    connection = open_request(gateway, bobs_key, chat("coder", script="hang"))
    until(lambda: engine.running == 1, "the request did not arrive")
    epoch = routes.hold(["coder"], job_id=1, eta_at=None)
    until(lambda: Row.objects.filter(acknowledged_epoch=epoch).exists(), "not acknowledged")
    house.loop.run(engine.stop())
    waiting(gateway, 1)
    next_engine = house.engine("coder")
    house.loop.run(next_engine.release())
    routes.open_to(house.deploy("coder", next_engine))
    assert b"200 OK" in read_until(connection, b"total_tokens")
    connection.close()


def test_an_older_epoch_after_a_restored_backup_is_applied_too(
    house: House, gateway: GatewayProcess, bobs_key: str
) -> None:
    house.serve(gateway, "coder", house.engine("coder"))
    Deployment.objects.get().routes.all().delete()
    Epoch.objects.filter(name="routes").update(value=3)
    house.applied(gateway)
    listed = gateway.ask("GET", "/v1/models", key=bobs_key).json["data"]
    assert [model["status"]["value"] for model in listed] == ["loading"]  # it runs, but no route leads there
