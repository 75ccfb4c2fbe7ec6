"""Around a gateway under test: an event loop in a thread, engines that can misbehave, a plain client."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from aiohttp import web

from tests.gateway import dialects

T = TypeVar("T")
DEADLINE_S = 60.0


class LoopThread:
    """Servers and clients run here, so that a test itself can be plain and use the database."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="test-loop", daemon=True)
        self._thread.start()

    def spawn(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.spawn(work).result(DEADLINE_S)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(DEADLINE_S)
        self.loop.close()


def until(what: Callable[[], Any], why: str) -> Any:
    """Wait until ``what`` returns something true; fail with ``why`` past a generous deadline."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        value = what()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"waited {DEADLINE_S:.0f} s in vain: {why}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Received:
    path: str
    headers: list[tuple[str, str]]
    body: bytes


@dataclass
class Engine:
    """An engine of ours. A request's own members say how it behaves, so any client can ask for it:

    ``script``: *die_before* · *die_within* (in the middle of an event) · *hang* (until ``release``) · *flood* ·
    *status* (answers ``status``) · nothing of these; ``chunks``: how many; ``gate``: a stream stops after its first
    chunk until ``release``.
    """

    model: str
    key: str = "engine-key"
    port: int = 0
    received: list[Received] = field(default_factory=list)
    running: int = 0
    abandoned: int = 0  # requests whose client went away
    wrong: int = 0  # requests for another model, or with another engine's key
    flooded_bytes: int = 0
    body_bytes_max: int = 64 * 2**20

    def __post_init__(self) -> None:
        self._release = asyncio.Event()
        self._runner: web.AppRunner | None = None

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        app = web.Application(client_max_size=self.body_bytes_max)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def release(self) -> None:
        self._release.set()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        raw = await request.read()
        if request.content_type == "multipart/form-data":
            body = {
                "model": dialects.form_field(raw, request.headers["Content-Type"].partition("boundary=")[2], "model")
            }
        elif raw:
            body = json.loads(raw)
        else:
            body = {"model": self.model}
        if body.get("model") != self.model:
            self.wrong += 1
            return web.json_response({"error": {"message": "another model", "code": "model_not_found"}}, status=404)
        if request.headers.get("Authorization") != f"Bearer {self.key}":
            self.wrong += 1
            return web.json_response({"error": {"message": "unauthorized"}}, status=401)
        headers = [(n.decode().lower(), v.decode()) for n, v in request.raw_headers]
        self.received.append(Received(request.path_qs, headers, raw))
        self.running += 1
        try:
            return await self._answer(request, body)
        except (asyncio.CancelledError, ConnectionError):
            self.abandoned += 1
            raise
        finally:
            self.running -= 1

    async def _answer(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        script = body.get("script", "")
        if script == "die_before":
            request.transport.abort()  # type: ignore[union-attr]
            return web.Response()
        if script == "hang":
            await self._release.wait()
        if script == "status":
            return web.json_response({"error": {"message": "as asked", "code": "asked"}}, status=body["status"])
        if body.get("stream"):
            return await self._stream(request, body, script)
        if request.path in dialects.ANSWERS:
            return web.Response(body=dialects.ANSWERS[request.path], content_type="application/json")
        if request.path == "/v1/embeddings":
            return web.json_response(
                {
                    "object": "list",
                    "model": self.model,
                    "data": [{"object": "embedding", "index": 0, "embedding": [0.5, -1.0]}],
                }
            )
        return web.Response(body=ANSWER.replace(b"MODEL", self.model.encode()), content_type="application/json")

    async def _stream(self, request: web.Request, body: dict[str, Any], script: str) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8", "X-Engine": "ours"})
        response.enable_chunked_encoding()
        await response.prepare(request)
        if script == "flood":
            while True:
                await response.write(b"data: " + b"x" * 65528 + b"\n\n")
                self.flooded_bytes += 65536
        chunks = dialects.STREAMS.get(request.path) or events(self.model, body.get("chunks", 3))
        if (body.get("stream_options") or {}).get("include_usage"):
            chunks.insert(-1, USAGE_EVENT)
        for index, event in enumerate(chunks):
            if script == "die_within" and index == 2:
                await response.write(event[:20])
                await asyncio.sleep(0.05)
                request.transport.abort()  # type: ignore[union-attr]
                return response
            await response.write(event)
            if index == 0 and body.get("gate"):
                await self._release.wait()
            if body.get("pause_s"):
                await asyncio.sleep(body["pause_s"])
        await response.write_eof()
        return response


ANSWER = (
    b'{"id":"chatcmpl-1","object":"chat.completion","created":1,"model":"MODEL","choices":[{"index":0,'
    b'"message":{"role":"assistant","content":"Hi \xe2\x80\x94 there"},"text":"Hi","finish_reason":"stop"}],'
    b'"usage":{"prompt_tokens":1,"completion_tokens":2,"total_tokens":3}}'
)


USAGE_EVENT = (
    b'data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"m","choices":[],'
    b'"usage":{"prompt_tokens":11,"completion_tokens":3,"total_tokens":14,"prompt_tokens_details":{"cached_tokens":8}}}'
    b"\n\n"
)


def events(model: str, count: int) -> list[bytes]:
    """The exact bytes of a stream."""
    chunk = (
        '{"id":"c","object":"chat.completion.chunk","created":1,"model":"%s",'
        '"choices":[{"index":0,"delta":{"content":"t%d "}}]}'
    )
    return [b"data: " + (chunk % (model, n)).encode() + b"\n\n" for n in range(count)] + [b"data: [DONE]\n\n"]


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """OpenAI's shape, checked."""
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
        assert error["type"]
        return dict(error)


def ask(
    port: int,
    method: str,
    path: str,
    body: Any = None,
    *,
    key: str | None = None,
    headers: dict[str, str] | None = None,
) -> Answer:
    """One request on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S)
    try:
        raw = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        given = {"Authorization": f"Bearer {key}"} if key else {}
        connection.request(method, path, raw, {**given, **(headers or {})})
        response = connection.getresponse()
        content = response.read()
        return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, content)
    finally:
        connection.close()


def raw_exchange(port: int, data: bytes, *, half_close: bool = True) -> bytes:
    """Send bytes as they are and read until the other side closes or has nothing more to say. ``half_close`` tells it
    that no more will come, which the gateway takes for a client that left."""
    with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S) as connection:
        connection.sendall(data)
        if half_close:
            connection.shutdown(socket.SHUT_WR)
        answer = b""
        while part := connection.recv(65536):
            answer += part
        return answer


def chat(model: str, **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "Hello"}], **more}
