"""One connection to an engine: a request goes out, its answer comes in, with back-pressure both ways.

Whatever is not plainly one answer is refused (RFC 9112 §6.3, §11.2). To leave early is to close the connection, which
is how an engine learns that nobody listens any more.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable

import httptools

HEAD_BYTES_MAX = 64 * 1024  # of an answer with what comes before it (1xx), and of what is between two parts of its body
HELD_BYTES_MAX = 64 * 1024  # of an answer that nobody has taken yet: then its engine has to wait
SLICE_BYTES = 256 * 1024
# TCP's own keepalive finds a host that died without a word, also while no byte is due for minutes.
KEEPALIVE = (
    (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
    (socket.IPPROTO_TCP, "TCP_KEEPIDLE", 30),
    (socket.IPPROTO_TCP, "TCP_KEEPINTVL", 10),
    (socket.IPPROTO_TCP, "TCP_KEEPCNT", 3),
)


class Disconnected(Exception):
    """The engine ended the connection before its answer was whole. ``begun``: a byte of an answer had come."""

    def __init__(self, begun: bool) -> None:
        super().__init__("the engine ended the connection")
        self.begun = begun


class BrokenAnswer(Exception):
    """What came is not one HTTP/1.1 answer."""


class Answer(asyncio.Protocol):
    """A connection to an engine and the answer that it carries at the moment. ``headers`` have lower-case names.

    ``complete``: nothing more will come; what has come may still be here for ``chunk`` to take.
    """

    def __init__(self, keep: Callable[[Answer], None]) -> None:
        self.idle_since = 0.0  # the loop's time
        self.closed = False
        self._keep = keep
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None  # while an answer is due
        self._writable: asyncio.Future[None] | None = None  # while the engine does not take what was written
        self._reset()

    def _reset(self, *, without_body: bool = False) -> None:
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.content_type = b""
        self.complete = False
        self._without_body = without_body  # it answers HEAD
        self._begun = self._head_whole = self._interim = self._until_end = False
        self._reusable = True
        self._head_bytes = self._since_body_bytes = 0
        self._parts: list[bytes] = []
        self._held_bytes = 0
        self._paused = False
        self._error: BaseException | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._sending: asyncio.Task[None] | None = None

    # -- what the gateway calls -------------------------------------------------------------------

    async def ask(self, head: bytes, body: bytes | AsyncIterator[bytes], length: int | None, *, is_head: bool) -> None:
        """Send a request and wait, for as long as it takes, for the answer's head. ``length`` None: chunked.

        Raises Disconnected, BrokenAnswer, and what ``body`` raises."""
        self._reset(without_body=is_head)
        self._parser = httptools.HttpResponseParser(self)
        assert self._transport is not None  # noqa: S101 - connected
        if isinstance(body, bytes) and len(body) <= SLICE_BYTES:
            self._transport.write(head + body)
        else:
            self._transport.write(head)
            pieces = _slices(body) if isinstance(body, bytes) else body
            self._sending = asyncio.create_task(self._send(pieces, length))  # it may answer before it has all
            self._sending.add_done_callback(self._sent)
        while not self._head_whole:
            await self._more()

    async def chunk(self) -> bytes:
        """What has come of the body since the last call, else what comes next; empty at its end. Raises Disconnected,
        BrokenAnswer, and what the request's body raises."""
        while not self._parts:
            if self.complete:
                return b""
            await self._more()
        data = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts = []
        self._held_bytes = 0
        if self._paused:
            self._paused = False
            if self._transport is not None and not self.closed:
                self._transport.resume_reading()
        return data

    async def read(self, limit_bytes: int) -> bytes:
        """The body, as far as it is not longer."""
        parts: list[bytes] = []
        length = 0
        while length < limit_bytes and (chunk := await self.chunk()):
            parts.append(chunk)
            length += len(chunk)
        return b"".join(parts)[:limit_bytes]

    def release(self) -> None:
        """Nobody wants more of it: keep the connection if the answer was whole, else close it, so that the engine stops
        working for nobody."""
        sent = self._sending is None or self._sending.done()
        if self.complete and self._reusable and not self._paused and sent and not self.closed:
            self._parts = []
            self._keep(self)
        else:
            self.abandon()

    def abandon(self) -> None:
        """As ``close``, by who asks no more. What ended the answer is not kept: its traceback holds the frames of who
        waited, with the request's body, and they hold this."""
        self.close()
        self._error = None

    def close(self) -> None:
        """At once; what was not sent is dropped."""
        self.closed = True
        self._parser = None
        if self._sending is not None:
            self._sending.cancel()
        if self._transport is not None:
            self._transport.abort()

    # -- sending ----------------------------------------------------------------------------------

    async def _send(self, pieces: AsyncIterator[bytes], length: int | None) -> None:
        assert self._transport is not None  # noqa: S101 - connected
        left = length
        async for piece in pieces:
            if self.closed:
                return
            if left is not None:
                left -= len(piece)
                if left < 0:  # it would be read as another request
                    raise BrokenAnswer("the request's body is longer than its head says")
                self._transport.write(piece)
            elif piece:
                self._transport.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            if self._writable is not None:
                await self._writable
        if left is None and not self.closed:
            self._transport.write(b"0\r\n\r\n")
        elif left:
            raise BrokenAnswer("the request's body is shorter than its head says")

    def _sent(self, sending: asyncio.Task[None]) -> None:
        if not sending.cancelled() and (error := sending.exception()) is not None and not self.complete:
            self._fail(error)

    def pause_writing(self) -> None:
        self._writable = self._loop.create_future()

    def resume_writing(self) -> None:
        writable, self._writable = self._writable, None
        if writable is not None and not writable.done():
            writable.set_result(None)

    # -- receiving --------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        made = transport.get_extra_info("socket")
        for level, option, value in KEEPALIVE:
            if hasattr(socket, option):
                made.setsockopt(level, getattr(socket, option), value)

    def data_received(self, data: bytes) -> None:
        parser = self._parser
        if parser is None:  # nothing was asked: it would be taken for the next request's answer
            self.close()
            return
        self._begun = True
        self._since_body_bytes += len(data)
        try:
            parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._reusable = False
            if not self.complete:
                self._fail(self._error or BrokenAnswer(str(error)))
                return
        if self.complete:
            self._parser = None
        elif self._since_body_bytes > HEAD_BYTES_MAX:
            self._fail(BrokenAnswer("more than 64 KiB came without a byte of the answer's body"))
            return
        elif self._held_bytes > HELD_BYTES_MAX and not self._paused:
            self._paused = True
            assert self._transport is not None  # noqa: S101 - data came from it
            self._transport.pause_reading()
        if self._waiter is not None and self._head_whole:
            self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self.resume_writing()
        if self._parser is not None and not self.complete:
            if self._until_end and exc is None:
                self.complete = True
            elif self._error is None:
                self._error = Disconnected(self._begun)
            self._wake()
        self._parser = None

    async def _more(self) -> None:
        """Until something came. Raises what ended the answer."""
        if self._error is not None:
            raise self._error
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None
        if self._error is not None and not self._parts:
            raise self._error

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _fail(self, error: BaseException) -> None:
        if self._error is None:
            self._error = error
        self.close()
        self._wake()

    # -- what the parser calls --------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self.complete:  # a second answer to one request
            raise BrokenAnswer

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._head_whole:
            return  # a trailer
        self._head_bytes += len(name) + len(value) + 4
        if self._head_bytes > HEAD_BYTES_MAX:
            self._refuse("its head is longer than 64 KiB")
        self.headers.append((name.lower(), value.rstrip(b" \t")))  # the parser leaves the space before a line's end

    def on_headers_complete(self) -> None:
        assert self._parser is not None  # noqa: S101 - it calls
        status = self._parser.get_status_code()
        version = self._parser.get_http_version()
        if not 100 <= status < 600:
            self._refuse(f"its status is {status}")
        if status < 200:
            if status == 101:  # nobody asked for another protocol
                self._refuse("its status is 101")
            self._interim, self.headers = True, []
            return
        if version not in ("1.1", "1.0"):
            self._refuse(f"its version is HTTP/{version}")
        length, chunked = None, False
        for name, value in self.headers:
            if name == b"content-length":
                if not value.isdigit() or length is not None:
                    self._refuse("its Content-Length is not one number")
                length = int(value)
            elif name == b"transfer-encoding":
                if value.lower() != b"chunked" or version == "1.0" or chunked:
                    self._refuse("its Transfer-Encoding is another than chunked")
                chunked = True
            elif name == b"content-type":
                self.content_type = value
        if chunked and length is not None:
            self._refuse("it has a Content-Length and a Transfer-Encoding")
        self.status = status
        self._head_whole = True
        self._since_body_bytes = 0
        self._reusable = self._parser.should_keep_alive()
        if self._without_body or status in (204, 304):
            self.complete = True
            # Servers err here: if a body follows after all, nobody takes it for the next answer.
            self._reusable = self._reusable and not length and not chunked
        else:
            self._until_end = length is None and not chunked

    def on_body(self, data: bytes) -> None:
        if not self.complete:
            self._since_body_bytes = 0
            self._parts.append(data)
            self._held_bytes += len(data)

    def on_message_complete(self) -> None:
        if self._interim:
            self._interim = False
        else:
            self.complete = True

    def _refuse(self, why: str) -> None:
        """From within the parser: it stops there."""
        self._error = BrokenAnswer(why)
        raise self._error


async def _slices(body: bytes) -> AsyncIterator[bytes]:
    """A large body piece by piece: one write of it all would be copied whole into the socket's buffer."""
    for start in range(0, len(body), SLICE_BYTES):
        yield body[start : start + SLICE_BYTES]
