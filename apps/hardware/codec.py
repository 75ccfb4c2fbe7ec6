"""The hardware dataclasses to and from plain dictionaries, for the socket and for recordings.

Reading back is strict about types, because the other side may be a file that somebody edited, and
lenient about keys: an unknown key is ignored and a missing optional one is ``None``, so that a
recording outlives a release that adds a field.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from typing import Any, TypeVar, cast

from apps.hardware.protocol import HardwareError, Inventory, Reading

T = TypeVar("T")


def to_dict(value: Inventory | Reading) -> dict[str, Any]:
    """Plain dictionaries, lists and scalars; every key is present, unknown values are ``None``."""
    return dataclasses.asdict(value)


def inventory_from_dict(data: object) -> Inventory:
    """Raises HardwareError with the path of the first value that does not fit."""
    return _dataclass(Inventory, data, "inventory")


def reading_from_dict(data: object) -> Reading:
    """Raises HardwareError with the path of the first value that does not fit."""
    return _dataclass(Reading, data, "reading")


@functools.cache
def _types_of(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _dataclass(kind: type[T], data: object, where: str) -> T:
    if not isinstance(data, dict):
        raise _misfit(where, "an object", data)
    values: dict[str, Any] = {}
    hints = _types_of(cast(Any, kind))
    for field in dataclasses.fields(cast(Any, kind)):
        expected = hints[field.name]
        if field.name in data:
            values[field.name] = _value(expected, data[field.name], f"{where}.{field.name}")
        elif field.default is not dataclasses.MISSING:
            continue
        elif types.NoneType in typing.get_args(expected):
            values[field.name] = None
        else:
            raise HardwareError(f"{where}.{field.name} is missing.")
    return kind(**values)


def _value(expected: Any, value: object, where: str) -> Any:
    arguments = typing.get_args(expected)
    origin = typing.get_origin(expected)
    if origin in (types.UnionType, typing.Union):
        if value is None and types.NoneType in arguments:
            return None
        (inner,) = (argument for argument in arguments if argument is not types.NoneType)
        return _value(inner, value, where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise _misfit(where, "a list", value)
        return tuple(_value(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if dataclasses.is_dataclass(expected):
        return _dataclass(cast(type, expected), value, where)
    # bool is an int to Python; a card with `true` bytes of memory is a broken file to us.
    if expected is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise _misfit(where, "a finite number", value)
        return float(value)
    if expected is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if expected in (str, bool) and isinstance(value, expected):
        return value
    raise _misfit(where, f"a value of type {expected.__name__}", value)


def _misfit(where: str, expected: str, value: object) -> HardwareError:
    return HardwareError(f"{where} should be {expected}, not {value!r:.60}.")
