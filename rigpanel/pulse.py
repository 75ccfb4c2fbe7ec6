"""A worker proves that it consumes: it sends itself small messages and says when one arrived.

A worker can look alive and take nothing from its queue (after the store was killed, for one). So
"alive" here means that a message went the whole way round. A worker whose messages are accepted by
the store and never come back ends itself; the supervisor starts a new one.
"""

from __future__ import annotations

import os
import threading
import time

import structlog
from celery.worker import state
from kombu.exceptions import OperationalError
from redis import RedisError

from apps.common.store import HEARTBEAT_SECONDS, RIGS_KEY, heartbeat, store

log = structlog.get_logger(__name__)
LOST_MAX = 6  # messages in a row that never came back
_consumed_at = 0.0
_arrived = threading.Event()


def consumed() -> None:
    global _consumed_at
    _consumed_at = time.time()
    _arrived.set()


class Pulse(threading.Thread):
    """``queue`` is ``rig.<name>.control`` or ``rig.<name>.verify``."""

    def __init__(self, queue: str, concurrency: int) -> None:
        super().__init__(name="pulse", daemon=True)
        self.queue = queue
        self.concurrency = concurrency
        _, self.rig_name, self.role = queue.split(".")
        self.lost = 0
        self.sent_at = 0.0

    def run(self) -> None:
        first = True
        while True:
            try:
                self.beat()
            except Exception as error:  # the thread that watches must not die of what it watches
                log.warning("pulse failed", queue=self.queue, error=str(error))
            if first:  # say at once that the first one came back: a start waits for it
                _arrived.wait(HEARTBEAT_SECONDS)
                first = False
            else:
                time.sleep(HEARTBEAT_SECONDS)

    def beat(self) -> None:
        """Count what came back, say so in the store, send the next one."""
        busy = len(state.active_requests)
        full = busy >= self.concurrency  # then nothing more is taken, rightly
        if self.sent_at and not full:
            self.lost = 0 if _consumed_at >= self.sent_at else self.lost + 1
        if self.lost >= LOST_MAX:
            log.critical("messages do not arrive any more; ending, to be started anew", queue=self.queue)
            os._exit(70)
        try:
            heartbeat(self.role, self.rig_name, consumed_at=_consumed_at or None, busy=busy)
            store().zadd(RIGS_KEY, {self.rig_name: time.time()})
        except RedisError as error:
            log.warning("store not reachable", error=str(error))
            self.lost, self.sent_at = 0, 0.0  # what was sent into a dead store says nothing about this worker
            return
        if not full:
            self.send()

    def send(self) -> None:
        from rigpanel.celery import pulse_task

        try:
            self.sent_at = time.time()
            pulse_task.apply_async(queue=self.queue, expires=HEARTBEAT_SECONDS * 3, retry=False)
        except (OperationalError, RedisError, OSError) as error:
            log.warning("pulse not sent", error=str(error))
            self.sent_at = 0.0
