"""From an HTTP request to a call that an engine can get: which model, which bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode

from apps.gateway import errors
from apps.gateway.bodies import Parsed, parse_body
from apps.gateway.client import BodyShare, Client
from apps.gateway.limits import Limits
from apps.gateway.observer import Exchange
from apps.gateway.protocol import (
    ENGINE_PATHS,
    JSON_PATHS,
    USAGE_ON_REQUEST,
    Scope,
    declared_length,
    header,
)
from apps.gateway.uploads import Upload, is_form


@dataclass(slots=True)
class Wish:
    """What a client asks for, before it is decided whether and by whom it is answered.

    ``asked_model`` is empty where a request without a body named none. ``parsed`` or ``upload`` or neither is there.
    """

    method: str
    path: str
    query: bytes
    asked_model: str
    body: bytes = b""
    parsed: Parsed | None = None
    upload: Upload | None = None

    @property
    def stream(self) -> bool:
        return self.parsed is not None and self.parsed.stream


@dataclass(slots=True)
class Call:
    """A request as the engine will get it. ``began``: time.monotonic() of its head.

    ``target``: path and query. ``conversation``: the same number for every turn of one, None where there is none.
    ``check_again``: raises what speaks against the call by now, when it had to wait.
    ``strip_usage``: the figures at the stream's end are for the gateway only.
    """

    method: str
    target: str
    model: str
    stream: bool
    strip_usage: bool
    body: bytes
    upload: Upload | None
    conversation: int | None
    share: BodyShare
    exchange: Exchange
    began: float
    check_again: Callable[[], None]


async def read_wish(client: Client, scope: Scope, limits: Limits, share: BodyShare) -> Wish:
    """Read as much of the request as says which model it is for. Raises GatewayError and ClientGone."""
    method, path, query = scope["method"], scope["path"], scope.get("query_string", b"")
    content_type = header(client.headers, b"content-type")
    if method == "POST" and path not in JSON_PATHS and is_form(content_type):
        declared_bytes = declared_length(client.headers)
        if declared_bytes is not None and declared_bytes > limits.upload_bytes:
            raise errors.body_too_large(limits.upload_bytes)
        upload = Upload(client.piece, (content_type or b"").decode("latin-1"), limits, declared_bytes)
        model = await upload.find_model()
        share.take(upload.held_bytes)
        return Wish(method, path, query, model, upload=upload)
    body = await client.body(limits, share)
    if method == "POST" and (body or path in JSON_PATHS):
        parsed = parse_body(body, elements_max=limits.json_elements, need_model=path in JSON_PATHS)
        return Wish(method, path, query, parsed.model or _model_in(query), body, parsed)
    return Wish(method, path, query, _model_in(query), body)


def call_of(
    wish: Wish,
    model: str,
    *,
    share: BodyShare,
    exchange: Exchange,
    began: float,
    check_again: Callable[[], None],
) -> Call:
    """The call for the model of that served name, in the bytes that its engine gets."""
    asks_usage = wish.stream and wish.path in USAGE_ON_REQUEST
    body, conversation, strip = wish.body, None, False
    if wish.parsed is not None:
        strip = asks_usage and not wish.parsed.include_usage
        if strip or (wish.parsed.model and wish.parsed.model != model):
            body = wish.parsed.rewritten(body, model=model, add_usage=asks_usage)
        opening = wish.parsed.opening()
        if opening:
            conversation = int.from_bytes(blake2b(opening, digest_size=8).digest(), "big")
    elif wish.upload is not None and wish.upload.model != model:
        wish.upload.rename(model)
    target = ENGINE_PATHS.get(wish.path, wish.path)
    if wish.path not in JSON_PATHS:
        target = quote(target, safe="/:@!$&'()*+,;=~-._")
        if wish.query:
            target += _query_for(wish.query, model)
    return Call(
        method=wish.method,
        target=target,
        model=model,
        stream=wish.stream,
        strip_usage=strip,
        body=body,
        upload=wish.upload,
        conversation=conversation,
        share=share,
        exchange=exchange,
        began=began,
        check_again=check_again,
    )


def only_model(available: Sequence[str]) -> str:
    """For a request that names none: the one that there is. Raises 400 when there is not just one."""
    if len(available) != 1:
        raise errors.model_needed(available)
    return available[0]


def _pairs(query: bytes) -> list[tuple[str, str]]:
    try:
        return parse_qsl(query.decode("ascii"), keep_blank_values=True, max_num_fields=100)
    except ValueError:
        raise errors.bad_request("The query cannot be read.") from None


def _model_in(query: bytes) -> str:
    return next((value for name, value in _pairs(query) if name == "model"), "") if query else ""


def _query_for(query: bytes, model: str) -> str:
    pairs: list[tuple[str, Any]] = [(n, model if n == "model" else v) for n, v in _pairs(query)]
    return "?" + urlencode(pairs)
