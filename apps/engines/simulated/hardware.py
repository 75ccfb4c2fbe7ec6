"""Lays the simulated engine's memory and load on the simulated cards, over the sampler's socket.

Newline JSON: ``{"op": "hold", "pid", "name", "gpus": [{"uuid", "memory_used_bytes",
"utilization"}]}`` is answered ``{"ok": true}`` or ``{"ok": false, "error": ...}``. A hold lives
as long as the connection, so when the sampler restarts it is declared again.
"""

# ruff: noqa: T201 - standard output and error are this program's log

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from typing import Any

RETRY_SECONDS = (0.2, 0.5, 1.0, 2.0, 5.0)
ANSWER_SECONDS = 10.0
LINE_LIMIT = 1 << 20


class HoldRefused(Exception):
    """The cards cannot give what was asked: no room, or a card is lost."""


class CardHold:
    """What this process holds on its cards. Without a socket every call does nothing."""

    def __init__(self, socket_path: str | None, name: str, uuids: list[str]) -> None:
        self.socket_path = socket_path if uuids else None
        self.name = name
        self.uuids = uuids
        self.memory_bytes = 0
        self.utilization = 0.0
        self._changed = asyncio.Event()
        self._connection: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._lock = asyncio.Lock()

    async def declare(self, memory_bytes: int) -> None:
        """Take memory now. Raises HoldRefused; a sampler that is away is told later."""
        self.memory_bytes = memory_bytes
        try:
            await self._send_hold()
        except OSError:
            self._changed.set()

    def set_utilization(self, utilization: float) -> None:
        if round(utilization, 2) != round(self.utilization, 2):
            self.utilization = utilization
            self._changed.set()

    async def used_bytes(self) -> list[int | None]:
        """Memory in use on each of the cards by everybody; empty when it cannot be known."""
        if self.socket_path is None:
            return []
        try:
            answer = await self._ask({"op": "read"})
            used = {gpu["uuid"]: gpu.get("memory_used_bytes") for gpu in answer["reading"]["gpus"]}
        except (OSError, HoldRefused, KeyError, TypeError):
            return []
        return [used.get(uuid) for uuid in self.uuids]

    async def keep(self) -> None:
        """Runs for ever: sends changes, notices a lost connection, connects again with patience."""
        attempt = 0
        while self.socket_path is not None:
            try:
                if self._connection is None or self._changed.is_set():
                    self._changed.clear()
                    await self._send_hold()
                attempt = 0
                await self._wait_for_change_or_loss()
            except (OSError, HoldRefused) as error:
                if attempt == 0:
                    print(f"WARNING simulated cards: {error}; trying again", flush=True)
                await self._disconnect()
                await asyncio.sleep(RETRY_SECONDS[min(attempt, len(RETRY_SECONDS) - 1)])
                attempt += 1

    async def _wait_for_change_or_loss(self) -> None:
        """The sampler never speaks first, so an end of file is how its restart shows."""
        while not self._changed.is_set():
            if self._connection is None or self._connection[0].at_eof():
                raise ConnectionResetError("the sampler ended the connection")
            with contextlib.suppress(TimeoutError):
                # Not wait_for: before Python 3.12 it loses a cancellation that comes with the event.
                async with asyncio.timeout(0.5):
                    await self._changed.wait()

    async def _send_hold(self) -> None:
        await self._ask(
            {
                "op": "hold",
                "pid": os.getpid(),
                "name": self.name,
                "gpus": [
                    {
                        "uuid": uuid,
                        "memory_used_bytes": self.memory_bytes,
                        "utilization": round(self.utilization, 2),
                    }
                    for uuid in self.uuids
                ],
            }
        )

    async def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if self.socket_path is None:
            return {"ok": True}
        async with self._lock:
            if self._connection is None:
                self._connection = await asyncio.open_unix_connection(self.socket_path, limit=LINE_LIMIT)
            reader, writer = self._connection
            try:
                writer.write(json.dumps(request).encode() + b"\n")
                await writer.drain()
                async with asyncio.timeout(ANSWER_SECONDS):
                    line = await reader.readline()
                answer = json.loads(line) if line else None
            except (OSError, ValueError) as error:
                await self._disconnect()
                raise ConnectionResetError(f"the sampler did not answer ({error})") from error
            if not isinstance(answer, dict):
                await self._disconnect()
                raise ConnectionResetError("the sampler ended the connection")
        if answer.get("ok") is not True:
            raise HoldRefused(str(answer.get("error", "the sampler refused")))
        return answer

    async def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection[1].close()
            with contextlib.suppress(OSError):
                await connection[1].wait_closed()
