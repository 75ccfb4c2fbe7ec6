"""The route table in memory, who waits for it, and how many requests run where.

All of it belongs to the event loop's thread: between reading a route and counting a request there is
no ``await``, so a request is either counted by the report that acknowledges an epoch, or goes by that epoch's table.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime

from django.utils import timezone

from apps.deployments.models import RouteState
from apps.deployments.routes import RouteEntry, RouteTable, Target
from apps.gateway.menu import LOADED, LOADING, Menu

CONVERSATIONS_MAX = 20_000  # some 3 MiB
CLEARLY_BUSIER = 4  # requests
DOWN_S = 3.0


class RouteCache:
    """What ``deployments.routes.route_table`` said last."""

    def __init__(self) -> None:
        self.table: RouteTable | None = None
        self.menu = Menu()
        self.confirmed_at: float | None = None  # time.monotonic() of the last look that found it current
        self.loaded_at = 0
        self._entries: dict[str, RouteEntry] = {}
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        self._running: Counter[tuple[int, str]] = Counter()  # (deployment id, base URL)
        self._turn = itertools.count(1)
        self._last_turn: dict[str, int] = {}  # base URL: when it was last chosen
        self.on_apply: Callable[[], None] = lambda: None
        self._down_until: dict[str, float] = {}  # base URL: time.monotonic()
        self._conversations: dict[int, str] = {}  # hash of a beginning: base URL that answered last; oldest first

    # -- the table ------------------------------------------------------------------------------

    @property
    def epoch(self) -> int | None:
        """The epoch that is applied, or None before the first."""
        return None if self.table is None else self.table.epoch

    def apply(self, table: RouteTable) -> None:
        """Go by this table from now on, and wake those whose route is no longer held, first come first."""
        self.table = table
        self.loaded_at = int(time.time())
        self._entries = {entry.served_name: entry for entry in table.routes}
        urls = {target.base_url for entry in table.routes for target in entry.targets}
        self._last_turn = {url: turn for url, turn in self._last_turn.items() if url in urls}
        self._down_until = {url: until for url, until in self._down_until.items() if url in urls}
        for name in [name for name in self._waiting if not self.is_held(name)]:
            for future in self._waiting.pop(name):
                if not future.done():
                    future.set_result(None)
        self.on_apply()

    def entry(self, served_name: str) -> RouteEntry | None:
        return self._entries.get(served_name)

    def names(self) -> list[str]:
        return list(self._entries)

    def state(self, served_name: str) -> str:
        """``loaded``, ``loading``, ``sleeping`` or ``unloaded``."""
        entry = self._entries.get(served_name)
        if entry is not None and entry.state == RouteState.OPEN and entry.targets:
            return LOADED
        if entry is not None and entry.state == RouteState.HELD:
            return self.menu.states.get(served_name, LOADING)
        state = self.menu.state(served_name)
        return LOADING if state == LOADED else state  # it serves, but this gateway has no route of it yet

    def is_held(self, served_name: str) -> bool:
        entry = self._entries.get(served_name)
        return entry is not None and entry.state == RouteState.HELD

    @property
    def any_held(self) -> bool:
        return any(entry.state == RouteState.HELD for entry in self._entries.values())

    # -- waiting --------------------------------------------------------------------------------

    @contextmanager
    def queue(self, served_name: str) -> Iterator[asyncio.Future[None]]:
        """A place in the queue for a held route: a future that is done once it is not held any more."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting = self._waiting.setdefault(served_name, deque())
        waiting.append(future)
        try:
            yield future
        finally:
            if not future.done():
                waiting.remove(future)
                if not waiting and self._waiting.get(served_name) is waiting:
                    del self._waiting[served_name]

    @property
    def waiting(self) -> int:
        return sum(len(futures) for futures in self._waiting.values())

    # -- requests under way ---------------------------------------------------------------------

    def pick(self, targets: tuple[Target, ...], conversation: int | None = None) -> Target:
        """The one with the fewest requests of ours under way; among equals the one not chosen for longest.

        A conversation goes on where it was last, because its prefix lies in that replica's cache, unless that one is
        clearly busier than the least busy: a prefix is computed again in less time than a queue takes.
        """
        if len(targets) == 1:
            return targets[0]
        now = time.monotonic()
        # A dead host costs seconds until connecting gives up: everybody after the first goes elsewhere at once.
        targets = tuple(t for t in targets if self._down_until.get(t.base_url, 0.0) <= now) or targets
        chosen = min(targets, key=lambda t: (self._load(t), self._last_turn.get(t.base_url, 0)))
        if conversation is not None:
            before = self._conversations.pop(conversation, None)
            same = next((t for t in targets if t.base_url == before), None)
            if same is not None and self._load(same) < 2 * self._load(chosen) + CLEARLY_BUSIER:
                chosen = same
            self._conversations[conversation] = chosen.base_url  # at the end: the youngest
            if len(self._conversations) > CONVERSATIONS_MAX:
                del self._conversations[next(iter(self._conversations))]
        self._last_turn[chosen.base_url] = next(self._turn)
        return chosen

    def was_down(self, base_url: str) -> None:
        """It could not be reached: others are asked first for a while."""
        self._down_until[base_url] = time.monotonic() + DOWN_S

    def _load(self, target: Target) -> int:
        return self._running[target.deployment_id, target.base_url]

    @contextmanager
    def under_way(self, target: Target) -> Iterator[None]:
        """Count a request for as long as the block runs, however it ends."""
        key = (target.deployment_id, target.base_url)
        self._running[key] += 1
        try:
            yield
        finally:
            self._running[key] -= 1
            if not self._running[key]:
                del self._running[key]

    def in_flight(self) -> dict[int, int]:
        """Requests under way per deployment id; those with none are left out."""
        counts: Counter[int] = Counter()
        for (deployment_id, _), count in self._running.items():
            counts[deployment_id] += count
        return dict(counts)

    def open_deployments(self) -> set[int]:
        return {target.deployment_id for entry in self._entries.values() for target in entry.targets}


def seconds_left(eta_at: datetime | None) -> float | None:
    """Until ``eta_at``; negative when it has passed, None when it is not known."""
    return None if eta_at is None else (eta_at - timezone.now()).total_seconds()
