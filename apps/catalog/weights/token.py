"""The hub's access token: from the environment, or stored in the data directory (0600). Never shown again.

It leaves this module only into a download's stdin."""

from __future__ import annotations

import os
import re
from pathlib import Path

from django.conf import settings
from django.db import transaction

from apps.audit.services import record
from apps.common.actors import Actor
from apps.common.errors import Conflict, Invalid

_SHAPE = re.compile(r"[\x21-\x7e]{8,200}\Z")


def _file() -> Path:
    return Path(settings.DATA_DIR) / "secrets" / "hf_token"


def hub_token() -> str:
    """The token for downloads on this machine; empty when there is none."""
    if settings.HF_TOKEN:
        return str(settings.HF_TOKEN)
    try:
        return _file().read_text("utf-8").strip()
    except OSError:
        return ""


def token_source() -> str:
    """``environment``, ``stored`` or empty: all that pages may know."""
    if settings.HF_TOKEN:
        return "environment"
    return "stored" if _file().is_file() else ""


def token_store(value: str, *, actor: Actor) -> None:
    """Keep a new token, or with an empty one none. Raises Invalid or Conflict."""
    if settings.HF_TOKEN:
        raise Conflict("The token comes from RIGPANEL_HF_TOKEN; change it there.", code="set_by_environment")
    value = value.strip()
    if value and not _SHAPE.match(value):
        raise Invalid(
            "This does not look like a token: no spaces, 8 to 200 characters.", fields={"token": ["No token."]}
        )
    if value:
        draft = _file().with_name(f".hf_token.{os.getpid()}")
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(value)
        draft.replace(_file())
    else:
        _file().unlink(missing_ok=True)
    with transaction.atomic():
        record(actor, "hub_token.set" if value else "hub_token.remove", "settings", "", "Hub token")
