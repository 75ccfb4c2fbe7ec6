"""The settings in force, for the owner's page. Never a secret: only what is listed here is shown."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any
from urllib.parse import urlsplit

from django.conf import settings
from django.db import connection

PACKAGES = ("django", "channels", "celery", "redis", "uvicorn", "nvidia-ml-py")


def settings_in_force() -> list[tuple[str, list[tuple[str, str, str]]]]:
    """Groups of (environment variable, value, what it does)."""
    return [
        (
            "Addresses",
            [
                ("RIGPANEL_PUBLIC_URL", settings.PUBLIC_URL, "what browsers use"),
                ("RIGPANEL_GATEWAY_URL", settings.GATEWAY_URL, "what members and Open WebUI use"),
                ("RIGPANEL_HOST, RIGPANEL_PORT", f"{settings.HOST}:{settings.PORT}", "where the panel listens"),
                (
                    "RIGPANEL_TRUSTED_PROXIES",
                    ", ".join(map(str, settings.TRUSTED_PROXIES)) or "none",
                    "whose forwarded headers count",
                ),
                (
                    "RIGPANEL_EMAIL_URL",
                    "set" if settings.EMAIL_ENABLED else "none: links are shown to copy",
                    "invitations and resets",
                ),
            ],
        ),
        (
            "Rig",
            [
                ("RIGPANEL_RIG", settings.RIG_NAME, "this machine's rig"),
                ("RIGPANEL_HARDWARE", settings.HARDWARE, "how the cards are read"),
                ("RIGPANEL_RUNNER", settings.RUNNER, "how engines are started"),
                (
                    "RIGPANEL_ENGINE_PORTS",
                    f"{settings.ENGINE_PORTS.start}-{settings.ENGINE_PORTS.stop - 1}",
                    "ports of engines",
                ),
                ("RIGPANEL_ENGINE_BIND", settings.ENGINE_BIND, "where engines listen"),
                ("RIGPANEL_ENGINE_ADVERTISE", settings.ENGINE_ADVERTISE, "the address gateways use"),
            ],
        ),
        (
            "Store",
            [
                ("RIGPANEL_DATA_DIR", str(settings.DATA_DIR), "database, logs, secrets"),
                ("RIGPANEL_MODELS_DIR", str(settings.MODELS_DIR), "where weights lie"),
                ("RIGPANEL_HF_TOKEN", "set" if settings.HF_TOKEN else "not set", "for gated and private repositories"),
                ("RIGPANEL_DATABASE_URL", _database(), "the database"),
                (
                    "RIGPANEL_REDIS_URL",
                    "embedded" if settings.STORE_EMBEDDED else _without_secret(settings.REDIS_URL),
                    "the store",
                ),
            ],
        ),
    ]


def versions() -> list[tuple[str, str]]:
    """rigpanel, Python and the libraries that matter when something is reported."""
    found = [
        ("rigpanel", settings.VERSION),
        ("Python", sys.version.split()[0]),
        ("System", platform.platform(terse=True)),
    ]
    for name in PACKAGES:
        try:
            found.append((name, version(name)))
        except PackageNotFoundError:
            continue
    return found


def _database() -> str:
    database: dict[str, Any] = settings.DATABASES["default"]
    if connection.vendor == "sqlite":
        return "embedded SQLite"
    return f"{connection.display_name} at {database.get('HOST') or 'a local socket'}, database {database.get('NAME')}"


def _without_secret(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname or ''}{f':{parts.port}' if parts.port else ''}{parts.path}"
