"""What an engine says that a request cost, read from answers on their way without holding them up.

OpenAI's shapes (``prompt_tokens`` of chat and completions, ``input_tokens`` of responses) count cached tokens within
the prompt's; Anthropic's ``input_tokens`` leave them out, and its figures come in two events. All end up the same here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

USAGE = re.compile(rb'"usage"\s*:\s*\{')
HEAD_BYTES, TAIL_BYTES = 16 * 1024, 64 * 1024
EVENT_ENDS = (b"\n\n", b"\r\n\r\n")
_decode = json.JSONDecoder().raw_decode


@dataclass(slots=True)
class Usage:
    """Tokens; ``None`` is unknown. ``events``: data events of a stream that were passed on, about one per token."""

    tokens_in: int | None = None
    tokens_out: int | None = None
    tokens_cached: int | None = None
    events: int = 0

    def take(self, figures: Mapping[str, Any]) -> None:
        """Read a ``usage`` object of any shape; what it does not say stays as it was."""
        cached = _count(figures, "cache_read_input_tokens")
        if "prompt_tokens" in figures:
            tokens_in = _count(figures, "prompt_tokens")
            cached = _cached(figures.get("prompt_tokens_details"), cached)
        elif "cache_read_input_tokens" in figures or "cache_creation_input_tokens" in figures:
            parts = [
                _count(figures, n)
                for n in ("input_tokens", *("cache_read_input_tokens", "cache_creation_input_tokens"))
            ]
            tokens_in = None if parts[0] is None else sum(n or 0 for n in parts)
        else:
            tokens_in = _count(figures, "input_tokens")
            cached = _cached(figures.get("input_tokens_details"), cached)
        tokens_out = _count(figures, "completion_tokens")
        if tokens_out is None:
            tokens_out = _count(figures, "output_tokens")
        total = _count(figures, "total_tokens")
        if tokens_in is None and tokens_out is None and total is not None:
            tokens_in = total  # rerank and score tell no more
        if tokens_in is not None and not (tokens_in == 0 and self.tokens_in):
            self.tokens_in = tokens_in
        self.tokens_out = self.tokens_out if tokens_out is None else tokens_out
        self.tokens_cached = self.tokens_cached if cached is None else cached


def _count(figures: Mapping[str, Any], name: str) -> int | None:
    value = figures.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _cached(details: object, otherwise: int | None) -> int | None:
    found = _count(details, "cached_tokens") if isinstance(details, dict) else None
    return otherwise if found is None else found


def figures_in(data: bytes) -> list[dict[str, Any]]:
    """Every ``usage`` object in a piece of JSON text. Inside of a JSON text quotes are escaped, so a model that writes
    about usage is not taken at its word."""
    found = []
    for match in USAGE.finditer(data):
        text = data[match.end() - 1 : match.end() + TAIL_BYTES].decode("utf-8", "replace")
        try:
            value, _ = _decode(text)
        except ValueError:
            continue
        found.append(value)
    return found


class AnswerTail:
    """The beginning and the end of an answer that is no stream, where its usage stands."""

    def __init__(self) -> None:
        self._head = b""
        self._parts: list[bytes] = []
        self._length = 0

    def see(self, chunk: bytes) -> None:
        if len(self._head) < HEAD_BYTES:
            self._head += chunk[: HEAD_BYTES - len(self._head)]
        self._parts.append(chunk[-TAIL_BYTES:])
        self._length += len(self._parts[-1])
        while self._length - len(self._parts[0]) >= TAIL_BYTES:
            self._length -= len(self._parts.pop(0))

    def read_into(self, usage: Usage) -> None:
        found = figures_in(b"".join(self._parts)) or figures_in(self._head)
        if found:
            usage.take(found[-1])


class EventTap:
    """Reads usage from whole server-sent events; with ``strip`` takes the usage-only event out again, which is there
    only because the gateway asked for it."""

    def __init__(self, usage: Usage, *, strip: bool) -> None:
        self._usage = usage
        self._strip = strip

    def passed(self, events: bytes) -> bytes:
        """``events`` as the client gets them: whole events, or the rest at a stream's end."""
        self._usage.events += events.count(b"\n\n")
        if b'"usage"' not in events or USAGE.search(events) is None:
            return events
        if not self._strip:
            for figures in figures_in(events):
                self._usage.take(figures)
            return events
        return b"".join(self._kept(event) for event in split_events(events))

    def _kept(self, event: bytes) -> bytes:
        found = figures_in(event)
        for figures in found:
            self._usage.take(figures)
        return b"" if found and _is_usage_only(event) else event


def brings_token(events: bytes) -> bool:
    """Whether whole events bring something of the answer: text, reasoning, the call of a tool. What only opens one (a
    role, ``message_start``) does not; of a shape that is not known any data does. It parses them (some microseconds),
    so ask only until one did."""
    return any(line.startswith(b"data:") and _is_token(line[5:].strip()) for line in events.splitlines())


def _is_token(data: bytes) -> bool:
    try:
        value, _ = _decode(data.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return data != b"[DONE]"
    if not isinstance(value, dict):
        return True
    if value.get("error"):
        return False
    choices, kind = value.get("choices"), value.get("type")
    if isinstance(choices, list):
        for choice in choices:
            if isinstance(choice, dict) and (choice.get("text") or _says_something(choice.get("delta"))):
                return True
        return False
    if isinstance(kind, str):  # Anthropic's events and those of responses
        return kind.endswith("delta") and kind != "message_delta" and _says_something(value.get("delta"))
    return True


def _says_something(delta: object) -> bool:
    if not isinstance(delta, dict):
        return bool(delta)
    return any(value and name not in ("role", "type") for name, value in delta.items())


def _is_usage_only(event: bytes) -> bool:
    if not event.startswith(b"data:"):
        return False
    try:
        value = json.loads(event[5:])
    except ValueError:
        return False
    return isinstance(value, dict) and value.get("choices") == []


def split_events(data: bytes) -> list[bytes]:
    """Events with their ends; what follows the last end is one of them."""
    return [part for part in re.split(rb"(?<=\n\n)|(?<=\r\n\r\n)", data) if part]
