"""Runs a worker of this rig: ``python -m rigpanel.worker control`` or ``verify``.

Not by Celery's own command line, which loads all of its commands and a library for prompts: 150 modules that no
worker needs, in two processes.
"""

from __future__ import annotations

import sys

from apps.common.loading import loading
from rigpanel.environment import ConfigError

# Quick acts and engines, several at once; checks one after the other, so that none measures another.
CONCURRENCY = {"control": 8, "verify": 1}


def main(role: str) -> int:
    with loading():
        from django.conf import settings

        from apps.common.realtime import keep_connection
        from rigpanel.celery import app

        worker = app.Worker(
            hostname=f"{role}@{settings.RIG_NAME}",
            queues=[f"rig.{settings.RIG_NAME}.{role}"],
            pool_cls="threads",
            concurrency=CONCURRENCY[role],
            loglevel="INFO",
            quiet=True,
            without_gossip=True,
            without_mingle=True,
            without_heartbeat=True,
        )
    keep_connection()
    worker.start()
    return int(worker.exitcode or 0)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in CONCURRENCY:
        raise SystemExit("usage: python -m rigpanel.worker control|verify")
    try:
        sys.exit(main(sys.argv[1]))
    except ConfigError as error:
        raise SystemExit(f"rigpanel: {error}") from None
