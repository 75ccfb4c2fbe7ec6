"""The simulated engine's OpenAI-shaped answers and its vLLM-shaped metrics."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import os
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from apps.engines.simulated.http import Request, Response, json_response
from apps.engines.simulated.metrics import Counters, Settings, exposition

SENTENCE = (
    "a simulated engine answers with words that mean nothing but always come in the same order so that "
    "a test can compare them while four cards that do not exist grow warm and the fans of a rig that "
    "nobody built begin to turn"
)
WORDS = SENTENCE.split()
DEFAULT_TOKENS = 48  # of an answer without max_tokens
EMBEDDING_SIZE = 64


class Engine:
    """Answers requests. ``on_load`` hears the number of running requests whenever it changes."""

    def __init__(self, settings: Settings, on_load: Callable[[int], None], on_crash: Callable[[], None]) -> None:
        self.settings = settings
        self.counters = Counters()
        self.ready = False
        self.awake = asyncio.Event()
        self.awake.set()
        self.on_sleep: Callable[[bool], Awaitable[str]] | None = None
        self._on_load = on_load
        self._on_crash = on_crash
        self._slots = asyncio.Semaphore(settings.max_num_seqs)

    async def handle(self, request: Request) -> Response:
        open_paths = {"/health": self._health, "/ping": self._health, "/version": self._version}
        if request.path in open_paths:
            return open_paths[request.path]()
        if not self.ready:
            return _error(503, "The model is still loading.", "ServiceUnavailableError")
        if request.path == "/metrics":
            return Response(
                200,
                exposition(self.settings, self.counters).encode(),
                "text/plain; version=0.0.4; charset=utf-8",
            )
        if self.settings.sleep_mode and request.path in ("/sleep", "/wake_up", "/is_sleeping"):
            return await self._sleep_or_wake(request)
        if request.path.startswith("/v1/") and not self._authorized(request):
            return json_response({"error": "Unauthorized"}, 401)  # vLLM's own body
        routes = {
            "/v1/models": ("GET", self._models),
            "/v1/chat/completions": ("POST", self._chat),
            "/v1/completions": ("POST", self._completions),
            "/v1/embeddings": ("POST", self._embeddings),
        }
        method, answer = routes.get(request.path, ("", None))
        if answer is None:
            return json_response({"detail": "Not Found"}, 404)
        if request.method != method:
            return json_response({"detail": "Method Not Allowed"}, 405)
        if method == "GET":
            return answer({})
        try:
            body = json.loads(request.body or b"{}")
        except ValueError:
            body = None
        if not isinstance(body, dict):
            return _error(400, "The body is not a JSON object.", "BadRequestError")
        if body.get("model") not in (None, self.settings.served_name):
            return _error(404, f"The model `{body['model']}` does not exist.", "NotFoundError")
        return self._scripted_failure() or answer(body)

    async def _sleep_or_wake(self, request: Request) -> Response:
        """As vLLM's developer endpoints: no key, an empty body, and requests of a sleeper hang."""
        if request.path == "/is_sleeping":
            return json_response({"is_sleeping": not self.awake.is_set()})
        to_sleep = request.path == "/sleep"
        if self.settings.fail_sleep if to_sleep else self.settings.fail_wake:
            return _error(500, "cuMem could not be released (simulated).", "InternalServerError")
        if self.on_sleep is not None and (problem := await self.on_sleep(to_sleep)):
            return _error(500, problem, "InternalServerError")
        if to_sleep:
            self.awake.clear()
        else:
            self.awake.set()
        return Response(200, b"", "text/plain")

    def _scripted_failure(self) -> Response | None:
        settings, counters = self.settings, self.counters
        counters.accepted += 1
        if settings.crash_after_requests is not None and counters.accepted > settings.crash_after_requests:
            self._on_crash()
        if settings.error_500 or counters.accepted <= settings.fail_requests:
            return _error(500, "EngineCore encountered an issue (simulated).", "InternalServerError")
        return None

    def _health(self) -> Response:
        return Response(200 if self.ready else 503, b"", "text/plain")

    def _version(self) -> Response:
        return json_response({"version": "simulated"})

    def _authorized(self, request: Request) -> bool:
        if not self.settings.api_key:
            return True
        given = request.headers.get("authorization", "").partition("Bearer ")[2]
        return hmac.compare_digest(given.encode(), self.settings.api_key.encode())

    def _models(self, _: dict[str, Any]) -> Response:
        model = {
            "id": self.settings.served_name,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "simulated",
            "root": self.settings.model,
            "max_model_len": self.settings.max_model_len,
        }
        return json_response({"object": "list", "data": [model]})

    def _chat(self, body: dict[str, Any]) -> Response:
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            return _error(400, "messages must be a list with at least one message.", "BadRequestError")
        return self._generate(body, json.dumps(messages, sort_keys=True), chat=True)

    def _completions(self, body: dict[str, Any]) -> Response:
        if "prompt" not in body:
            return _error(400, "prompt is missing.", "BadRequestError")
        return self._generate(body, json.dumps(body["prompt"]), chat=False)

    def _generate(self, body: dict[str, Any], prompt: str, chat: bool) -> Response:
        wanted = body.get("max_completion_tokens") or body.get("max_tokens")
        if wanted is not None and (not isinstance(wanted, int) or wanted < 1):
            return _error(400, f"max_tokens must be a whole number of at least 1, not {wanted!r}.", "BadRequestError")
        prompt_tokens = count_tokens(prompt)
        limit = self.settings.max_model_len
        if wanted is not None and prompt_tokens + wanted > limit:
            message = f"max_tokens={wanted} cannot be greater than max_model_len=max_total_tokens={limit}."
            return _error(400, message, "BadRequestError")
        natural = DEFAULT_TOKENS if not body.get("ignore_eos") else 10**9
        count = max(1, min(natural, wanted or natural, limit - prompt_tokens))
        reason = "length" if wanted is not None and count >= wanted else "stop"
        answer = _Answer(self, body, prompt_tokens, answer_words(prompt, count), reason, chat)
        if body.get("stream"):
            return Response(200, content_type="text/event-stream; charset=utf-8", stream=answer.events())
        return Response(200, stream=answer.whole())

    async def words(self, answer: list[str], prompt_tokens: int, ending: str) -> AsyncIterator[str]:
        """Generates at the scripted speed, counting as vLLM does; closing it early is an abort."""
        counters, settings = self.counters, self.settings
        arrived = time.monotonic()
        counters.waiting += 1
        try:
            await self.awake.wait()
            await self._slots.acquire()
        finally:
            counters.waiting -= 1
        counters.running += 1
        self._on_load(counters.running)
        held = prompt_tokens
        counters.tokens_in_flight += held
        reason = "abort"
        try:
            await asyncio.sleep(settings.slow_first_token_seconds)
            for number, word in enumerate(answer):
                await asyncio.sleep(1.0 / settings.tokens_per_second)
                if number == 0:
                    counters.prompt_tokens += prompt_tokens
                    counters.note_first_token(time.monotonic() - arrived)
                counters.generation_tokens += 1
                counters.tokens_in_flight += 1
                held += 1
                yield word
            reason = ending
        finally:
            counters.tokens_in_flight -= held
            counters.running -= 1
            counters.finished[reason] += 1
            self._slots.release()
            self._on_load(counters.running)

    def _embeddings(self, body: dict[str, Any]) -> Response:
        given = body.get("input")
        texts = given if isinstance(given, list) and given and not isinstance(given[0], int) else [given]
        if given in (None, "", []):
            return _error(400, "input is missing.", "BadRequestError")
        data = []
        for index, text in enumerate(texts):
            vector = embedding(json.dumps(text))
            as_base64 = body.get("encoding_format") == "base64"
            value = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode() if as_base64 else vector
            data.append({"object": "embedding", "index": index, "embedding": value})
        tokens = sum(count_tokens(json.dumps(text)) for text in texts)
        self.counters.prompt_tokens += tokens
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return json_response({"object": "list", "data": data, "model": self.settings.served_name, "usage": usage})


class _Answer:
    """One completion, whole or as server-sent events."""

    def __init__(
        self,
        engine: Engine,
        body: dict[str, Any],
        prompt_tokens: int,
        answer: list[str],
        reason: str,
        chat: bool,
    ) -> None:
        self.engine = engine
        self.prompt_tokens = prompt_tokens
        self.answer = answer
        self.reason = reason
        self.chat = chat
        options = body.get("stream_options")
        self.include_usage = isinstance(options, dict) and bool(options.get("include_usage"))
        self.base = {
            "id": ("chatcmpl-" if chat else "cmpl-") + os.urandom(12).hex(),
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": engine.settings.served_name,
        }

    def _usage(self) -> dict[str, int]:
        generated = len(self.answer)
        total = self.prompt_tokens + generated
        return {"prompt_tokens": self.prompt_tokens, "total_tokens": total, "completion_tokens": generated}

    async def whole(self) -> AsyncIterator[bytes]:
        text = ""
        async for word in self.engine.words(self.answer, self.prompt_tokens, self.reason):
            text += word
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": self.reason}
        if self.chat:
            choice["message"] = {"role": "assistant", "content": text, "tool_calls": []}
        else:
            choice["text"] = text
        yield json.dumps({**self.base, "choices": [choice], "usage": self._usage()}).encode()

    async def events(self) -> AsyncIterator[bytes]:
        if self.chat:
            yield self._event({"role": "assistant", "content": ""})
        words = self.engine.words(self.answer, self.prompt_tokens, self.reason)
        try:
            async for word in words:
                yield self._event({"content": word} if self.chat else word)
        finally:
            await words.aclose()  # type: ignore[attr-defined]
        yield self._event({} if self.chat else "", self.reason)
        if self.include_usage:
            yield _sse({**self._chunk(), "choices": [], "usage": self._usage()})
        yield b"data: [DONE]\n\n"

    def _chunk(self) -> dict[str, Any]:
        return {**self.base, "object": "chat.completion.chunk" if self.chat else "text_completion"}

    def _event(self, content: object, reason: str | None = None) -> bytes:
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": reason}
        choice["delta" if self.chat else "text"] = content
        return _sse({**self._chunk(), "choices": [choice]})


def count_tokens(text: str) -> int:
    """Four characters to a token, as a rule of thumb for English."""
    return len(text) // 4 + 1


def answer_words(prompt: str, count: int) -> list[str]:
    """The same prompt always gives the same words."""
    start = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "big")
    return [(" " if n else "") + WORDS[(start + n) % len(WORDS)] for n in range(count)]


def embedding(text: str) -> list[float]:
    digest = hashlib.sha512(text.encode()).digest()[:EMBEDDING_SIZE]
    values = [byte / 255 - 0.5 for byte in digest]
    length = sum(v * v for v in values) ** 0.5
    return [v / length for v in values]


def _sse(value: object) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def _error(status: int, message: str, kind: str) -> Response:
    return json_response({"error": {"message": message, "type": kind, "param": None, "code": status}}, status)
