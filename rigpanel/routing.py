"""Where sockets lead."""

from __future__ import annotations

from typing import Any

from django.urls import path

from apps.dashboard.consumers import PagesConsumer
from apps.telemetry.consumers import TelemetryConsumer

websocket_urlpatterns: list[Any] = [
    path("ws/telemetry/", TelemetryConsumer.as_asgi()),
    path("ws/pages/", PagesConsumer.as_asgi()),
]
