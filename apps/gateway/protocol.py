"""What may come in and what goes on: paths and headers."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from apps.gateway import errors

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
RawHeaders = Iterable[tuple[bytes, bytes]]

MODELS_PATH = "/v1/models"
# These take a JSON object with a model. Engines have some of them without /v1.
JSON_PATHS = frozenset(
    {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/embeddings",
        "/v1/rerank",
        "/v2/rerank",
        "/rerank",
        "/v1/score",
        "/score",
        "/tokenize",
        "/v1/tokenize",
        "/detokenize",
        "/v1/detokenize",
        "/v1/messages",
        "/v1/messages/count_tokens",
    }
)
FORM_PATHS = frozenset({"/v1/audio/transcriptions", "/v1/audio/translations"})
ENGINE_PATHS = {"/v1/tokenize": "/tokenize", "/v1/detokenize": "/detokenize"}
# Streams of these tell what they cost only when asked to.
USAGE_ON_REQUEST = frozenset({"/v1/chat/completions", "/v1/completions"})
ANTHROPIC_PATHS = frozenset({"/v1/messages", "/v1/messages/count_tokens"})
# Under /v1/, and yet not for whoever may use a model: they change what the engine serves.
KEPT_PATHS = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter"})
METHODS = frozenset({"GET", "HEAD", "POST", "DELETE"})
EVENT_STREAM = b"text/event-stream"

# RFC 9110 §7.6.1; keep-alive and proxy-connection are from before it.
HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
# Requests: only what an engine can use. The member's key, cookies, forwarding and framing headers
# never reach it, so nothing can be smuggled through.
REQUEST_HEADERS = frozenset(
    {
        b"accept",
        b"content-type",
        b"user-agent",
        b"traceparent",
        b"tracestate",
        b"anthropic-version",
        b"anthropic-beta",
    }
)
# Answers: everything but what concerns this hop only.
ANSWER_HEADERS_DROPPED = HOP_BY_HOP | {
    b"date",
    b"server",
    b"set-cookie",
    b"alt-svc",
    b"strict-transport-security",
    b"x-request-id",
}

REQUEST_ID = b"x-request-id"
REQUEST_ID_LENGTH_MAX = 128


def is_engines(path: str) -> bool:
    """Whether a request for this path is an engine's to answer."""
    if path in JSON_PATHS:
        return True
    if not path.startswith("/v1/") or path in KEPT_PATHS or path == MODELS_PATH or path.startswith(MODELS_PATH + "/"):
        return False
    # Nothing that another server could read as leading out of /v1/.
    return path.isprintable() and not any(part in ("", ".", "..") for part in path[4:].split("/")) and "\\" not in path


def header(headers: RawHeaders, wanted: bytes) -> bytes | None:
    """The value of the first header of that (lower-case) name."""
    for name, value in headers:
        if name == wanted:
            return value
    return None


def bearer_token(headers: RawHeaders) -> str | None:
    """The token of ``Authorization: Bearer …``, else of ``x-api-key``, as Anthropic's clients send it. None without
    one; two headers of one name are refused."""
    values = [value for name, value in headers if name == b"authorization"]
    others = [value for name, value in headers if name == b"x-api-key"]
    if len(values) > 1 or len(others) > 1:
        raise errors.bad_request("There is more than one Authorization or x-api-key header.")
    if values:
        scheme, _, token = values[0].decode("latin-1").strip().partition(" ")
        if scheme.lower() == "bearer" and token.strip():
            return token.strip()
    return others[0].decode("latin-1").strip() or None if others else None


def request_id(headers: RawHeaders) -> str:
    """The caller's ``X-Request-Id`` if it is short and plain, else a new one."""
    given = header(headers, REQUEST_ID)
    if given and len(given) <= REQUEST_ID_LENGTH_MAX:
        text = given.decode("latin-1")
        if text.isascii() and text.isprintable() and " " not in text:
            return text
    return f"req-{secrets.token_hex(12)}"


def declared_length(headers: RawHeaders) -> int | None:
    """``Content-Length`` as a number. Raises 400 for one that is not, or for two that differ.

    The HTTP parser refuses these too; this is the second lock, for when another server runs the application.
    """
    found: bytes | None = None
    for name, value in headers:
        if name == b"content-length":
            length = value.strip()
            if not length.isdigit() or (found is not None and length != found):
                raise errors.bad_request("The Content-Length headers contradict each other or are not a number.")
            found = length
    return None if found is None else int(found)


def upstream_headers(
    headers: RawHeaders, *, engine_key: str, request_id: str, has_body: bool = True
) -> list[tuple[bytes, bytes]]:
    """Headers for the engine, without those of framing; its own key takes the place of the member's."""
    kept = [header for header in headers if header[0] in REQUEST_HEADERS]
    if has_body and header(kept, b"content-type") is None:
        kept.append((b"content-type", b"application/json"))
    kept.append((REQUEST_ID, request_id.encode()))
    if engine_key:
        kept.append((b"authorization", b"Bearer " + engine_key.encode()))
    return kept


def answer_headers(raw_headers: RawHeaders) -> list[tuple[bytes, bytes]]:
    """The engine's headers for the client, without those of the hop (also those ``Connection`` names)."""
    headers = [(name.lower(), value) for name, value in raw_headers]
    dropped = ANSWER_HEADERS_DROPPED
    for name, value in headers:
        if name == b"connection":
            dropped = dropped.union(token.strip().lower() for token in value.split(b","))
    return [header for header in headers if header[0] not in dropped]


def is_event_stream(content_type: bytes) -> bool:
    return content_type.partition(b";")[0].strip().lower() == EVENT_STREAM


LAST_EVENTS = (
    b"data: [DONE]\n\n",
    b"data: [DONE]\r\n\r\n",
    b'{"type":"message_stop"}\n\n',
    b'{"type": "message_stop"}\n\n',
)


def is_last_event(events: bytes) -> bool:
    """Whether a client reads no further than these whole events, though the connection's end is still to come."""
    return events.endswith(LAST_EVENTS)


class EventTail:
    """Lets whole server-sent events pass and keeps back the begun one, byte for byte.

    A client can do nothing with half an event, so this delays nothing. It makes sure that when an engine dies
    in the middle of one, what the client gets next (the error) is not glued to a torn line.
    """

    MAX_BYTES = 256 * 1024  # an engine that never ends an event: let it pass as it comes

    def __init__(self) -> None:
        self._kept = b""

    def whole(self, chunk: bytes) -> bytes:
        """What may be sent on now."""
        data = self._kept + chunk if self._kept else chunk
        if data.endswith((b"\n\n", b"\r\n\r\n")):  # the usual case: a chunk is an event
            self._kept = b""
            return data
        line_feeds, pairs = data.rfind(b"\n\n"), data.rfind(b"\r\n\r\n")
        end = max(line_feeds + 2 if line_feeds >= 0 else 0, pairs + 4 if pairs >= 0 else 0)
        if len(data) - end > self.MAX_BYTES:
            end = len(data)
        self._kept = data[end:]
        return data[:end]

    def rest(self) -> bytes:
        """What is left at the stream's proper end."""
        kept, self._kept = self._kept, b""
        return kept
