"""The client's end of one request: its body within limits, its answer, and whether it is still there."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from apps.gateway import errors
from apps.gateway.limits import Limits
from apps.gateway.observer import REFUSED
from apps.gateway.protocol import EVENT_STREAM, Receive, Scope, Send, declared_length

EMPTY_COMMENT = b":\n\n"


class ClientGone(Exception):
    """The client closed its connection; there is nobody to answer."""


class BodyBudget:
    """Bytes of request bodies that are in memory, over all requests."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self.held_bytes = 0

    @contextmanager
    def share(self) -> Iterator[BodyShare]:
        share = BodyShare(self)
        try:
            yield share
        finally:
            share.release()

    def take(self, count_bytes: int) -> None:
        """Raises 503 when there is no room."""
        if self.held_bytes + count_bytes > self._limit_bytes:
            raise errors.too_many_bodies()
        self.held_bytes += count_bytes

    def give_back(self, count_bytes: int) -> None:
        self.held_bytes -= count_bytes


class BodyShare:
    """One request's part of the budget; released once, early when the engine has the body."""

    def __init__(self, budget: BodyBudget) -> None:
        self._budget = budget
        self._taken_bytes = 0

    def take(self, count_bytes: int) -> None:
        self._budget.take(count_bytes)
        self._taken_bytes += count_bytes

    def release(self) -> None:
        self._budget.give_back(self._taken_bytes)
        self._taken_bytes = 0


class Client:
    """Wraps ``receive`` and ``send`` of one ASGI request. ``status`` is None until the answer began."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
        self.headers: list[tuple[bytes, bytes]] = scope["headers"]
        self.request_id = request_id
        self.anthropic = False  # errors in Anthropic's shape
        self.status: int | None = None
        self.streaming = False  # a 200 event stream of ours began: errors can only be events from now on
        self.complete = False
        self.gone = False
        self.sent_bytes = 0
        self.model = ""
        self.outcome = "ok"  # what was told
        self.tell_end: Callable[[str, int | None], None] | None = None
        self.cut_by: errors.GatewayError | None = None
        self.more_headers: list[tuple[bytes, bytes]] = []
        self._receive = receive
        self._send = send
        self._body_ended = False
        self._after_comment = False
        self._watched: asyncio.Task[Any] | None = None

    # -- in -------------------------------------------------------------------------------------

    async def body(self, limits: Limits, share: BodyShare) -> bytes:
        """The whole body. Raises 413, 408, 503 or ClientGone."""
        declared_bytes = declared_length(self.headers)
        if declared_bytes is not None and declared_bytes > limits.body_bytes:
            raise errors.body_too_large(limits.body_bytes)
        try:
            async with asyncio.timeout(limits.body_s):
                return await self._read(limits.body_bytes, share)
        except TimeoutError:
            raise errors.body_too_slow(limits.body_s) from None

    async def _read(self, limit_bytes: int, share: BodyShare) -> bytes:
        parts: list[bytes] = []
        length = 0
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self.gone = True
                raise ClientGone
            part = message.get("body", b"")
            length += len(part)
            if length > limit_bytes:
                raise errors.body_too_large(limit_bytes)
            share.take(len(part))
            parts.append(part)
            if not message.get("more_body", False):
                return parts[0] if len(parts) == 1 else b"".join(parts)

    async def piece(self) -> bytes | None:
        """The next piece of a body that is not read whole; None after its end. Raises ClientGone."""
        if self._body_ended:
            return None
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self.gone = True
            raise ClientGone
        self._body_ended = not message.get("more_body", False)
        return bytes(message.get("body", b""))

    @asynccontextmanager
    async def watched(self, body_read: asyncio.Event | None = None) -> AsyncIterator[None]:
        """Cancel the block at once when the client goes away. Begin it after the body was read, or say with
        ``body_read`` when it was.

        Raises ClientGone then; a cancellation from elsewhere (the server stops) passes as it is.
        """
        work = asyncio.current_task()
        assert work is not None  # noqa: S101 - a coroutine always runs in one
        self._watched = work
        watch = asyncio.create_task(self._watch(work, body_read))
        try:
            yield
        except asyncio.CancelledError:
            if (self.gone or self.cut_by is not None) and work.uncancel() == 0:
                raise (self.cut_by or ClientGone()) from None
            raise
        finally:
            self._watched = None
            watch.cancel()

    def cut(self, error: errors.GatewayError) -> None:
        """End what is under way with this error, as a status or as an event."""
        if self._watched is not None and not self.gone and self.cut_by is None and not self.complete:
            self.cut_by = error
            self._watched.cancel()

    async def _watch(self, work: asyncio.Task[Any], body_read: asyncio.Event | None) -> None:
        if body_read is not None:
            await body_read.wait()
        while (await self._receive())["type"] != "http.disconnect":
            pass
        if (
            not self.complete and self.cut_by is None
        ):  # after a complete answer, "disconnect" is only the end of the request
            self.gone = True
            work.cancel()

    # -- out ------------------------------------------------------------------------------------

    async def start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.status = status
        headers.append((b"x-request-id", self.request_id.encode()))
        headers.extend(self.more_headers)
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def start_events(self) -> None:
        """Begin an event stream of our own, before any engine has answered."""
        self.streaming = True
        headers = [(b"content-type", EVENT_STREAM + b"; charset=utf-8"), (b"cache-control", b"no-cache")]
        await self.start(200, headers)

    async def comment(self, line: bytes) -> None:
        """A comment in a stream of events, while there is nothing else to say. What comes next begins with another,
        empty one: some clients strip what arrives (``vllm bench serve`` does), and then the comment has no end."""
        await self.write(line)
        self._after_comment = True

    async def write(self, data: bytes) -> None:
        """Waits while the client's buffer is full, so a slow reader slows its engine, not our memory."""
        if data:
            if self._after_comment:
                data = self._apart(data)
            self.sent_bytes += len(data)
            await self._send({"type": "http.response.body", "body": data, "more_body": True})

    def _apart(self, data: bytes) -> bytes:
        self._after_comment = False
        return EMPTY_COMMENT + data

    def ends(self, outcome: str = "ok", status: int | None = None) -> None:
        """Tell, once, how the request ends: before the answer's last bytes are sent, so that whoever has a whole
        answer is also in the ledger, whatever happens to this process next. An engine's error that was passed on is
        *refused*."""
        tell, self.tell_end = self.tell_end, None
        if tell is not None:
            status = status or self.status
            refused = outcome == "ok" and status is not None and status >= 400
            self.outcome = REFUSED if refused else outcome
            tell(self.outcome, status)

    async def finish(self, data: bytes = b"") -> None:
        self.ends()
        if self._after_comment and data:
            data = self._apart(data)
        self.sent_bytes += len(data)
        self.complete = True
        await self._send({"type": "http.response.body", "body": data, "more_body": False})

    async def answer(self, status: int, body: bytes, content_type: bytes, *headers: tuple[bytes, bytes]) -> None:
        await self.start(
            status, [(b"content-type", content_type), (b"content-length", str(len(body)).encode()), *headers]
        )
        await self.finish(body)

    async def answer_json(self, status: int, payload: object, *headers: tuple[bytes, bytes]) -> None:
        await self.answer(status, json.dumps(payload, ensure_ascii=False).encode(), b"application/json", *headers)

    async def answer_error(self, error: errors.GatewayError) -> None:
        """As a status where none was sent, as an event where a stream began; otherwise not at all: the
        connection is then closed without the answer's end, which every client sees as broken."""
        self.ends(error.code, self.status or error.status)
        if self.status is None:
            payload = error.anthropic_payload(self.request_id) if self.anthropic else error.payload
            await self.answer_json(error.status, payload, *error.headers)
        elif self.streaming and not self.complete:
            await self.finish(error.as_anthropic_event(self.request_id) if self.anthropic else error.as_event())
