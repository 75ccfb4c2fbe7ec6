from __future__ import annotations

import threading
from typing import Any

from django.apps import AppConfig


class InstallsConfig(AppConfig):
    name = "apps.installs"
    label = "installs"

    def ready(self) -> None:
        from celery.signals import worker_ready

        from apps.jobs.handlers import register

        register("install", "apps.installs.starter.InstallHandler")
        register("uninstall", "apps.installs.removal.RemovalHandler")
        worker_ready.connect(look_for_engines, dispatch_uid="installs.detect")


def look_for_engines(sender: Any = None, **_: Any) -> None:
    """Once per start of the control worker, beside its work: asking vLLM for its version takes long."""
    if any(queue.endswith(".control") for queue in sender.app.amqp.queues.consume_from):
        threading.Thread(target=_detect_quietly, name="detect-engines", daemon=True).start()


def _detect_quietly() -> None:
    import structlog
    from django.conf import settings
    from django.db import connection

    from apps.installs.detection import detect

    try:
        detect(settings.RIG_NAME)
    except Exception:
        structlog.get_logger(__name__).exception("looking for engines failed")
    finally:
        connection.close()
