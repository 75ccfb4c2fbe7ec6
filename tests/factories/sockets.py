"""A websocket client for the ASGI application (channels.testing needs daphne, which we do not use)."""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote

from asgiref.testing import ApplicationCommunicator

TIMEOUT_SECONDS = 20.0


class Socket:
    """One browser's socket; ``connect`` answers whether the server took it."""

    def __init__(self, application: Any, path: str, headers: list[tuple[bytes, bytes]]) -> None:
        bare, _, query = path.partition("?")
        scope = {
            "type": "websocket",
            "path": unquote(bare),
            "query_string": query.encode(),
            "headers": headers,
            "subprotocols": [],
        }
        self._talk = ApplicationCommunicator(application, scope)

    async def connect(self) -> bool:
        await self._talk.send_input({"type": "websocket.connect"})
        return bool((await self.receive())["type"] == "websocket.accept")

    async def receive(self) -> dict[str, Any]:
        return dict(await self._talk.receive_output(TIMEOUT_SECONDS))

    async def text(self) -> str:
        message = await self.receive()
        assert message["type"] == "websocket.send", message
        return str(message["text"])

    async def send(self, text: str) -> None:
        await self._talk.send_input({"type": "websocket.receive", "text": text})

    async def is_silent(self, seconds: float) -> bool:
        return bool(await self._talk.receive_nothing(timeout=seconds))

    async def close(self) -> None:
        await self._talk.send_input({"type": "websocket.disconnect", "code": 1000})
        await self._talk.wait(TIMEOUT_SECONDS)
