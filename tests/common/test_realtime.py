"""Messages from processes without an event loop: one connection, in order, and nobody held up by a frozen store."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from apps.common import realtime


class Layer:
    """Notes in which loop each message was sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[asyncio.AbstractEventLoop, str]] = []
        self.hangs = False

    async def group_send(self, group: str, message: dict[str, Any]) -> None:
        if self.hangs:
            await asyncio.Event().wait()
        self.sent.append((asyncio.get_running_loop(), message["text"]))


@pytest.fixture
def layer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Layer]:
    made = Layer()
    monkeypatch.setattr(realtime, "get_channel_layer", lambda: made)
    monkeypatch.setattr(realtime, "_silence_until", 0.0)
    monkeypatch.setattr(realtime, "_loop", None)
    yield made
    if realtime._loop is not None:
        realtime._loop.call_soon_threadsafe(realtime._loop.stop)


def test_all_messages_of_a_worker_go_over_one_connection_in_order(layer: Layer) -> None:
    realtime.keep_connection()
    for text in "abc":
        assert realtime._send("pages", {"text": text})
    loops, texts = zip(*layer.sent, strict=True)
    assert texts == ("a", "b", "c")
    assert set(loops) == {realtime._loop}  # the layer has one connection for each loop


def test_a_frozen_store_is_given_up(layer: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(realtime, "SEND_SECONDS", 0.05)
    realtime.keep_connection()
    layer.hangs = True
    assert not realtime._send("pages", {"text": "a"})
    assert not layer.sent
    monkeypatch.setattr(realtime, "_silence_until", 0.0)
    layer.hangs = False
    assert realtime._send("pages", {"text": "b"})
    assert [text for _, text in layer.sent] == ["b"]
