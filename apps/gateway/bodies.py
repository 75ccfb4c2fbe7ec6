"""The parts of a JSON body that the gateway reads, and changing them without touching the rest.

A body is read member by member at its top, so that each member's place in the text is known: another model's name or
one more member is cut into the client's own bytes, and what the client wrote otherwise reaches the engine as it was.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from json.decoder import WHITESPACE  # type: ignore[attr-defined]
from typing import Any

from apps.gateway import errors

SMALL_BODY_BYTES = 1024 * 1024
SINGLE = frozenset({"model", "stream", "stream_options"})
TOKEN_LIMITS = ("max_completion_tokens", "max_tokens", "max_output_tokens")
# What tells one conversation from another: its first message.
OPENINGS = ("messages", "prompt", "input")
OPENING_MESSAGES = 4
OPENING_CHARACTERS = 4096
OPENING_PARTS = 64
SYSTEM_ROLES = frozenset({"system", "developer"})
INCLUDE_USAGE = '"stream_options":{"include_usage":true},'
TOKENS_LIMIT_MAX = 2**31 - 1


class _NotJson(ValueError):
    pass


def _refuse_constant(name: str) -> Any:
    raise _NotJson(f"{name} is not a number in JSON")


_decode = json.JSONDecoder(parse_constant=_refuse_constant).raw_decode  # Python's would take NaN and Infinity


@dataclass(slots=True)
class Parsed:
    """What the gateway needs of a body. ``places``: where a member's value begins and ends in ``text``.

    ``include_usage``: the client itself asked for the figures at a stream's end.
    """

    text: str
    model: str
    stream: bool
    include_usage: bool
    tokens_limit: int | None
    members: dict[str, Any]
    places: dict[str, tuple[int, int]] = field(default_factory=dict)
    first_member: int = 0

    def opening(self) -> bytes:
        """The conversation's beginning: the same for every later turn of it. Empty when there is none."""
        for name in OPENINGS:
            value = self.members.get(name)
            if isinstance(value, list) and value:
                # Up to and with the first message that is not the system's; of a batch of texts the first.
                roles = [m.get("role") if isinstance(m, dict) else None for m in value[:OPENING_MESSAGES]]
                value = value[: next((n for n, r in enumerate(roles, 1) if r not in SYSTEM_ROLES), len(roles))]
            if value:
                parts: list[str] = []
                _collect(value, parts)
                return "\0".join(parts).encode("utf-8", "surrogatepass")
        return b""

    def rewritten(self, body: bytes, *, model: str, add_usage: bool) -> bytes:
        """The body with another model's name and, if asked for, with usage figures at the end of the stream."""
        changes: list[tuple[int, int, str]] = []
        if model != self.model:
            changes.append((*self.places["model"], json.dumps(model, ensure_ascii=False)))
        if add_usage and not self.include_usage:
            if "stream_options" in self.places:
                options = self.members["stream_options"]
                value = {**options, "include_usage": True} if isinstance(options, dict) else {"include_usage": True}
                changes.append((*self.places["stream_options"], json.dumps(value)))
            else:
                changes.append((self.first_member, self.first_member, INCLUDE_USAGE))
        ascii_only = len(self.text) == len(body)  # then a place in the text is one in the bytes
        for start, end, new in sorted(changes, reverse=True):
            if not ascii_only:
                start, end = len(self.text[:start].encode()), len(self.text[:end].encode())
            body = b"".join((body[:start], new.encode(), body[end:]))
        return body


def parse_body(body: bytes, *, elements_max: int, need_model: bool = True) -> Parsed:
    """Read what the gateway needs. Raises 400 unless the body is a JSON object with a text ``model``.

    Small JSON can become large objects (``{},`` is three bytes and a dictionary of 64), and parsing does not let
    others run meanwhile: so the number of elements is bounded. It is counted with the commas and brackets inside
    of texts, which is cheap; a prompt that fills a context of a million tokens has far fewer than two million.
    """
    if len(body) > SMALL_BODY_BYTES and sum(map(body.count, (b",", b"{", b"["))) > elements_max:
        raise errors.GatewayError(
            413, "request_too_complex", f"The request has more than {elements_max} JSON elements."
        )
    try:
        # Decoded here: json.loads would also guess UTF-16, which the engine may read differently.
        text = body.decode("utf-8")
    except UnicodeDecodeError:
        raise errors.bad_request("The request's body is not UTF-8.", code="invalid_json") from None
    try:
        parsed = _read_members(text)
    except json.JSONDecodeError as error:
        raise errors.bad_request(
            f"The request's body is not JSON: {error.msg} (line {error.lineno}, column {error.colno}).",
            code="invalid_json",
        ) from None
    except _NotJson as error:
        raise errors.bad_request(f"The request's body is not JSON: {error}.", code="invalid_json") from None
    except (RecursionError, ValueError):  # too deep; a number with thousands of digits
        raise errors.bad_request("The request's body is not JSON that can be read.", code="invalid_json") from None
    model = parsed.members.get("model")
    if isinstance(model, str) and model:
        parsed.model = model
    elif need_model or "model" in parsed.members:
        raise errors.bad_request(
            "The member 'model' is missing or is not text; GET /v1/models lists them.", param="model"
        )
    parsed.stream = parsed.members.get("stream") is True
    options = parsed.members.get("stream_options")
    parsed.include_usage = isinstance(options, dict) and options.get("include_usage") is True
    limits = (parsed.members.get(name) for name in TOKEN_LIMITS)
    limit = next((n for n in limits if isinstance(n, int) and not isinstance(n, bool) and n > 0), None)
    parsed.tokens_limit = None if limit is None else min(limit, TOKENS_LIMIT_MAX)
    return parsed


def _read_members(text: str) -> Parsed:
    """The members of the object that ``text`` is, with the places of those that may be changed."""
    at = _space(text, 0)
    if not text.startswith("{", at):
        if at == len(text):
            raise json.JSONDecodeError("Expecting value", text, at)
        _, end = _decode(text, at)
        _expect_end(text, end)
        raise errors.bad_request("The request's body must be a JSON object.", code="invalid_json")
    parsed = Parsed(text, "", False, False, None, {}, {}, at + 1)
    at = _space(text, at + 1)
    if text.startswith("}", at):
        _expect_end(text, at + 1)
        return parsed
    while True:
        if not text.startswith('"', at):
            raise json.JSONDecodeError("Expecting property name enclosed in double quotes", text, at)
        name, end = _decode(text, at)
        at = _space(text, end)
        if not text.startswith(":", at):
            raise json.JSONDecodeError("Expecting ':' delimiter", text, at)
        at = _space(text, at + 1)
        value, end = _decode(text, at)
        if name in SINGLE:
            if name in parsed.places:  # which of the two an engine would take is its own affair; ours must be the same
                raise errors.bad_request(f"The member {name!r} is there twice.", code="invalid_json", param=name)
            parsed.places[name] = (at, end)
        parsed.members[name] = value
        at = _space(text, end)
        if text.startswith(",", at):
            at = _space(text, at + 1)
        elif text.startswith("}", at):
            _expect_end(text, at + 1)
            return parsed
        else:
            raise json.JSONDecodeError("Expecting ',' delimiter", text, at)


def _collect(value: Any, parts: list[str]) -> None:
    """The texts inside of ``value``, each cut short: an image of megabytes tells as much by its beginning."""
    if len(parts) >= OPENING_PARTS:
        return
    if isinstance(value, str):
        parts.append(value[:OPENING_CHARACTERS])
    elif isinstance(value, dict):
        for inner in value.values():
            _collect(inner, parts)
    elif isinstance(value, list):
        for inner in value[:OPENING_PARTS]:
            _collect(inner, parts)
    else:
        parts.append(str(value))


def _space(text: str, at: int) -> int:
    return int(WHITESPACE.match(text, at).end())


def _expect_end(text: str, at: int) -> None:
    at = _space(text, at)
    if at != len(text):
        raise json.JSONDecodeError("Extra data", text, at)
