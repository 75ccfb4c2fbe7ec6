"""What the small processes load under -OO, compiled once before the first of them starts.

Else each compiles all of it for itself, at the same time, and what that took stays with it for as long as it lives: 5
to 10 MB in each of five (measured). Runs beside the first start's migrations: ``python -OO -m rigpanel.compiling``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from importlib.util import cache_from_source, find_spec
from pathlib import Path

from rigpanel.processes import LEAN, SMALL

MODULES = (  # what these do not import is little, or late
    "apps.deployments.guard",
    "apps.deployments.policies.ticking",
    "apps.deployments.reconcile",
    "apps.deployments.scrape",
    "apps.deployments.strays",
    "apps.deployments.switch",
    "apps.gateway.__main__",
    "apps.gateway.asgi",
    "apps.gateway.server",
    "apps.telemetry.management.commands.sampler",
    "apps.telemetry.sampler",
    "celery.app.amqp",
    "celery.app.control",
    "celery.app.events",
    "celery.app.log",
    "celery.app.trace",
    "celery.apps.worker",
    "celery.backends.base",
    "celery.concurrency.thread",
    "celery.contrib.django.task",
    "celery.events.receiver",
    "celery.worker.autoscale",
    "celery.worker.consumer",
    "celery.worker.heartbeat",
    "celery.worker.loops",
    "celery.worker.pidbox",
    "celery.worker.strategy",
    "channels_redis.pubsub",
    "django.db.models.sql.compiler",
    "kombu.transport.redis",
    "rigpanel.clock",
    "rigpanel.pulse",
    "rigpanel.settings_sampler",
    "rigpanel.worker",
    "supervisor.rpcinterface",
    "supervisor.supervisord",
    "supervisor.web",
    "uvicorn.lifespan.on",
    "uvicorn.loops.uvloop",
)
LAST = ("rigpanel.worker", "celery.worker.strategy")  # compiled: so was everything
PATIENCE_S = 20.0


def begin() -> subprocess.Popen[bytes] | None:
    """Start it, unless it was done before or has nowhere to write."""
    if all(_is_done(name) for name in LAST):
        return None
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | SMALL
    quiet = subprocess.DEVNULL
    argv = [sys.executable, LEAN, "-m", __name__]
    return subprocess.Popen(argv, env=environment, stdin=quiet, stdout=quiet, stderr=quiet)


def finish(compiling: subprocess.Popen[bytes] | None) -> None:
    """Wait for it. Only memory hangs on it: if it fails or takes too long, the processes compile for themselves."""
    if compiling is None:
        return
    try:
        compiling.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        compiling.kill()
        compiling.wait()


def _is_done(name: str) -> bool:
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        return True
    compiled = Path(cache_from_source(spec.origin, optimization=LEAN.count("O")))
    folder = next(parent for parent in compiled.parents if parent.exists())
    return compiled.exists() or not os.access(folder, os.W_OK)


def main() -> None:
    import django

    from rigpanel.celery import app

    django.setup()
    app.loader.import_default_modules()
    for name in MODULES:
        import_module(name)


if __name__ == "__main__":
    main()
