"""The observer of a real gateway: writes the ledger, keeps quotas, gives turns.

The database is asked beside the requests, by a thread: for changed quotas every second, for what the ledger holds every
five, and only while there are quotas at all.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path

import redis
import structlog
from django.conf import settings
from django.db import Error
from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from apps.common.store import heartbeat
from apps.gateway.database import Worker
from apps.gateway.fairness import Turns
from apps.gateway.ledger import import_folder
from apps.gateway.models import UsageSpool
from apps.gateway.observer import Exchange, Observer
from apps.gateway.pace import UNBOUNDED, Looker, Pace
from apps.gateway.quotas import Quotas
from apps.gateway.routes import RouteCache
from apps.gateway.selectors import LEDGER_HEARTBEAT, engine_slots, known_elsewhere, quota_epoch, quota_table
from apps.gateway.spool import Segment, Spool

log = structlog.get_logger(__name__)
LOOK_EVERY_S = 1.0
PACE_EVERY_S = 0.5
PACE_FROM = 2  # requests under way: one alone waits for nobody's
REFUSALS_MAX = 5000  # kinds of refusals (minute, person, key, model, reason) in memory before they are written
LEARN_EVERY_S = 5.0
TELL_EVERY_S = 5.0


class State(Collector):
    """Read when asked."""

    def __init__(self, accounting: Accounting) -> None:
        self._accounting = accounting

    def collect(self) -> Iterable[Metric]:
        spool = self._accounting.spool
        yield _gauge("rigpanel_gateway_ledger_ok", "1 while the ledger's lines reach the disk.", not spool.trouble)
        yield _gauge("rigpanel_gateway_ledger_waiting", "Ledger lines kept in memory.", spool.waiting_lines)
        yield _gauge("rigpanel_gateway_ledger_lost", "Ledger lines that were lost.", spool.lost_lines)
        yield _gauge("rigpanel_gateway_queued", "Requests that wait for a turn.", self._accounting.turns.waiting)
        bounded = self._accounting.bounded_models
        yield _gauge("rigpanel_gateway_bounded_models", "Models whose engines say how much they run at once.", bounded)
        narrowed = self._accounting.narrowed_models
        yield _gauge("rigpanel_gateway_narrowed_models", "Models whose engines run less at once than that.", narrowed)


def _gauge(name: str, text: str, value: float) -> Metric:
    gauge = GaugeMetricFamily(name, text)
    gauge.add_metric([], float(value))
    return gauge


class Accounting(Observer):
    """``folder`` is where the spool files lie."""

    def __init__(self, folder: Path) -> None:
        self.spool = Spool(folder)
        self.quotas = Quotas(settings.PANEL_TIME_ZONE)
        self.turns = Turns()
        self.routes: RouteCache | None = None
        self._refusals: Counter[tuple[int, int, int, str, str]] = Counter()
        self._marks: dict[int, tuple[Segment, int]] = {}  # by id() of the exchange that is under way
        self._slots: dict[int, int | None] = {}  # by profile version
        self._paces: dict[str, Pace] = {}  # by served name, while requests for it are under way
        self._looker = Looker()
        self._worker = Worker("ledger")
        self._tasks: list[asyncio.Task[None]] = []
        self._read_offset = -1
        self._read_moved_at = time.monotonic()

    def attach(self, routes: RouteCache, registry: CollectorRegistry) -> None:
        """The gateway that is observed, once it is made."""
        self.routes = routes
        registry.register(State(self))

    async def start(self) -> None:
        """Begin with what the ledger knows; without a database begin with nothing and learn later."""
        for work in (self._read_once, self._look_at_quotas, self._learn):
            await self._try(work, "at the start")
        works = (self._keep, self._tell, self._keep_pace)
        self._tasks = [asyncio.create_task(work()) for work in works]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._write_refusals()
        self.spool.close()
        self._looker.close()
        await self._worker.close()

    # -- on the hot path --------------------------------------------------------------------------

    def admit(self, exchange: Exchange) -> None:
        self.quotas.admit(exchange)

    def refused(self, *, user_id: int, key_id: int, model: str, code: str) -> None:
        """Counted, not written one by one: a client that does not stop asking must not fill the disk."""
        minute = int(time.time() // 60) * 60
        self._refusals[minute, user_id, key_id, self._known(model), code] += 1
        if len(self._refusals) >= REFUSALS_MAX:
            self._write_refusals()

    def _write_refusals(self) -> None:
        refusals, self._refusals = self._refusals, Counter()
        for refusal, count in refusals.items():
            self.spool.refused(*refusal, count)

    def open(self, exchange: Exchange) -> None:
        self.quotas.opened(exchange)
        mark = self.spool.opened(exchange, self._known(exchange.model))
        if mark is not None:
            self._marks[id(exchange)] = mark

    def turn(self, exchange: Exchange) -> asyncio.Future[None] | None:
        turns = self._turns_of(exchange.model)
        return self.turns.turn(exchange, exchange.model, turns, self.quotas.share(exchange.user_id))

    def turn_over(self, exchange: Exchange) -> None:
        self.turns.over(exchange)

    def close(self, exchange: Exchange) -> None:
        mark = self._marks.pop(id(exchange), None)
        if mark is not None:
            self.spool.closed(mark, exchange, self._known(exchange.model))
            self.quotas.closed(exchange, mark[0].name, mark[0].promised_bytes)
        else:
            self.quotas.closed(exchange, "", 0)

    def _known(self, model: str) -> str:
        """A name that is served here. What else a client wrote there is not kept: it may be anything."""
        routes = self.routes
        return model if routes is None or routes.entry(model) is not None else ""

    @property
    def bounded_models(self) -> int:
        names = self.routes.names() if self.routes is not None else []
        return sum(self._slots_of(name) is not None for name in names)

    @property
    def narrowed_models(self) -> int:
        return sum(self._turns_of(name) < (self._slots_of(name) or UNBOUNDED) for name in self._paces)

    def _turns_of(self, model: str) -> int:
        """How many turns there are at once: what its engines are said to run, or what they are seen to run if less."""
        pace = self._paces.get(model)
        seen = UNBOUNDED if pace is None or pace.bound is None else pace.bound
        return min(self._slots_of(model) or UNBOUNDED, seen)

    def _slots_of(self, model: str) -> int | None:
        """How many requests all engines of a model run at once; None where one of them does not say."""
        entry = self.routes.entry(model) if self.routes is not None else None
        if entry is None or not entry.targets:
            return None
        total = 0
        for target in entry.targets:
            slots = self._slots.get(target.version_id) if target.version_id is not None else None
            if slots is None:
                return None
            total += slots
        return total

    # -- beside it --------------------------------------------------------------------------------

    async def _keep(self) -> None:
        learned_at = 0.0
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            if self.spool.trouble or self.spool.waiting_lines:
                self.spool.flush()
            await self._try(self._look_at_quotas, "quotas")
            await self._try(self._look_at_slots, "slots")
            if time.monotonic() - learned_at >= LEARN_EVERY_S:
                learned_at = time.monotonic()
                self._write_refusals()
                await self._try(self._learn, "use")
                await self._try(self._read_if_nobody_does, "ledger")

    async def _keep_pace(self) -> None:
        while True:
            await asyncio.sleep(PACE_EVERY_S)
            await self._try(self._look_at_engines, "engines")

    async def _look_at_engines(self) -> None:
        """Ask the engines of every model of which several requests are under way how many they run."""
        lanes = self.turns.lanes()
        self._paces = {model: self._paces.get(model) or Pace() for model in lanes}
        for model, ours in lanes.items():
            entry = self.routes.entry(model) if self.routes is not None else None
            if entry is None or ours < PACE_FROM:
                continue
            load = await self._looker.load(entry.targets)
            if load is None:
                self._paces[model] = Pace()
            else:
                self._paces[model].look(load, self.turns.lanes().get(model, 0))
            self.turns.resize(model, self._turns_of(model))

    async def _try(self, work: Callable[[], Awaitable[None]], what: str) -> None:
        try:
            await work()
        except Error as error:  # the database is away: what is known goes on to count
            log.debug("database not reached", what=what, error=str(error))
        except Exception:
            log.exception("work beside the requests failed", what=what)

    async def _look_at_quotas(self) -> None:
        if await self._worker.run(quota_epoch) != self.quotas.table.epoch:
            was_empty = self.quotas.table.is_empty
            self.quotas.table = await self._worker.run(quota_table)
            if was_empty:
                await self._learn()

    async def _look_at_slots(self) -> None:
        table = self.routes.table if self.routes is not None else None
        if table is None:
            return
        versions = {t.version_id for entry in table.routes for t in entry.targets if t.version_id is not None}
        if versions - self._slots.keys():
            self._slots = await self._worker.run(engine_slots, versions)

    async def _learn(self) -> None:
        if self.quotas.table.is_empty:
            return
        names, pending = set(self.spool.names), self.quotas.pending_files
        self.quotas.learn(*await self._worker.run(known_elsewhere, names, pending))

    async def _read_once(self) -> None:
        """What a process before this one left behind counts from the first request on."""
        await self._worker.run(import_folder, self.spool.folder)

    async def _read_if_nobody_does(self) -> None:
        """The control worker reads every two seconds. Where none does (a container, another machine), this one does."""
        name, written = self.spool.position()
        if not written:
            return
        offset = await self._worker.run(read_offset, name)
        now = time.monotonic()
        if offset != self._read_offset or offset >= written:
            self._read_offset, self._read_moved_at = offset, now
        elif now - self._read_moved_at >= settings.USAGE_UNREAD_SECONDS:
            await self._worker.run(import_folder, self.spool.folder)

    async def _tell(self) -> None:
        """Pages say when the ledger's disk is full. A store that is away is told later."""
        worker = Worker("ledger-tell")
        try:
            while True:
                with contextlib.suppress(redis.RedisError):
                    await worker.run(tell, self.spool.trouble, self.spool.waiting_lines)
                await asyncio.sleep(TELL_EVERY_S)
        finally:
            await worker.close()


def tell(trouble: str, waiting_lines: int) -> None:
    heartbeat(LEDGER_HEARTBEAT, settings.RIG_NAME, trouble=trouble, waiting_lines=waiting_lines)


def read_offset(name: str) -> int:
    row = UsageSpool.objects.filter(name=name).values_list("offset", flat=True).first()
    return 0 if row is None else int(row)
