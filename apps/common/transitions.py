"""One status, one writer: a transition table and a conditional UPDATE whose row count decides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from django.db import models


class WrongTransition(Exception):
    """The table does not allow this step: a bug of ours, never a race."""


Table = Mapping[str, frozenset[str]]


def claim(
    obj: models.Model,
    table: Table,
    to: str,
    *,
    field: str = "status",
    where: Mapping[str, Any] | None = None,
    **values: Any,
) -> bool:
    """Move ``obj.<field>`` to ``to`` if it still is what ``obj`` says; True if this call won.

    ``where`` adds conditions (a lease that must still be ours); ``values`` are written in the same UPDATE.
    On success the instance is up to date; on failure it is left alone: another process got there first.
    """
    current = getattr(obj, field)
    if to not in table.get(str(current), frozenset()):
        raise WrongTransition(f"{type(obj).__name__} {obj.pk}: {current} → {to} is not in the table.")
    won = (
        type(obj)
        ._default_manager.filter(pk=obj.pk, **{field: current}, **(where or {}))
        .update(**{field: to}, **values)
    )
    if won != 1:
        return False
    setattr(obj, field, to)
    for name, value in values.items():
        setattr(obj, name, value)
    return True
