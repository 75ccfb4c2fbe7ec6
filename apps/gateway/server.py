"""uvicorn as the gateway needs it; ``python -m apps.gateway`` runs it."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
from contextlib import suppress
from functools import partial
from typing import Any

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from apps.gateway import errors

HEAD_BYTES_MAX = 64 * 1024
HEAD_TOO_LONG = f"The request's head is longer than {HEAD_BYTES_MAX // 1024} KiB."
BACKLOG = 2048
PIPELINED_MAX = 8
BODY_HEADERS = frozenset({b"content-length", b"transfer-encoding"})
# How long a connection may go without a whole head of a request, and without its client taking a byte of an answer.
HEAD_SECONDS = 30.0
STALLED_SECONDS = 120.0
LOOK_EVERY_SECONDS = 5.0


class HeadWithBody:
    """A transport that sends an answer's head together with what follows in the same turn of the event loop: one system
    call less for each answer, and the client is woken once. A stream's head goes out at the end of the turn."""

    __slots__ = ("_head", "_loop", "_transport")

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._head: bytes | None = b""  # empty: nothing was written yet; None: it is out

    def write(self, data: bytes) -> None:
        if self._head is None:
            self._transport.write(data)
        elif not self._head:
            self._head = data
            self._loop.call_soon(self._flush)
        else:
            data, self._head = self._head + data, None
            self._transport.write(data)

    def _flush(self) -> None:
        if self._head:
            head, self._head = self._head, None
            if not self._transport.is_closing():
                self._transport.write(head)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def is_closing(self) -> bool:
        return self._transport.is_closing()


class GatewayProtocol(HttpToolsProtocol):
    """Holes of uvicorn 0.54's protocol closed: heads of any length are buffered; when a client pipelines a second
    request and goes away, the first one runs on, because reading pauses and only the last one is told; what is wrong
    with the second one is said in the middle of the first one's answer, and cuts it; a connection without a request,
    with half a head, or whose client reads nothing stays open for ever; what follows a head with ``Upgrade`` is never
    read as its body, so a body that comes a moment later would be the next request; and of a segment with such a head
    the rest is lost, so that the next one is read from the middle of a request."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_bytes: int | None = None  # of the head that is being read, in segments before this one
        self._segment_bytes = 0
        self._running_cycle: RequestResponseCycle | None = None
        self._heads = 0  # whole ones
        self._over = False  # no request is read any more: one is to be refused once those before it are answered
        self._seen = (0, 0)  # what the last look saw: heads, unsent bytes
        self._same_since = self.loop.time()
        # One look now and then instead of a timer for each request and each write.
        self._look_timer = self.loop.call_later(LOOK_EVERY_SECONDS, self._look)

    def on_message_begin(self) -> None:
        self._head_bytes = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        read_bytes, self._head_bytes = (self._head_bytes or 0) + self._segment_bytes, None
        self._heads += 1
        # What was read may hold a body or other requests too; only then the head itself is measured.
        if read_bytes > HEAD_BYTES_MAX and self._head_length() > HEAD_BYTES_MAX:
            self.send_400_response(HEAD_TOO_LONG)
            return
        if self.parser.should_upgrade() and any(name in BODY_HEADERS for name, _ in self.headers):
            self._refuse(errors.upgrade_with_body())
            return
        super().on_headers_complete()
        if 0 < len(self.pipeline) < PIPELINED_MAX:
            self.flow.resume_reading()  # a paused socket does not tell that its client left

    def _head_length(self) -> int:
        return len(self.url) + sum(len(name) + len(value) for name, value in self.headers)

    def data_received(self, data: bytes) -> None:
        if self._over:
            return
        self._segment_bytes = len(data)
        self._unset_keepalive_if_required()
        self._parse(memoryview(data))
        if self._head_bytes is not None and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES_MAX:
                self.send_400_response(HEAD_TOO_LONG)

    def _parse(self, data: memoryview) -> None:
        while data and not self._over and not self.transport.is_closing():
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:  # a request like any other (RFC 9110 §7.8), and its end
                data = data[upgrade.args[0] :]
            except httptools.HttpParserError:
                self.logger.warning("Invalid HTTP request received.")
                self.send_400_response("Invalid HTTP request received.")

    def send_400_response(self, msg: str) -> None:
        """In OpenAI's shape, like every other error."""
        self._refuse(errors.bad_request(msg))

    def _refuse(self, error: errors.GatewayError) -> None:
        if self._over or self.transport.is_closing():  # what else was wrong with it follows from that
            return
        running = self._running_cycle
        if running is None or running.response_complete:
            self._write_refusal(error)
        elif running is not self.cycle or not running.more_body:  # a later request: those before it are answered first
            self._over, self._head_bytes = True, None
            if self.pipeline and self.cycle.more_body:  # it waits its turn, and its body is what was wrong
                self.pipeline.popleft()
            last = self.pipeline[0][0] if self.pipeline else running
            last.on_response = partial(self._write_refusal, error)
            self.flow.resume_reading()  # a paused socket does not tell that its client left
        elif running.response_started:
            self.transport.close()  # nothing may be put into its answer, and its body has no end
        else:
            self._write_refusal(error)

    def _write_refusal(self, error: errors.GatewayError) -> None:
        if self.transport.is_closing():
            return
        body = json.dumps(error.payload).encode()
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        # The answer before it may have a head that is not out yet.
        out = self.transport if self._running_cycle is None else self._running_cycle.transport
        out.write(STATUS_LINE[error.status] + head + body)
        out.close()

    def _look(self) -> None:
        """Close what only costs a connection: no request for too long, or nobody who takes the answer."""
        if self.transport.is_closing():
            return
        now = self.loop.time()
        self._look_timer = self.loop.call_later(LOOK_EVERY_SECONDS, self._look)
        unsent_bytes = self.transport.get_write_buffer_size() if self.flow.write_paused else 0
        idle = self._running_cycle is None or self._running_cycle.response_complete
        seen = (self._heads, unsent_bytes)
        if seen != self._seen or not (idle or unsent_bytes):
            self._seen, self._same_since = seen, now
        elif unsent_bytes:
            if now - self._same_since >= STALLED_SECONDS:
                self.transport.abort()  # closing would wait for the client to read
        elif now - self._same_since >= HEAD_SECONDS:
            if self._head_bytes is None:
                self.transport.close()
            else:
                self._refuse(errors.head_too_slow(HEAD_SECONDS))

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running_cycle = cycle
        cycle.transport = HeadWithBody(self.transport, self.loop)  # type: ignore[assignment]
        super()._start_asgi_task(cycle, app)

    def connection_lost(self, exc: Exception | None) -> None:
        self._look_timer.cancel()
        super().connection_lost(exc)
        running = self._running_cycle
        if running is not None and running is not self.cycle and not running.response_complete:
            running.disconnected = True
            running.message_event.set()


def raise_file_limit() -> None:
    """As many connections as the system allows: each stream takes two, and the usual soft limit is 1,024."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def listening_socket(host: str, port: int) -> socket.socket:
    """Listens already: who asks while keys and routes are still being read waits instead of being refused, and a
    gateway that has reported itself is one that takes requests. Raises OSError when the port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
        made.listen(BACKLOG)
    except OSError:
        made.close()
        raise
    made.set_inheritable(False)
    return made


def server_config(app: Any, *, drain_s: float) -> uvicorn.Config:
    """``drain_s``: after SIGTERM streams may end by themselves for so long; the supervisor must wait longer."""
    return uvicorn.Config(
        app,
        loop="uvloop",
        http=GatewayProtocol,
        ws="none",
        lifespan="on",
        log_config=None,  # settings have configured logging
        access_log=False,  # the application writes its own line
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_graceful_shutdown=max(1, round(drain_s)),
    )
