"""The gateway's side of the route epoch: stay current, say which epoch is applied, say what still runs.

A living gateway has a row (``GatewayProcess``). Deployments raises the epoch and waits until every living gateway
has acknowledged it; so the row is there before the first table is read, and an epoch is reported only after
its table is in force. What is lost on the way (a hint, a report) costs time, never truth.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Coroutine
from typing import Any

import redis.asyncio
import structlog
from django.conf import settings
from django.db import Error as DatabaseError

from apps.accounts.tokens import KEYS_EPOCH
from apps.common.identity import process_key
from apps.common.models import Epoch
from apps.common.store import HEARTBEAT_SECONDS, heartbeat
from apps.deployments.routes import ROUTES_CHANNEL, ROUTES_EPOCH, gateway_gone, gateway_seen, route_table
from apps.gateway.database import Worker
from apps.gateway.keys import KeyCache, keys_load, note_uses
from apps.gateway.limits import Limits
from apps.gateway.menu import menu_read
from apps.gateway.routes import RouteCache

log = structlog.get_logger(__name__)
KEYS_CHANNEL = "rigpanel:keys"
RETRY_S = 1.0


def epochs_read() -> dict[str, int]:
    rows = Epoch.objects.filter(name__in=[ROUTES_EPOCH, KEYS_EPOCH]).values_list("name", "value")
    return {ROUTES_EPOCH: 0, KEYS_EPOCH: 0, **dict(rows)}


class Registration:
    def __init__(self, routes: RouteCache, keys: KeyCache, limits: Limits) -> None:
        self.key = process_key()
        self._routes = routes
        self._keys = keys
        self._limits = limits
        self._reader = Worker("read")
        self._writer = Worker("write")
        self._store = Worker("store")
        self._tasks: list[asyncio.Task[None]] = []
        self._registered = False
        self._refreshing = asyncio.Lock()
        self._refresh_began = 0.0
        self._menu_at = -math.inf
        self._hinted = asyncio.Event()
        self._applied = asyncio.Event()
        self._silent: set[str] = set()  # what is down and was logged as such

    # -- life -----------------------------------------------------------------------------------

    async def start(self) -> None:
        """Register, read keys and routes, and keep all three going. Comes up without a database too."""
        await self.refresh_now()
        for work in (self._keep_current, self._keep_reporting, self._listen, self._beat):
            self._tasks.append(asyncio.create_task(_forever(work)))

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        try:
            await self._writer.run(note_uses, self._keys.take_uses())
            await self._writer.run(gateway_gone, self.key)
        except Exception as error:  # whoever waits for this gateway sees that its process is gone
            log.warning("gateway could not sign off", error=str(error))
        for worker in (self._reader, self._writer, self._store):
            await worker.close()

    # -- staying current ------------------------------------------------------------------------

    async def refresh_now(self) -> None:
        """Return after a look at the database that began after this call. Many callers share one look."""
        asked = time.monotonic()
        async with self._refreshing:
            if self._refresh_began < asked:
                self._refresh_began = time.monotonic()
                await self._refresh()

    async def menu_now(self) -> None:
        """A menu that is not older than a second: somebody asks for what is not on the one that is known."""
        began = time.monotonic()
        if self._registered and began - self._menu_at > 1.0:
            try:
                await self._read_menu(began)
            except DatabaseError as error:
                self._went_down("database", error)

    async def _refresh(self) -> None:
        began = time.monotonic()
        try:
            if not self._registered:
                await self._writer.run(gateway_seen, self.key, epoch=0, in_flight={})
                self._registered = True
            epochs = await self._reader.run(epochs_read)
            # Different, not only newer: a restored backup sets epochs back.
            if self._keys.epoch != epochs[KEYS_EPOCH]:
                self._keys.apply(epochs[KEYS_EPOCH], await self._reader.run(keys_load))
            self._keys.confirmed_at = began
            changed = self._routes.epoch != epochs[ROUTES_EPOCH]
            table = await self._reader.run(route_table) if changed else None
            # After the table: whoever sees an epoch applied also finds the profiles that were there when it began.
            if changed or began - self._menu_at > self._limits.menu_s:
                await self._read_menu(began)
            if table is not None:
                self._routes.apply(table)
                self._applied.set()
            self._routes.confirmed_at = began
        except Exception as error:
            self._went_down("database", error)
        else:
            self._came_back("database")

    async def _read_menu(self, began: float) -> None:
        """What could be loaded. Without it the old menu stays: routes must not wait for it."""
        self._menu_at = began
        try:
            self._routes.menu = await self._reader.run(menu_read)
        except DatabaseError:
            raise
        except Exception:
            log.exception("the models that could be loaded cannot be read")

    async def _keep_current(self) -> None:
        while True:
            await _set_within(self._hinted, self._limits.poll_s)
            await self.refresh_now()

    async def _listen(self) -> None:
        """Hints from the store make the next look sooner; without it the poll finds the same."""
        while True:
            client = redis.asyncio.Redis.from_url(settings.REDIS_URL, socket_connect_timeout=2)
            try:
                async with client.pubsub(ignore_subscribe_messages=True) as channel:
                    await channel.subscribe(ROUTES_CHANNEL, KEYS_CHANNEL)
                    self._came_back("store")
                    async for _ in channel.listen():
                        self._hinted.set()
            except (redis.RedisError, OSError) as error:
                self._went_down("store", error)
            finally:
                await client.aclose()
            await asyncio.sleep(RETRY_S)

    # -- reporting ------------------------------------------------------------------------------

    async def _keep_reporting(self) -> None:
        """Acknowledge an epoch at once, report counts often while something drains, else be seen now and then."""
        reported_epoch: int | None = None
        reported: dict[int, int] = {}
        reported_at = 0.0
        while True:
            await _set_within(self._applied, self._limits.report_s)
            # Epoch and counts are taken in one step of the loop: every request that went by an older
            # table and still runs is in these counts.
            epoch, counts = self._routes.epoch, self._routes.in_flight()
            draining = self._routes.any_held or not (counts.keys() | reported.keys()) <= self._routes.open_deployments()
            due = (
                epoch != reported_epoch
                or (counts != reported and (draining or time.monotonic() - reported_at >= self._limits.counts_s))
                or time.monotonic() - reported_at >= self._limits.heartbeat_s
            )
            if epoch is None or not due:
                continue
            uses = self._keys.take_uses()
            try:
                await self._writer.run(gateway_seen, self.key, epoch=epoch, in_flight=counts)
                reported_epoch, reported, reported_at = epoch, counts, time.monotonic()
                await self._writer.run(note_uses, uses)
            except Exception as error:
                self._keys.give_back(uses)
                self._went_down("database (writing)", error)
                await asyncio.sleep(RETRY_S)
            else:
                self._came_back("database (writing)")

    async def _beat(self) -> None:
        """Tell /readyz. In a thread: a store that hangs must not hold up a stream."""
        while True:
            try:
                await self._store.run(heartbeat, "gateway", settings.RIG_NAME, epoch=self._routes.epoch)
            except redis.RedisError as error:
                self._went_down("store", error)
            await asyncio.sleep(HEARTBEAT_SECONDS)

    # -- saying once what is down ---------------------------------------------------------------

    def _went_down(self, what: str, error: Exception) -> None:
        if what not in self._silent:
            self._silent.add(what)
            log.warning("out of reach, going on with what is known", what=what, error=str(error))

    def _came_back(self, what: str) -> None:
        if what in self._silent:
            self._silent.discard(what)
            log.info("back in reach", what=what)


async def _set_within(event: asyncio.Event, limit_s: float) -> None:
    """Until the event is set, or the time is over; the event is cleared."""
    with contextlib.suppress(TimeoutError):
        # Not wait_for: before Python 3.12 it loses a cancellation that comes with the event.
        async with asyncio.timeout(limit_s):
            await event.wait()
    event.clear()


async def _forever(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Keep a background loop going. One that ends is our bug; without it the gateway would go stale unseen."""
    while True:
        try:
            await work()
        except Exception:
            log.exception("a background loop of the gateway ended and is started again")
        await asyncio.sleep(RETRY_S)
