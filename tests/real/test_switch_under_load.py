"""Real llama.cpp switched in the middle of fifty streams and fifty waiting requests, while web and store are killed.

Both profiles run the same weights with different chat templates, so the number of tokens that a question became tells
which engine answered it, whatever name stands in the answer.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest

from tests.panel import Panel, wait_for

EACH = 50
TOKENS = 6
TEMPLATES = {"crowd-gemma": "gemma", "crowd-chatml": "chatml"}
QUESTION: list[dict[str, str]] = [{"role": "user", "content": "Name three colours."}]


@dataclass(frozen=True, slots=True)
class Heard:
    """``ended``: the answer came to its own end, not to an error's."""

    model: str
    tokens_in: int
    tokens_out: int
    ended: bool


class Crowd:
    """Clients in a thread of their own. ``began``: how many first pieces were heard of each model."""

    def __init__(self, panel: Panel) -> None:
        self.began: Counter[str] = Counter()
        self._url, self._key = f"{panel.gateway_url}/v1/chat/completions", panel.key()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def asks(self, model: str, tokens: int = TOKENS) -> Future[list[Heard]]:
        """Fifty at once: streams of the one, of the other every second one."""
        return asyncio.run_coroutine_threadsafe(self._all(model, tokens), self._loop)

    def end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)

    async def _all(self, model: str, tokens: int) -> list[Heard]:
        timeout = aiohttp.ClientTimeout(total=300)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            streams = model == "crowd-gemma"
            return await asyncio.gather(
                *(self._one(session, model, tokens, stream=streams or n % 2 == 0) for n in range(EACH))
            )

    async def _one(self, session: aiohttp.ClientSession, model: str, tokens: int, *, stream: bool) -> Heard:
        body: dict[str, Any] = {"model": model, "messages": QUESTION, "max_tokens": tokens, "ignore_eos": True}
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        async with session.post(self._url, json=body, headers={"Authorization": f"Bearer {self._key}"}) as answer:
            assert answer.status == 200, await answer.text()
            if not stream:
                return heard(await answer.json(), ended=True)
            last: dict[str, Any] = {}
            async for line in answer.content:
                if line.startswith(b"data: {"):
                    self.began[model] += not last
                    last = json.loads(line[6:])
                    assert "error" not in last, last
                elif line.startswith(b"data: [DONE]"):
                    return heard(last, ended=True)
            return heard(last, ended=False)


def heard(told: dict[str, Any], *, ended: bool) -> Heard:
    usage = told["usage"]
    return Heard(told["model"], usage["prompt_tokens"], usage["completion_tokens"], ended)


@pytest.fixture
def crowd(panel: Panel) -> Iterator[Crowd]:
    for slug, template in TEMPLATES.items():
        options = {"context_tokens": 96 * EACH, "parallel": EACH, "threads": 2, "chat_template": template}
        body = {"slug": slug, "name": slug, "model": "gemma-3-270m", "engine": "llama_cpp", "device": "cpu"}
        if panel.api(f"/profiles/{slug}").status == 404:
            made = panel.api("/profiles", {**body, "served_name": slug, "options": options})
            assert made.status == 201, made.text
    job = panel.finished(panel.switch("crowd-gemma", exclusive=True))
    assert job["state"] == "succeeded", job
    made_crowd = Crowd(panel)
    yield made_crowd
    made_crowd.end()


def ledger(panel: Panel) -> dict[str, Counter[str]]:
    names = ("requests", "interrupted", "failed", "unknown", "tokens_in", "tokens_out")
    items = panel.get("/usage?by=model")["items"]
    return {item["name"]: Counter({name: item[name] for name in names}) for item in items if item["name"] in TEMPLATES}


def grown(panel: Panel, before: dict[str, Counter[str]]) -> dict[str, dict[str, int]]:
    """What the ledger has more than before; without zeros."""
    return {name: dict(counted - before.get(name, Counter())) for name, counted in ledger(panel).items()}


def test_a_switch_under_load_loses_nothing_and_the_ledger_is_what_clients_counted(panel: Panel, crowd: Crowd) -> None:
    before = ledger(panel)
    streams = crowd.asks("crowd-gemma", tokens=6)
    wait_for("all streams have begun", lambda: streams.done() or crowd.began["crowd-gemma"] == EACH)
    assert not streams.done(), "the streams were over before the switch began"
    # So few tokens that they are said within the switch's 30 s of draining on a busy machine, too.
    job = panel.switch("crowd-chatml", exclusive=True)
    waiting = crowd.asks("crowd-chatml")
    panel.kill("web")
    panel.kill("store")
    old, new = streams.result(300), waiting.result(300)
    panel.wait_ready()
    assert panel.finished(job)["state"] == "succeeded"

    assert {(h.model, h.tokens_out, h.ended) for h in old} == {("crowd-gemma", 6, True)}
    assert {(h.model, h.tokens_out, h.ended) for h in new} == {("crowd-chatml", TOKENS, True)}
    # Each question became as many tokens as its own template makes of it.
    assert len({h.tokens_in for h in old}) == len({h.tokens_in for h in new}) == 1
    assert {h.tokens_in for h in old} != {h.tokens_in for h in new}
    counted = {
        name: {
            "requests": EACH,
            "tokens_in": sum(h.tokens_in for h in found),
            "tokens_out": sum(h.tokens_out for h in found),
        }
        for name, found in (("crowd-gemma", old), ("crowd-chatml", new))
    }

    def all_there() -> bool:
        return sum(found.get("requests", 0) for found in grown(panel, before).values()) >= 2 * EACH

    wait_for("every request is in the ledger", all_there)
    assert grown(panel, before) == counted


def test_streams_that_a_killed_gateway_cut_are_in_the_ledger_as_interrupted(panel: Panel, crowd: Crowd) -> None:
    before = ledger(panel)
    streams = crowd.asks("crowd-gemma", tokens=64)
    wait_for("all streams have begun", lambda: streams.done() or crowd.began["crowd-gemma"] == EACH)
    panel.kill("gateway")
    with pytest.raises((aiohttp.ClientError, AssertionError, KeyError)):
        streams.result(300)
    wait_for("the gateway answers again", lambda: panel.gateway("/models").status == 200)
    after = crowd.asks("crowd-gemma")
    assert {h.ended for h in after.result(300)} == {True}

    def told() -> dict[str, int] | None:
        found = grown(panel, before).get("crowd-gemma", {})
        return found if found.get("requests", 0) >= 2 * EACH and found.get("interrupted", 0) >= EACH else None

    found = wait_for("what was cut is interrupted", told)
    assert (found["requests"], found["interrupted"], found["tokens_out"]) == (2 * EACH, EACH, TOKENS * EACH)
