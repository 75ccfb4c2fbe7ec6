"""The Celery application of the workers, ``control`` and ``verify``. The clock is ``rigpanel.clock``."""

from __future__ import annotations

import logging.config
import os
import warnings
from typing import Any

from celery import Celery, signals

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "rigpanel.settings")
# Django's checks load all URLs, and with them the API's library: some 20 MB per worker for what `make check` does.
os.environ.setdefault("CELERY_SKIP_CHECKS", "1")
# Running as root is the machine owner's choice (containers do); Celery's remark is about pickle, which is off.
warnings.filterwarnings("ignore", message="You're running the worker with superuser")

app = Celery("rigpanel")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()


@signals.setup_logging.connect
def use_the_panels_logging(**_: Any) -> None:
    """A receiver here keeps Celery from setting up handlers of its own."""
    from django.conf import settings

    logging.config.dictConfig(settings.LOGGING)


@signals.worker_ready.connect
def begin(sender: Any, **_: Any) -> None:
    """Jobs that waited while no worker was there are found at once, not at the next tick."""
    from apps.jobs.tasks import resend_waiting_jobs, tick_soon
    from rigpanel.pulse import Pulse

    queue = next(iter(sender.app.amqp.queues.consume_from))
    Pulse(queue, concurrency=sender.controller.pool.limit).start()
    if queue.endswith(".control"):
        resend_waiting_jobs()
        tick_soon()


@app.task(name="rigpanel.pulse", ignore_result=True)
def pulse_task() -> None:
    from rigpanel import pulse

    pulse.consumed()
