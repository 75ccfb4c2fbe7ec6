"""Waits beside a start until everything is well, says where the panel is, and ends."""

from __future__ import annotations

import http.client
import json
import os
import socket
import sys
import time
from typing import Any

from django.conf import settings

from rigpanel.processes import control_socket

SLOW_AFTER_SECONDS = 30.0
GIVE_UP_AFTER_SECONDS = 300.0


def announce(started_at: float, setup_path: str | None) -> None:
    """Print the addresses once /readyz says 200; meanwhile name what keeps it waiting."""
    supervisor = os.getppid()
    _wake_supervisor()
    said: str | None = None
    while time.monotonic() - started_at < GIVE_UP_AFTER_SECONDS:
        if os.getppid() != supervisor:
            return
        status, answer = _readyz()
        if status == 200:
            break
        waited = time.monotonic() - started_at
        if waited > SLOW_AFTER_SECONDS:
            missing = _missing(answer)
            if missing != said:
                _say(f"still waiting after {waited:.0f} s. {missing}")
                said = missing
        time.sleep(0.1)
    else:
        _say(f"not everything came up. The logs are in {settings.LOGS_DIR}; `manage.py status` says what is missing.")
        return
    _say(f"ready after {time.monotonic() - started_at:.1f} s")
    lines = [
        f"  panel    {settings.PUBLIC_URL}/",
        f"  gateway  {settings.GATEWAY_URL}/v1",
        f"  logs     {settings.LOGS_DIR}",
    ]
    if setup_path:
        lines += [
            "",
            "  Make the first account with this link; it works once, for a day:",
            f"  {settings.PUBLIC_URL}{setup_path}",
        ]
    lines += ["", "  Ctrl-C stops the panel and leaves engines running; `make down` stops everything."]
    print("\n".join(lines), flush=True)  # noqa: T201


def _wake_supervisor() -> None:
    """Its loop starts processes only when something happened or a second has passed: knock at its socket."""
    for _ in range(100):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as knock:
            try:
                knock.connect(str(control_socket()))
            except OSError:
                time.sleep(0.02)
            else:
                return


def _readyz() -> tuple[int, dict[str, Any]]:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.HOST, settings.HOST)  # noqa: S104
    connection = http.client.HTTPConnection(host, settings.PORT, timeout=5)
    try:
        connection.request("GET", "/readyz", headers={"Host": "localhost"})
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    except (OSError, http.client.HTTPException, ValueError):
        return 0, {}
    finally:
        connection.close()


def _missing(answer: dict[str, Any]) -> str:
    parts = answer.get("parts") or {}
    if not parts:
        return f"The web process does not answer yet; see {settings.LOGS_DIR / 'web.log'}."
    return " ".join(f"{name}: {p['sentence']}" for name, p in parts.items() if not p["ok"])


def _say(text: str) -> None:
    print(f"rigpanel: {text}", file=sys.stdout, flush=True)  # noqa: T201
