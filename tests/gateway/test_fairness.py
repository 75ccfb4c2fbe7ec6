"""Turns by person: no turn is left free, nobody starves, and a share is a share."""

from __future__ import annotations

import asyncio
import random
from collections import Counter, deque
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apps.accounts.services import key_create
from apps.common.actors import actor_of
from apps.deployments import routes
from apps.deployments.models import Deployment, Replica
from apps.gateway.fairness import FairQueue, Turns
from apps.gateway.pace import Load, Pace, load_in
from apps.profiles.models import ProfileVersion
from tests.engines.test_simulated import KEY, SMALL, Running
from tests.gateway.conftest import GatewayProcess, House
from tests.gateway.helpers import LoopThread, chat, until
from tests.gateway.test_ledger import exchange

STEPS = st.lists(st.tuples(st.sampled_from(["ask", "ask", "done", "leave", "resize"]), st.integers(0, 4)), max_size=120)


@settings(deadline=None)
@given(STEPS, st.integers(1, 6))
def test_whatever_happens_no_turn_is_free_while_somebody_waits(steps: list[tuple[str, int]], slots: int) -> None:
    queue = FairQueue(slots)
    running: list[tuple[int, int]] = []  # (person, ticket)
    waiting: dict[int, deque[int]] = {person: deque() for person in range(5)}

    def given_now(tickets: list[Any]) -> None:
        for person, number in tickets:
            assert waiting[person].popleft() == number, "of one person's requests the oldest is first"
            running.append((person, number))

    for number, (what, person) in enumerate(steps):
        if what == "ask":
            if queue.ask((person, number), person, share=1 + person % 2):
                running.append((person, number))
            else:
                waiting[person].append(number)
        elif what == "done" and running:
            given_now(queue.done(running.pop(number % len(running))[0]))
        elif what == "leave" and waiting[person]:
            gone = waiting[person].pop()
            assert queue.leave((person, gone), person)
            assert not queue.leave((person, gone), person)
        elif what == "resize":
            given_now(queue.resize(1 + person))
        assert queue.running == len(running)
        assert queue.waiting == sum(map(len, waiting.values()))
        assert not queue.waiting or queue.running >= queue.slots
        if what != "resize":
            assert len(running) <= max(queue.slots, len(running))
    while running:
        given_now(queue.done(running.pop()[0]))
    assert not any(waiting.values()), "everybody got a turn"
    assert queue.is_idle


def test_one_chat_waits_for_one_turn_however_many_agents_somebody_else_has() -> None:
    queue = FairQueue(4)
    for number in range(20):
        queue.ask(("agents", number), 1)
    assert not queue.ask(("chat", 0), 2)
    assert queue.done(1) == [("chat", 0)]


def held(shares: dict[int, int], slots: int, steps: int = 400) -> Counter[int]:
    """How many turns each held, added up over time, while everybody always had more to ask."""
    queue, total, random_ = FairQueue(slots), Counter[int](), random.Random(1)
    running: list[int] = []
    for person, share in shares.items():
        for number in range(steps):
            if queue.ask((person, number), person, share):
                running.append(person)
    for _ in range(steps):
        done = running.pop(random_.randrange(len(running)))
        running += [who for who, _ in queue.done(done)]  # type: ignore[misc]
        total.update(running)
    return total


def test_turns_go_by_shares_when_everybody_wants_more() -> None:
    for slots in (1, 4, 8):
        got = held({1: 1, 2: 1, 3: 2}, slots)
        assert 0.9 <= got[1] / got[2] <= 1.15, (slots, got)
        assert 1.8 <= got[3] / got[1] <= 2.2, (slots, got)


def test_who_comes_back_does_not_bring_along_turns_that_were_not_wanted() -> None:
    queue = FairQueue(1)
    queue.ask("first", 1)
    for number in range(50):
        queue.ask(("one", number), 1)
    for _ in range(20):
        queue.done(1)
    for number in range(50):
        queue.ask(("two", number), 2)
    order = []
    holder = 1
    for _ in range(10):
        (ticket,) = queue.done(holder)
        holder = 1 if ticket[0] == "one" else 2  # type: ignore[index]
        order.append(holder)
    assert 4 <= order.count(2) <= 6, order


async def test_a_place_that_is_given_up_goes_to_the_next_even_in_the_moment_of_its_turn() -> None:
    turns = Turns()
    first, second, third = (exchange(user=n) for n in (1, 2, 3))
    assert turns.turn(first, "coder", 1, 1) is None
    waits, after = turns.turn(second, "coder", 1, 1), turns.turn(third, "coder", 1, 1)
    assert waits is not None
    assert after is not None
    waits.cancel()  # its callback has not run yet when the turn comes
    turns.over(first)
    await asyncio.wait_for(after, 10)
    turns.over(third)
    assert turns.waiting == 0
    assert turns.turn(first, "coder", 1, 1) is None


async def test_a_larger_engine_wakes_those_who_wait_and_models_do_not_wait_for_each_other() -> None:
    turns = Turns()
    assert turns.turn(exchange(user=1), "coder", 1, 1) is None
    waits = turns.turn(exchange(user=2), "coder", 1, 1)
    assert waits is not None
    assert turns.turn(exchange(user=3), "other", 1, 1) is None
    assert turns.turn(exchange(user=4), "coder", 3, 1) is None
    await asyncio.wait_for(waits, 10)


def test_behind_a_full_engine_a_chat_is_answered_before_the_queue_of_somebodys_agents(
    house: House, bobs_key: str, alice: Any, gateway: GatewayProcess, loop_thread: LoopThread
) -> None:
    engine = house.engine("small")
    alices_key = key_create(alice, name="chat", actor=actor_of(alice))[1]
    deployment = house.deploy("small", engine)
    version = deployment.version
    narrow = ProfileVersion.objects.create(
        profile=version.profile, number=2, model=version.model, engine="simulated", served_name="small",
        options={"max_num_seqs": 2},
    )  # fmt: skip
    Deployment.objects.filter(pk=deployment.pk).update(version=narrow)
    deployment.refresh_from_db()
    routes.open_to(deployment)
    house.applied(gateway)
    order: list[str] = []

    async def one(session: aiohttp.ClientSession, who: str, key: str) -> None:
        url = f"http://127.0.0.1:{gateway.port}/v1/chat/completions"
        body = chat("small", stream=True, chunks=4, pause_s=0.05)
        async with session.post(url, json=body, headers={"Authorization": f"Bearer {key}"}) as answer:
            assert answer.status == 200
            await answer.read()
        order.append(who)

    async def load() -> None:
        async with aiohttp.ClientSession() as session:
            agents = [asyncio.create_task(one(session, "agent", bobs_key)) for _ in range(20)]
            while len(engine.received) < 2:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            await one(session, "chat", alices_key)
            await asyncio.gather(*agents)

    # The bound is known about a second after the route is.
    until(lambda: gateway.metric("rigpanel_gateway_bounded_models") == 1, "the engine's bound was not learnt")
    loop_thread.run(load())
    assert len(order) == 21
    assert order.index("chat") <= 8, order


# -- an engine that runs less at once than it was told ---------------------------------------------


def test_turns_follow_what_an_engine_runs_and_widen_when_its_queue_is_gone() -> None:
    pace = Pace()
    pace.look(Load(2, 18), 20)
    assert pace.bound is None, "one look may meet what has just arrived"
    pace.look(Load(2, 18), 20)
    assert pace.bound == 3, "one waits inside, so that it never idles"
    pace.look(Load(2, 1), 3)
    assert pace.bound == 3
    for bound in (4, 5, 6, 7, 8, 10):
        pace.look(Load(2, 0), 3)
        assert pace.bound == bound
    for _ in range(2):
        pace.look(Load(40, 8), 24)
    assert pace.bound == 22, "another gateway has sent the other half"
    for _ in range(60):
        pace.look(Load(1, 0), 1)
    assert pace.bound is None


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50), st.integers(0, 100)), max_size=50))
def test_there_is_always_a_turn(looks: list[tuple[int, int, int]]) -> None:
    pace = Pace()
    for running, waiting, ours in looks:
        pace.look(Load(running, waiting), ours)
        assert pace.bound is None or pace.bound >= 1


@pytest.mark.parametrize(
    ("text", "load"),
    [
        ('vllm:num_requests_running{engine="0"} 3\nvllm:num_requests_waiting{engine="0"} 1.0\n', Load(3, 1)),
        ("llamacpp:requests_processing 4\nllamacpp:requests_deferred 0\n", Load(4, 0)),
        ("vllm:num_requests_running 3\n", None),
        ("<html>", None),
    ],
)
def test_engines_tell_their_queue_in_their_own_words(text: str, load: Load | None) -> None:
    assert load_in(text) == load


def test_twenty_agents_do_not_starve_a_chat_where_the_engine_runs_less_than_it_was_told(
    house: House, bobs_key: str, alice: Any, gateway: GatewayProcess, loop_thread: LoopThread, tmp_path: Path
) -> None:
    """The profile says 256 at once; the engine, as with long prompts, runs two and queues the rest."""
    alices_key = key_create(alice, name="chat", actor=actor_of(alice))[1]
    options = {"load_seconds": 0.1, "tokens_per_second": 40, "max_num_seqs": 2}
    engine = Running(tmp_path / "engine.log", SMALL, options)
    until(lambda: engine.health().status == 200, "the engine did not come up")
    deployment = house.deploy("small")
    Replica.objects.create(
        deployment=deployment, index=0, launch_id=f"d{deployment.pk}-r0", host="127.0.0.1", port=engine.port,
        base_url=f"http://127.0.0.1:{engine.port}", engine_key=KEY, healthy=True,
    )  # fmt: skip
    routes.open_to(deployment)
    house.applied(gateway)
    answered = Counter[str]()
    over = asyncio.Event()

    async def one(session: aiohttp.ClientSession, who: str, key: str) -> None:
        url = f"http://127.0.0.1:{gateway.port}/v1/chat/completions"
        body = chat("small", max_tokens=8, ignore_eos=True)
        async with session.post(url, json=body, headers={"Authorization": f"Bearer {key}"}) as answer:
            assert answer.status == 200, await answer.read()
            await answer.read()
        answered[who] += 1

    async def agent(session: aiohttp.ClientSession) -> None:
        while not over.is_set():
            await one(session, "agent", bobs_key)

    async def chats() -> int:
        """How often the agents were answered while a chat had five answers."""
        async with aiohttp.ClientSession() as session:
            before = answered["agent"]
            for _ in range(5):
                await one(session, "chat", alices_key)
            return answered["agent"] - before

    async def agents() -> None:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            await asyncio.gather(*(agent(session) for _ in range(20)))

    working = loop_thread.spawn(agents())
    try:
        until(
            lambda: gateway.metric("rigpanel_gateway_narrowed_models") == 1, "it was not seen that the engine is full"
        )
        until(lambda: waiting_in(engine.ask("/metrics")[1]) <= 2, "the engine's own queue did not shrink")
        meanwhile = loop_thread.run(chats())
    finally:
        loop_thread.loop.call_soon_threadsafe(over.set)
        working.result(60)
        engine.process.terminate()
        engine.process.wait(60)
    # In the engine's own queue each of the five would wait for the twenty before it.
    assert meanwhile <= 40, meanwhile


def waiting_in(metrics: bytes) -> float:
    load = load_in(metrics.decode())
    assert load is not None
    return load.waiting
