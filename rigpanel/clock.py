"""The clock, *beat*: a tick for every rig's control worker, and the hourly chores.

A plain loop over Celery's producer instead of ``celery beat``: it has to follow rigs that come and go,
keeps nothing on disk, and needs no Django, so it starts fast and stays small. Run ``python -m rigpanel.clock``.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

import redis
from celery import Celery

from apps.common.store import RIGS_KEY, heartbeat
from rigpanel.environment import ConfigError, data_directory, env, rig_name, runtime_directory, store_urls

TICK_SECONDS = 2.0
HOURLY_SECONDS = 3600.0
FIRST_HOURLY_AFTER_SECONDS = 120.0
RIG_GONE_SECONDS = 60.0
log = logging.getLogger("rigpanel.clock")


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="timestamp='%(asctime)s' level='%(levelname)s' event='%(message)s'")
    here = rig_name()
    runtime = runtime_directory(data_directory(Path(__file__).resolve().parent.parent))
    urls = store_urls(env("RIGPANEL_REDIS_URL"), runtime / "store.sock")
    app = Celery("clock", broker=urls["celery"], fixups=[])
    app.conf.update(
        task_ignore_result=True, broker_transport_options={"socket_connect_timeout": 2, "socket_timeout": 5}
    )
    store = redis.Redis.from_url(urls["redis"], decode_responses=True, socket_timeout=3, socket_connect_timeout=2)
    next_hourly = time.monotonic() + FIRST_HOURLY_AFTER_SECONDS
    reachable = True
    while True:
        started = time.monotonic()
        hourly = started >= next_hourly
        try:
            for rig in rigs(store, here):
                # A missed tick must not pile up: each expires just before the next.
                send(app, "jobs.tick", rig, expires=TICK_SECONDS - 0.1)
                if hourly:
                    send(app, "jobs.prune", rig, expires=3000)
            heartbeat("beat", connection=store)
        except Exception as error:  # whatever client or broker raise: the clock goes on
            if reachable:
                log.warning("store not reachable: %s", error)
            reachable = False
        else:
            if not reachable:
                log.info("store reachable again")
            reachable = True
            next_hourly = started + HOURLY_SECONDS if hourly else next_hourly
        time.sleep(max(0.1, TICK_SECONDS - (time.monotonic() - started)) if reachable else 0.5)


def send(app: Celery, task: str, rig: str, *, expires: float) -> None:
    app.send_task(task, queue=f"rig.{rig}.control", expires=expires, retry=False, ignore_result=True)


def rigs(store: redis.Redis, here: str) -> set[str]:
    """This rig, and every other whose control worker was seen within a minute (``rigpanel.pulse``)."""
    return {here, *map(str, store.zrangebyscore(RIGS_KEY, time.time() - RIG_GONE_SECONDS, "+inf"))}


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        raise SystemExit(f"rigpanel: {error}") from None
