"""A real switch of simulated engines in the middle of fifty streams and fifty waiting requests."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest

from apps.common.actors import actor_of
from apps.deployments.services import switch_request
from apps.jobs.models import Job, JobState
from tests.deployments.conftest import sim_rig  # noqa: F401 - a fixture
from tests.factories.profiles import simulated_profile
from tests.gateway.helpers import DEADLINE_S, LoopThread, chat, until
from tests.gateway.test_wishes import house, key, worker  # noqa: F401 - fixtures

pytestmark = pytest.mark.django_db(transaction=True)
EACH = 50
TOKENS = 40


def test_no_request_is_lost_or_answered_by_the_wrong_model(
    worker: None,  # noqa: F811
    within: Callable[..., Any],
    loop_thread: LoopThread,
    key: str,  # noqa: F811
    alice: Any,
) -> None:
    old = simulated_profile("old", tokens_per_second=30.0)
    new = simulated_profile("new", tokens_per_second=400.0)
    first = switch_request(profile=old, actor=actor_of(alice))
    until(lambda: Job.objects.get(pk=first.pk).state == JobState.SUCCEEDED, "the first model did not come up")
    gateway = within()
    began: list[str] = []

    async def ask(session: aiohttp.ClientSession, model: str) -> tuple[str, list[str], str]:
        """Its status, the models that its events name, and how it ended."""
        body = chat(model, stream=True, max_tokens=TOKENS)
        url = f"http://127.0.0.1:{gateway.port}/v1/chat/completions"
        async with session.post(url, json=body, headers={"Authorization": f"Bearer {key}"}) as answer:
            events = []
            async for line in answer.content:
                if line.startswith(b"data: {"):
                    events.append(json.loads(line[6:]))
                    began.append(model)
                elif line.startswith(b"data: [DONE]"):
                    break
        models = {event.get("model", str(event)) for event in events}
        return str(answer.status), sorted(models), str(events[-1]["choices"][0]["finish_reason"])

    async def many(model: str) -> list[tuple[str, list[str], str]]:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as session:
            return await asyncio.gather(*(ask(session, model) for _ in range(EACH)))

    streams = loop_thread.spawn(many("old"))
    until(lambda: len(began) >= EACH or streams.done(), "the streams did not begin")
    switch_request(profile=new, actor=actor_of(alice))
    until(lambda: gateway.gateway.routes.any_held, "traffic is not held")
    waiting = loop_thread.spawn(many("new"))

    assert waiting.result(DEADLINE_S) == [("200", ["new"], "length")] * EACH
    assert streams.result(DEADLINE_S) == [("200", ["old"], "length")] * EACH
