"""The gateway's HTTP/1.1 client: connections to engines, one request at a time on each, kept for the next one.

It does what a proxy needs and nothing else: no redirects, cookies, compression or limits of time once it is connected.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import suppress
from functools import lru_cache, partial
from urllib.parse import urlsplit

from apps.gateway.answer import Answer, Disconnected
from apps.gateway.protocol import RawHeaders

# An engine's uvicorn closes an idle connection after 5 s; ours must be the first to let go of it.
IDLE_CONNECTION_S = 2.0
NEVER_IN_A_HEAD = re.compile(rb"[\r\n\0]")


class NotConnected(Exception):
    """There is no connection; nothing was sent."""


class Upstream:
    """Connections by base URL (``http://host:port``). All of it belongs to the event loop's thread."""

    def __init__(self, *, connect_s: float) -> None:
        self._connect_s = connect_s
        self._idle: dict[str, list[Answer]] = {}  # the youngest last
        self._sweeper: asyncio.TimerHandle | None = None

    async def ask(
        self,
        base_url: str,
        method: str,
        target: str,
        headers: RawHeaders,
        body: bytes | AsyncIterator[bytes] = b"",
        length: int | None = None,
    ) -> Answer:
        """Send a request and wait for the answer's head; then ``release`` it, however it ends. ``headers`` say nothing
        of the body's length: that is ``length``, or of a body in pieces may be None, not known.

        Raises NotConnected, Disconnected, BrokenAnswer, and what ``body`` raises."""
        if isinstance(body, bytes):
            length = len(body)
        head = request_head(base_url, method, target, headers, length)
        # Pieces come only once: they go on no connection that may have ended.
        answer = self._take(base_url) if isinstance(body, bytes) else None
        if answer is not None:
            try:
                return await self._asked(answer, head, body, length, method)
            except Disconnected as error:
                if error.begun:
                    raise
            # The engine closed the idle connection in the moment that we took it: once more, on one that is new.
        try:
            fresh = await self._connect(base_url)
        except NotConnected:
            if answer is not None:
                raise Disconnected(begun=False) from None
            raise
        return await self._asked(fresh, head, body, length, method)

    async def _asked(
        self, answer: Answer, head: bytes, body: bytes | AsyncIterator[bytes], length: int | None, method: str
    ) -> Answer:
        try:
            await answer.ask(head, body, length, is_head=method == "HEAD")
        except BaseException:
            answer.abandon()
            raise
        return answer

    async def _connect(self, base_url: str) -> Answer:
        host, port, _, _ = _address(base_url)
        try:
            async with asyncio.timeout(self._connect_s):
                _, answer = await asyncio.get_running_loop().create_connection(
                    lambda: Answer(partial(self._keep, base_url)), host, port
                )
        except TimeoutError:
            raise NotConnected(f"{host}:{port} did not answer within {self._connect_s:g} s") from None
        except OSError as error:
            raise NotConnected(str(error)) from None
        return answer

    # -- connections without a request ------------------------------------------------------------

    def _keep(self, base_url: str, answer: Answer) -> None:
        loop = asyncio.get_running_loop()
        answer.idle_since = loop.time()
        self._idle.setdefault(base_url, []).append(answer)
        if self._sweeper is None:
            self._sweeper = loop.call_later(IDLE_CONNECTION_S, self._sweep)

    def _take(self, base_url: str) -> Answer | None:
        idle = self._idle.get(base_url)
        oldest = asyncio.get_running_loop().time() - IDLE_CONNECTION_S
        while idle:
            answer = idle.pop()
            if not answer.closed and answer.idle_since > oldest:
                return answer
            answer.close()
        return None

    def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        oldest = loop.time() - IDLE_CONNECTION_S
        kept: dict[str, list[Answer]] = {}
        for base_url, idle in self._idle.items():
            for answer in idle:
                if answer.idle_since > oldest and not answer.closed:
                    kept.setdefault(base_url, []).append(answer)
                else:
                    answer.close()
        self._idle = kept
        self._sweeper = loop.call_later(IDLE_CONNECTION_S, self._sweep) if kept else None

    def close(self) -> None:
        """What is under way is its asker's to end."""
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None
        for idle in self._idle.values():
            for answer in idle:
                answer.close()
        self._idle = {}


def request_head(base_url: str, method: str, target: str, headers: RawHeaders, length: int | None) -> bytes:
    """Raises ValueError for what would end a line."""
    _, _, host, prefix = _address(base_url)
    lines = [b"%b %b HTTP/1.1" % (method.encode("ascii"), (prefix + target).encode("ascii")), b"host: " + host]
    lines += [b"%b: %b" % header for header in headers]
    if length is None:
        lines.append(b"transfer-encoding: chunked")
    elif length or method == "POST":
        lines.append(b"content-length: %d" % length)
    if NEVER_IN_A_HEAD.search(b"".join(lines)):
        raise ValueError("a line of the request's head has a control character")
    return b"\r\n".join(lines) + b"\r\n\r\n"


@lru_cache(maxsize=256)
def _address(base_url: str) -> tuple[str, int, bytes, str]:
    """Host, port, the Host header and the path before every target. Raises NotConnected for what is no address."""
    with suppress(ValueError):
        parts = urlsplit(base_url)
        if parts.scheme == "http" and parts.hostname:
            return parts.hostname, parts.port or 80, parts.netloc.encode("ascii"), parts.path.rstrip("/")
    raise NotConnected(f"{base_url!r} is not the address of an engine")
