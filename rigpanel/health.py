"""Is everything well? ``/healthz`` (web is alive) and ``/readyz`` (every part, by name, with a sentence)."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from django.conf import settings
from django.db import DatabaseError, connection
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.utils import timezone
from django.views.decorators.http import require_safe
from redis import RedisError

from apps.common.access import public
from apps.common.identity import is_known_dead
from apps.common.store import HEARTBEAT_SECONDS, last_heartbeat, store
from apps.deployments.models import GatewayProcess

GATEWAY_SEEN = timedelta(seconds=15)
CONSUMED_SECONDS = 4 * HEARTBEAT_SECONDS


@dataclass(frozen=True, slots=True)
class Part:
    name: str
    ok: bool
    sentence: str


@public
@require_safe
def healthz(request: HttpRequest) -> HttpResponse:
    return JsonResponse({"status": "ok", "service": "rigpanel", "version": settings.VERSION})


@public
@require_safe
def readyz(request: HttpRequest) -> HttpResponse:
    found = parts()
    ready = all(p.ok for p in found)
    answer = {
        "status": "ready" if ready else "not ready",
        "rig": settings.RIG_NAME,
        "parts": {p.name: {"ok": p.ok, "sentence": p.sentence} for p in found},
    }
    response = JsonResponse(answer, status=200 if ready else 503)
    response["Cache-Control"] = "no-store"
    # Asked every few seconds, and "no" is an answer: Django must not log it as an error.
    response._has_been_logged = True  # type: ignore[attr-defined]
    return response


def parts() -> list[Part]:
    """Every part in a fixed order. Takes milliseconds; at worst the two-second timeouts of a store that hangs."""
    database = _database()
    broker = _broker()
    if not broker.ok:
        unknown = "Not known: its heartbeats are in the store."
        rest = [Part(name, False, unknown) for name in ("control", "verify", "beat", "sampler")]
    else:
        rest = [_worker("control"), _worker("verify"), _beat(), _sampler()]
    gateway = _gateway() if database.ok else Part("gateway", False, "Not known: what it reports is in the database.")
    return [database, broker, *rest, gateway]


def _database() -> Part:
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
    except DatabaseError as error:
        return Part("database", False, f"Does not answer: {_first_line(error)}")
    return Part("database", True, f"{connection.display_name} answers.")


def _broker() -> Part:
    try:
        store().ping()
    except RedisError as error:
        return Part("broker", False, f"The store does not answer: {_first_line(error)}")
    return Part("broker", True, "The embedded Valkey answers." if settings.STORE_EMBEDDED else "Redis answers.")


def _worker(role: str) -> Part:
    beat = _heartbeat(role, settings.RIG_NAME)
    if beat is None:
        return Part(role, False, f"No worker reads the queue rig.{settings.RIG_NAME}.{role}.")
    consumed_at, busy = beat.get("consumed_at"), beat.get("busy") or 0
    if consumed_at and time.time() - consumed_at < CONSUMED_SECONDS:
        return Part(role, True, f"Takes its messages; {_tasks(busy)}.")
    if busy:
        return Part(role, True, f"At work; {_tasks(busy)}.")
    return Part(role, False, "The worker is alive but takes no messages yet.")


def _beat() -> Part:
    beat = _heartbeat("beat", "")
    return Part("beat", beat is not None, "Ticks." if beat else "The clock does not tick.")


def _sampler() -> Part:
    beat = _heartbeat("sampler", settings.RIG_NAME)
    return Part("sampler", beat is not None, "Reads the cards." if beat else "The cards are not being read.")


def _gateway() -> Part:
    seen = GatewayProcess.objects.filter(seen_at__gt=timezone.now() - GATEWAY_SEEN).values_list("key", flat=True)
    living = [key for key in seen if not is_known_dead(key)]
    return Part("gateway", bool(living), "Answers." if living else "No gateway has reported in the last 15 seconds.")


def _heartbeat(process: str, rig_name: str) -> dict[str, Any] | None:
    """The last one, unless its process is known to be gone."""
    try:
        beat = last_heartbeat(process, rig_name)
    except RedisError:
        return None
    return None if beat is None or is_known_dead(str(beat.get("key", ""))) else beat


def _tasks(count: float) -> str:
    return "idle" if not count else f"{count:g} at work"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
