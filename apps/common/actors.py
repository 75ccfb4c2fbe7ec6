"""Who did it: a person, a key of theirs, the command line, or the panel itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Actor:
    """``id`` is the user's public id (a UUID), or empty for the panel and the command line."""

    id: str
    name: str
    user_pk: int | None = None


PANEL = Actor("", "panel")
COMMAND_LINE = Actor("", "command line")


def actor_of(user: Any) -> Actor:
    """The actor of a signed-in ``accounts.User``."""
    return Actor(str(user.public_id), str(user.display_name), int(user.pk))
