"""What somebody uses, in memory: the last minute second by second, what runs, and what the database knows.

A running request holds an estimate of its tokens, so that many at once do not all pass by the same remainder: its
prompt by its bytes, and of its answer the most that it asks for, else what the person's answers took lately. What it
took really takes the estimate's place at its end. Nobody is refused for the estimate of the request itself.
"""

from __future__ import annotations

from dataclasses import dataclass

from apps.gateway.observer import Exchange

WINDOW_S = 60
ANSWERS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"})
FIRST_ANSWER_TOKENS = 256.0  # until somebody's answers are known
FIRST_TOKENS_PER_BYTE = 0.25  # English text in JSON
LATELY = 0.2  # the weight of the last request in what is usual


class MinuteWindow:
    """Requests and tokens of the last 60 seconds, second by second: constant memory however many there are."""

    __slots__ = ("_requests", "_second", "_tokens", "requests", "tokens")

    def __init__(self) -> None:
        self.requests = 0
        self.tokens = 0
        self._requests = [0] * WINDOW_S
        self._tokens = [0] * WINDOW_S
        self._second = 0

    def advance(self, now: float) -> None:
        second = int(now)
        if second - self._second >= WINDOW_S:
            self._requests, self._tokens = [0] * WINDOW_S, [0] * WINDOW_S
            self.requests = self.tokens = 0
        else:
            for passed in range(self._second + 1, second + 1):
                slot = passed % WINDOW_S
                self.requests -= self._requests[slot]
                self.tokens -= self._tokens[slot]
                self._requests[slot] = self._tokens[slot] = 0
        self._second = max(second, self._second)

    def add(self, now: float, requests: int = 0, tokens: int = 0) -> None:
        self.advance(now)
        slot = self._second % WINDOW_S
        self._requests[slot] += requests
        self._tokens[slot] += tokens
        self.requests += requests
        self.tokens += tokens

    def frees_in(self, now: float, *, requests_below: int | None = None, tokens_below: int | None = None) -> float:
        """Seconds until fewer than so many are left in the window, if nothing is added."""
        wanted, held, slots = (
            (requests_below, self.requests, self._requests)
            if requests_below is not None
            else (tokens_below or 0, self.tokens, self._tokens)
        )
        for second in range(self._second - WINDOW_S + 1, self._second + 1):
            if held < wanted:
                return max(0.0, second - 1 + WINDOW_S - now)
            held -= slots[second % WINDOW_S]
        return max(0.0, self._second + WINDOW_S - now)


@dataclass(slots=True)
class Elsewhere:
    """What the database knows of somebody: finished days, and what other processes did in the last minute."""

    day_tokens: int = 0
    month_tokens: int = 0
    minute_requests: int = 0
    minute_tokens: int = 0
    running: int = 0


class Meter:
    """What one person or key uses over this process; ``known`` is the rest."""

    __slots__ = (
        "answer_tokens",
        "held",
        "known",
        "pending_day",
        "pending_month",
        "running",
        "tokens_per_byte",
        "window",
    )

    def __init__(self) -> None:
        self.window = MinuteWindow()
        self.running = 0
        self.pending_day = 0
        self.pending_month = 0
        self.known = Elsewhere()
        self.held = 0
        self.answer_tokens = FIRST_ANSWER_TOKENS
        self.tokens_per_byte = FIRST_TOKENS_PER_BYTE

    def estimate(self, exchange: Exchange) -> int:
        """Tokens that a request may take."""
        prompt = exchange.body_bytes * self.tokens_per_byte
        if exchange.path not in ANSWERS:
            return round(prompt)
        return round(prompt + (self.answer_tokens if exchange.tokens_limit is None else exchange.tokens_limit))

    def learn_from(self, exchange: Exchange) -> None:
        """What is usual, from a request that has ended."""
        if exchange.tokens_in and exchange.body_bytes:
            self.tokens_per_byte += LATELY * (exchange.tokens_in / exchange.body_bytes - self.tokens_per_byte)
        if exchange.tokens_out and exchange.path in ANSWERS:
            self.answer_tokens += LATELY * (exchange.tokens_out - self.answer_tokens)

    @property
    def day_tokens(self) -> int:
        return self.known.day_tokens + self.pending_day

    @property
    def month_tokens(self) -> int:
        return self.known.month_tokens + self.pending_month

    @property
    def minute_requests(self) -> int:
        return self.window.requests + self.known.minute_requests

    @property
    def minute_tokens(self) -> int:
        return self.window.tokens + self.known.minute_tokens

    @property
    def all_running(self) -> int:
        return self.running + self.known.running
