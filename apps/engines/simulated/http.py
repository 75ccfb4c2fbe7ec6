"""A small HTTP/1.1 server over asyncio streams: enough for an OpenAI-shaped API.

Written here because a simulated engine should take little memory (a web framework doubles it).
Keep-alive, bodies by length or chunks, streamed answers; no TLS, loopback only.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from http import HTTPStatus

HEADER_LIMIT = 64 * 1024
BODY_LIMIT = 64 * 1024 * 1024


@dataclass(slots=True)
class Request:
    method: str
    path: str
    headers: dict[str, str]  # names in lower case
    body: bytes


@dataclass(slots=True)
class Response:
    """``stream`` is sent chunk by chunk as it comes; otherwise ``body`` is the whole answer."""

    status: int = 200
    body: bytes = b""
    content_type: str = "application/json"
    stream: AsyncIterator[bytes] | None = None
    headers: dict[str, str] = field(default_factory=dict)


class BadRequest(Exception):
    """The bytes are not a request that can be answered further."""


Handler = Callable[[Request], Awaitable[Response]]


def json_response(value: object, status: int = 200) -> Response:
    return Response(status, json.dumps(value).encode())


async def serve(handler: Handler, host: str, port: int) -> asyncio.Server:
    """Raises OSError when the port is taken."""

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await _one_exchange(handler, reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                await writer.wait_closed()

    return await asyncio.start_server(connection, host, port, limit=HEADER_LIMIT)


async def _one_exchange(handler: Handler, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    """Answer one request; says whether the connection stays open for another."""
    try:
        request = await _read_request(reader)
    except BadRequest as error:
        await _send(writer, json_response({"error": {"message": str(error), "code": 400}}, 400), False, False)
        return False
    if request is None:
        return False
    keep = request.headers.get("connection", "").lower() != "close"
    response = await handler(request)
    await _send(writer, response, keep, request.method == "HEAD")
    return keep


async def _read_request(reader: asyncio.StreamReader) -> Request | None:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    except asyncio.LimitOverrunError as error:
        raise BadRequest("The header is too long.") from error
    first, *lines = head.decode("latin-1").split("\r\n")
    parts = first.split(" ")
    if len(parts) != 3:
        raise BadRequest("The request line is not HTTP.")
    headers = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if colon:
            headers[name.strip().lower()] = value.strip()
    if "chunked" in headers.get("transfer-encoding", "").lower():
        body = await _read_chunks(reader)
    else:
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > BODY_LIMIT:
            raise BadRequest("The body is too long.")
        body = await reader.readexactly(int(length))
    return Request(parts[0], parts[1].partition("?")[0], headers, body)


async def _read_chunks(reader: asyncio.StreamReader) -> bytes:
    body = b""
    while True:
        size_line = (await reader.readline()).partition(b";")[0].strip()
        try:
            size = int(size_line, 16)
        except ValueError as error:
            raise BadRequest("The body's chunks are broken.") from error
        if size < 0 or len(body) + size > BODY_LIMIT:
            raise BadRequest("The body is too long.")
        if size == 0:
            while (await reader.readline()).strip():
                pass  # trailers
            return body
        body += await reader.readexactly(size)
        await reader.readexactly(2)


async def _send(writer: asyncio.StreamWriter, response: Response, keep: bool, head_only: bool) -> None:
    reason = HTTPStatus(response.status).phrase
    lines = [
        f"HTTP/1.1 {response.status} {reason}",
        f"content-type: {response.content_type}",
        f"connection: {'keep-alive' if keep else 'close'}",
        *(f"{name}: {value}" for name, value in response.headers.items()),
    ]
    if response.stream is None or head_only:
        lines.append(f"content-length: {len(response.body)}")
        body = b"" if head_only else response.body
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        await writer.drain()
        return
    lines.append("transfer-encoding: chunked")
    writer.write("\r\n".join(lines).encode() + b"\r\n\r\n")
    try:
        async for chunk in response.stream:
            if writer.is_closing():
                raise ConnectionResetError
            writer.write(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")
            await writer.drain()
        writer.write(b"0\r\n\r\n")
        await writer.drain()
    finally:
        close = getattr(response.stream, "aclose", None)
        if close is not None:
            await close()  # ends the generation when the client went away
