"""The one address of a Ray deployment: checks the launch's key and passes requests to Serve's proxy.

Serve's own proxy has no keys, and in a private network nobody outside reaches it. Bodies and streams pass through
as they come, in both directions; when the caller goes away, so does the request to Serve.

Only aiohttp (Ray's dashboard needs it too) and the syntax of Python 3.10: this runs in Ray's own environment.
"""

from __future__ import annotations

import hmac
import json
import re
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
from aiohttp import web

STATE_PATH = "/rigpanel/replicas"
HOP_BY_HOP = frozenset(
    ("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer", "transfer-encoding")
) | {"upgrade", "host", "authorization"}
# What the panel reads; a raylet exports several hundred series more.
METRICS = re.compile(rb"^(?:# (?:HELP|TYPE) )?ray_(?:vllm|serve_(?:num|deployment|http))[^\n]*\n", re.MULTILINE)


class Door:
    """``report`` gives the state document and whether requests can be served; ``metrics_urls`` are the raylets'.

    Make it inside the loop that will serve it."""

    def __init__(
        self,
        *,
        key: str,
        upstream: str,
        metrics_urls: Callable[[], list[str]],
        report: Callable[[], tuple[dict[str, Any], bool]],
    ) -> None:
        self._key = f"Bearer {key}".encode()
        self._upstream = upstream
        self._metrics_urls = metrics_urls
        self._report = report
        # No limits of our own: a long answer is an answer, and how many at once is Serve's to say.
        self._client = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
            auto_decompress=False,
            skip_auto_headers=("Accept-Encoding", "User-Agent"),  # what a caller did not ask for, it does not get
        )

    async def close(self) -> None:
        await self._client.close()

    def application(self) -> web.Application:
        application = web.Application(client_max_size=0)
        application.router.add_get("/health", self.health)
        application.router.add_get("/metrics", self.guarded(self.metrics))
        application.router.add_get(STATE_PATH, self.guarded(self.state))
        application.router.add_route("*", "/{path:.*}", self.guarded(self.forward))
        return application

    def guarded(self, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> Any:
        async def checked(request: web.Request) -> web.StreamResponse:
            given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
            if not hmac.compare_digest(given, self._key):
                return _error(401, "invalid_api_key", "This engine needs its launch's own key.")
            return await handler(request)

        return checked

    async def health(self, request: web.Request) -> web.Response:
        _, serving = self._report()
        return web.Response(status=200 if serving else 503)

    async def state(self, request: web.Request) -> web.Response:
        document, _ = self._report()
        return web.json_response(document)

    async def metrics(self, request: web.Request) -> web.Response:
        """Every raylet exports what its own replicas count; a raylet that does not answer is left out."""
        texts = []
        for url in self._metrics_urls():
            try:
                async with self._client.get(url, timeout=aiohttp.ClientTimeout(total=2)) as answer:
                    texts += METRICS.findall(await answer.read() + b"\n")
            except (aiohttp.ClientError, TimeoutError):
                continue
        return web.Response(body=b"".join(texts), headers={"Content-Type": "text/plain; version=0.0.4"})

    async def forward(self, request: web.Request) -> web.StreamResponse:
        _, serving = self._report()
        if not serving:
            return _error(503, "not_ready", "No replica serves now.")
        headers = {k: v for k, v in request.headers.items() if k.lower() not in HOP_BY_HOP}
        answer: web.StreamResponse | None = None
        try:
            async with self._client.request(
                request.method,
                self._upstream + request.raw_path,
                headers=headers,
                data=request.content if request.body_exists else None,
                allow_redirects=False,
            ) as upstream:
                answer = web.StreamResponse(status=upstream.status, reason=upstream.reason)
                for name, value in upstream.headers.items():
                    if name.lower() not in HOP_BY_HOP:
                        answer.headers.add(name, value)
                await answer.prepare(request)
                async for chunk in upstream.content.iter_any():
                    await answer.write(chunk)
                await answer.write_eof()
                return answer
        except (aiohttp.ClientError, TimeoutError) as error:
            if answer is not None and answer.prepared:
                # Half an answer went out: cutting the connection is the only honest end.
                if request.transport is not None:
                    request.transport.close()
                return answer
            return _error(502, "proxy_gone", f"Serve's proxy did not answer: {type(error).__name__}.")


def _error(status: int, code: str, message: str) -> web.Response:
    body = json.dumps({"error": {"message": message, "type": code, "code": code}})
    return web.Response(status=status, text=body, content_type="application/json")
