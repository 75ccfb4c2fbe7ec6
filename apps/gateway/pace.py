"""How many requests an engine really runs at once, seen at its own /metrics.

A profile's bound (``max_num_seqs``, ``parallel``) is the most that an engine takes; with long prompts or a small cache
it runs fewer, and what is more waits inside it, first come first served, where nobody's turn counts. So while an engine
has a queue of its own, turns are given for what it runs and a little more, that it never idles; when it has none they
widen again.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from apps.deployments.routes import Target
from apps.engines.prometheus import Exposition
from apps.gateway.answer import BrokenAnswer, Disconnected
from apps.gateway.upstream import NotConnected, Upstream

UNBOUNDED = 100_000
LOOKS_UNTIL_FULL = 2  # one look may meet requests that arrived a moment ago and are taken in the next step
LIMIT_S = 2.0
TEXT_BYTES_MAX = 4 * 1024 * 1024
MUTE_FOR_S = 60.0  # an engine that does not say is not asked for so long
RUNNING = ("vllm:num_requests_running", "llamacpp:requests_processing")
WAITING = ("vllm:num_requests_waiting", "llamacpp:requests_deferred")


@dataclass(frozen=True, slots=True)
class Load:
    """Requests that run and that wait inside of all engines of a model."""

    running: float
    waiting: float


class Pace:
    """Of one model; pure. ``bound`` is None while what is configured is right."""

    def __init__(self) -> None:
        self.bound: int | None = None
        self._lately: deque[float] = deque(maxlen=3)  # what ran at the last looks that met a queue

    def look(self, load: Load, ours: int) -> None:
        """``ours``: how many of these requests this gateway has sent; others send theirs."""
        if load.waiting >= 1:
            self._lately.append(load.running)
            if len(self._lately) >= LOOKS_UNTIL_FULL:
                runs = max(self._lately)
                our_part = min(1.0, ours / (load.running + load.waiting))
                self.bound = max(1, round((runs + max(1, runs // 8)) * our_part))
            return
        self._lately.clear()
        if self.bound is not None:
            self.bound += max(1, self.bound // 4)
            if self.bound >= UNBOUNDED:
                self.bound = None


def load_in(text: str) -> Load | None:
    """What an engine's metrics say of its queue; None when they say nothing."""
    names = (*RUNNING, *WAITING)
    metrics = Exposition("\n".join(line for line in text.splitlines() if line.startswith(names)))
    running = next((v for name in RUNNING if (v := metrics.total(name)) is not None), None)
    waiting = next((v for name in WAITING if (v := metrics.total(name)) is not None), None)
    return None if running is None or waiting is None else Load(running, waiting)


class Looker:
    """Asks engines; belongs to the event loop's thread."""

    def __init__(self) -> None:
        self._upstream = Upstream(connect_s=LIMIT_S)
        self._mute_until: dict[str, float] = {}  # base URL: time.monotonic()

    def close(self) -> None:
        self._upstream.close()

    async def load(self, targets: Sequence[Target]) -> Load | None:
        """All of them together; None when one of them does not say."""
        now = time.monotonic()
        self._mute_until = {url: until for url, until in self._mute_until.items() if until > now}
        if not targets or any(target.base_url in self._mute_until for target in targets):
            return None
        told = await asyncio.gather(*(self._ask(target) for target in targets))
        if any(load is None for load in told):
            return None
        return Load(sum(load.running for load in told if load), sum(load.waiting for load in told if load))

    async def _ask(self, target: Target) -> Load | None:
        headers = [(b"authorization", b"Bearer " + target.engine_key.encode())]
        load = None
        with contextlib.suppress(NotConnected, Disconnected, BrokenAnswer, TimeoutError):
            async with asyncio.timeout(LIMIT_S):
                answer = await self._upstream.ask(target.base_url, "GET", "/metrics", headers)
                try:
                    if answer.status == 200:
                        load = load_in((await answer.read(TEXT_BYTES_MAX)).decode("utf-8", "replace"))
                finally:
                    answer.release()
            if load is None:
                self._mute_until[target.base_url] = time.monotonic() + MUTE_FOR_S
        return load
