"""Python's garbage collector looks when nobody is served."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest

from apps.gateway import garbage


class Knot:
    """Refers to itself, so only the collector can end it."""

    def __init__(self) -> None:
        self.itself = self


async def test_what_is_left_behind_goes_when_nobody_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(garbage, "AT_REST_EVERY_S", 0.001)
    asked = 0
    at_rest = False

    def is_at_rest() -> bool:
        nonlocal asked
        asked += 1
        return at_rest

    gc.disable()
    looking = asyncio.create_task(garbage.look_at_rest(is_at_rest))
    try:
        left = weakref.ref(Knot())
        while asked < 3:
            await asyncio.sleep(0.001)
        assert left() is not None, "not while somebody is served"
        at_rest = True
        async with asyncio.timeout(30):
            while left() is not None:
                await asyncio.sleep(0.001)
    finally:
        looking.cancel()
        gc.enable()
