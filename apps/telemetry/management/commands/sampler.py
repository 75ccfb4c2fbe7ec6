"""``manage.py sampler``: reads the cards of this rig until it is told to stop."""

from __future__ import annotations

import signal
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand


class Command(BaseCommand):
    help = "Read this rig's cards, publish live readings and store their means (one per rig)."
    requires_system_checks = []

    def handle(self, *args: Any, **options: Any) -> None:
        from apps.common.realtime import keep_connection
        from apps.telemetry.sampler import Sampler

        keep_connection()
        sampler = Sampler(settings.RIG_NAME, settings.HARDWARE, settings.SAMPLER_SOCKET)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: sampler.end())
        sampler.run()
