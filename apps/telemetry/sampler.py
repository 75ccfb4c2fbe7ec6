"""The sampler: one process per rig that owns the driver, publishes readings and stores their means.

It goes on through everything around it: with the database away means wait in memory, with the store
away frames are dropped, with the driver away it says why and tries again. It never makes readings up.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import redis
import structlog
from django.db import DatabaseError, InterfaceError, close_old_connections

from apps.common.realtime import page_changed, telemetry_frame
from apps.common.store import HEARTBEAT_SECONDS, heartbeat
from apps.hardware.detect import choose_driver, open_driver
from apps.hardware.protocol import HardwareError, Inventory, Reading
from apps.hardware.server import HardwareServer
from apps.rigs.models import Rig
from apps.rigs.services import hardware_failed, inventory_sync
from apps.telemetry import alerts
from apps.telemetry.frames import GPU_FIELDS, FrameBuilder, keep
from apps.telemetry.services import SpanMeans, samples_store

log = structlog.get_logger(__name__)
IDLE_SECONDS = 1.0
WATCHED_SECONDS = 0.2
INVENTORY_SECONDS = 15.0
RETRY_MAX_SECONDS = 30.0
HANG_GRACE_SECONDS = 1.5  # a reading that takes longer after the order to stop hangs
# An hour of four cards at ten seconds: what a database that is away may cost in memory.
PENDING_ROWS_MAX = 1440
DATABASE_AWAY = (DatabaseError, InterfaceError)


class Sampler:
    """``run`` returns after ``stop`` was set. ``hardware`` is RIGPANEL_HARDWARE's value."""

    def __init__(
        self, rig_name: str, hardware: str, socket_path: str | Path, stop: threading.Event | None = None
    ) -> None:
        self.rig_name = rig_name
        self.stop = stop or threading.Event()
        self._ended = threading.Event()
        self._hardware = hardware
        self._socket_path = Path(socket_path)
        self._server: HardwareServer | None = None
        self._source = ""
        self._rig: Rig | None = None
        self._frames = FrameBuilder()
        self._means = SpanMeans()
        self._pending: deque[dict[str, Any]] = deque(maxlen=PENDING_ROWS_MAX)
        self._inventory: Inventory | None = None
        self._synced: tuple[Inventory, frozenset[str]] | None = None
        self._read_at: float | None = None
        self._alerts: tuple[tuple[str, str], ...] = ()
        self._failure = ""
        self._failures = 0
        self._watched = False
        self._due: dict[str, float] = {}
        self._away: set[str] = set()  # what is away and was said so

    # -- life --

    def run(self) -> None:
        """Sample until told to stop."""
        try:
            while not self.stop.is_set():
                if self._server is None and not self._open():
                    self._wait_to_retry()
                    continue
                began = time.monotonic()
                if self._tick(began):
                    pace = WATCHED_SECONDS if self._watched else IDLE_SECONDS
                    self.stop.wait(max(0.0, began + pace - time.monotonic()))
                else:
                    self._wait_to_retry()
        finally:
            self._store_means(force=True)
            self._close()
            self._ended.set()

    def end(self) -> None:
        """Stop soon, also out of a reading that hangs in the simulation. Safe in a signal handler: all is
        done in a thread of its own, because the interrupted one may hold the very locks this needs."""
        threading.Thread(target=self._end, name="sampler-end", daemon=True).start()

    def _end(self) -> None:
        self.stop.set()
        server = self._server
        if not self._ended.wait(HANG_GRACE_SECONDS) and server is not None:
            server.close()

    def _open(self) -> bool:
        """Choose and open the driver and serve it; False (and said why) when that did not work."""
        self._beat()
        rig = self._rig_row()
        if rig is None:
            return False
        try:
            choice = choose_driver(self._hardware, ran_nvml_before=rig.ran_nvml)
            self._source = choice.partition(":")[0]
            driver = open_driver(choice, rig_name=self.rig_name)
        except HardwareError as error:
            self._driver_failed(error)
            return False
        server = HardwareServer(driver, self._socket_path)
        try:
            server.start()
        except HardwareError as error:
            # Another sampler, or the folder: says nothing about the cards, so their state stays.
            driver.close()
            self._say_once("socket", str(error))
            self._failures += 1
            return False
        self._is_back("socket")
        self._server = server
        log.info("sampling", rig=self.rig_name, source=server.source)
        return True

    def _close(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            with contextlib.suppress(HardwareError):
                server.close()

    # -- one tick --

    def _tick(self, now: float) -> bool:
        """Read once and pass it on. False when the cards could not be read."""
        server = self._server
        if server is None:
            return False
        try:
            if self._is_due("inventory", now, INVENTORY_SECONDS) or self._inventory is None:
                self._inventory = server.inventory()
            reading = server.read()
        except HardwareError as error:
            self._beat()
            self._driver_failed(error)
            return False
        if self.stop.is_set():
            return True
        self._failures, self._failure = 0, ""
        self._sync(self._inventory, reading)
        self._read_at = reading.at
        frame = self._frame(reading)
        for row in self._means.add(reading, frame):
            self._pending.append(row)
        self._publish(frame, now)
        if self._pending:
            self._store_means()
        self._beat()
        return True

    def _frame(self, reading: Reading) -> dict[str, Any]:
        frame = self._frames.build(reading)
        by_uuid = {
            u: dict(zip(GPU_FIELDS, row, strict=True)) for u, row in zip(frame["uuids"], frame["gpus"], strict=True)
        }
        cards = self._inventory.gpus if self._inventory else ()
        now_active = alerts.active(cards, by_uuid, self._alerts)
        frame["alerts"] = [list(a) for a in now_active]
        if now_active != self._alerts:
            self._alerts = now_active
            rig = self._rig
            if rig is not None:
                self._with_database(lambda: page_changed("rig", rig=rig.pk))
        return frame

    def _publish(self, frame: dict[str, Any], now: float) -> None:
        if self._is_due("keep", now, IDLE_SECONDS - 0.05):
            try:
                self._watched = keep(self.rig_name, frame)
                self._is_back("store")
            except redis.RedisError as error:
                self._watched = False
                self._say_once("store", f"The store is away, live frames are dropped: {error}")
        if self._watched:
            telemetry_frame(self.rig_name, frame)

    def _sync(self, inventory: Inventory | None, reading: Reading) -> None:
        """Write the inventory when it, or the set of lost cards, differs from what was written last."""
        rig = self._rig
        if inventory is None or rig is None:
            return
        lost = frozenset(g.uuid for g in reading.gpus if g.lost)
        if (inventory, lost) == self._synced:
            return

        # The last good reading before this one, if this process made it.
        seen_until = None if self._read_at is None else datetime.fromtimestamp(self._read_at, UTC)

        def write() -> None:
            rig.refresh_from_db()
            change = inventory_sync(rig, inventory, lost, seen_until=seen_until)
            self._synced = (inventory, lost)
            log.info(
                "inventory",
                cards=len(inventory.gpus) - len(lost),
                links=len(inventory.links),
                missing=list(change.missing),
            )

        self._with_database(write)

    # -- what goes wrong --

    def _driver_failed(self, error: HardwareError) -> None:
        """Say once per sentence why the cards cannot be read; live data then goes stale by itself."""
        self._failures += 1
        self._synced = None  # the next good reading writes the inventory and takes the error away
        sentence = str(error)
        if sentence == self._failure:
            return
        log.error("the cards cannot be read", error=sentence)
        rig, source = self._rig, self._source

        def write() -> None:
            if rig is not None:
                hardware_failed(rig, source, sentence)
            self._failure = sentence

        self._with_database(write)

    def _wait_to_retry(self) -> None:
        seconds = min(RETRY_MAX_SECONDS, 2.0 ** min(self._failures, 5))
        deadline = time.monotonic() + seconds * random.uniform(0.8, 1.0)  # noqa: S311 - jitter
        while not self.stop.is_set() and (left := deadline - time.monotonic()) > 0:
            self.stop.wait(min(left, HEARTBEAT_SECONDS))
            self._beat()

    def _rig_row(self) -> Rig | None:
        """This rig's row, made on first use; None while the database is away."""

        def load() -> None:
            self._rig, _ = Rig.objects.get_or_create(slug=self.rig_name)

        self._with_database(load)
        return self._rig

    def _store_means(self, *, force: bool = False) -> None:
        rig = self._rig
        if rig is None or not self._pending or not (force or self._is_due("means", time.monotonic(), 5.0)):
            return

        def write() -> None:
            samples_store(rig.pk, list(self._pending))
            self._pending.clear()

        self._with_database(write)

    def _with_database(self, work: Callable[[], None]) -> bool:
        """Do ``work``; False, said once, while the database is away."""
        try:
            close_old_connections()
            work()
        except DATABASE_AWAY as error:
            self._say_once("database", f"The database is away, means wait in memory: {error}")
            return False
        self._is_back("database")
        return True

    def _beat(self) -> None:
        now = time.monotonic()
        if not self._is_due("beat", now, HEARTBEAT_SECONDS):
            return
        try:
            heartbeat("sampler", self.rig_name, source=self._source, error=self._failure)
        except redis.RedisError as error:
            self._say_once("store", f"The store is away, live frames are dropped: {error}")

    def _is_due(self, what: str, now: float, every_seconds: float) -> bool:
        if now < self._due.get(what, 0.0):
            return False
        self._due[what] = now + every_seconds
        return True

    def _say_once(self, what: str, sentence: str) -> None:
        if what not in self._away:
            self._away.add(what)
            log.warning(sentence)

    def _is_back(self, what: str) -> None:
        if what in self._away:
            self._away.discard(what)
            log.info("back again", what=what)
