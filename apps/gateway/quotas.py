"""How much a person and a key may use, checked in memory: a few numbers per request, no database.

A person's allowance is their role's, field by field replaced by their own; a key's is apart and narrower. Minutes are a
sliding window; days and months are what the ledger in the database holds, plus what this process has finished since
that was read. Other gateway processes (and this one's predecessor) count through the ledger too, seconds late.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from datetime import date, datetime, timedelta
from datetime import time as clock_time
from typing import Any
from zoneinfo import ZoneInfo

from apps.gateway import errors
from apps.gateway.errors import GatewayError
from apps.gateway.meters import Elsewhere, Meter
from apps.gateway.observer import Exchange

QUOTAS_EPOCH = "quotas"
CONCURRENT_RETRY_S = 2


@dataclass(frozen=True, slots=True)
class Allowance:
    """None: no limit. ``share`` is the weight in the queue under load; None counts as 1."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    tokens_per_day: int | None = None
    tokens_per_month: int | None = None
    concurrent: int | None = None
    share: int | None = None

    def over(self, under: Allowance) -> Allowance:
        """This one, and the other where this says nothing."""
        mine = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        return replace(under, **mine)

    @property
    def limits_anything(self) -> bool:
        return any(getattr(self, f.name) is not None for f in fields(self) if f.name != "share")


FIELDS = tuple(f.name for f in fields(Allowance))
NONE = Allowance()


@dataclass(frozen=True, slots=True)
class QuotaTable:
    """``people`` and ``keys`` by their ids; who is missing has no limits."""

    epoch: tuple[int, int] = (-1, -1)
    people: Mapping[int, Allowance] = None  # type: ignore[assignment]
    keys: Mapping[int, Allowance] = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        object.__setattr__(self, "people", self.people or {})
        object.__setattr__(self, "keys", self.keys or {})

    @property
    def is_empty(self) -> bool:
        return not self.people and not self.keys


@dataclass(frozen=True, slots=True)
class Pending:
    """Tokens of a finished request that the database does not have yet: they stand in a file at ``position``."""

    file: str
    position: int
    day: date
    user_id: int
    key_id: int
    tokens: int


class Quotas:
    """All of it belongs to the event loop's thread. ``clock`` gives POSIX time."""

    def __init__(self, zone: ZoneInfo, clock: Any = time.time) -> None:
        self.table = QuotaTable()
        self.people: dict[int, Meter] = {}
        self.keys: dict[int, Meter] = {}
        self._zone = zone
        self._clock = clock
        self._pending: deque[Pending] = deque()
        self._day = date.min
        self._day_ends_at = 0.0

    # -- on the hot path --------------------------------------------------------------------------

    def admit(self, exchange: Exchange) -> None:
        """Count the request, or raise 429. Puts ``x-ratelimit-*`` into its answer's headers, whatever it is."""
        table = self.table
        if table.is_empty:
            return
        now = self._clock()
        self._today(now)
        person = table.people.get(exchange.user_id)
        key = table.keys.get(exchange.key_id)
        try:
            if person is not None:
                self._check("You", "your quota", person, self._person(exchange.user_id), now)
            if key is not None:
                self._check("This key", "its quota", key, self._key(exchange.key_id), now)
        except GatewayError:
            exchange.answer_headers += self._headers(exchange, now)
            raise
        for meter in (self._person(exchange.user_id), self._key(exchange.key_id)):
            meter.window.add(now, requests=1)
        exchange.tokens_held = self._person(exchange.user_id).estimate(exchange)
        exchange.answer_headers += self._headers(exchange, now)

    def opened(self, exchange: Exchange) -> None:
        for meter in (self._person(exchange.user_id), self._key(exchange.key_id)):
            meter.running += 1
            meter.held += exchange.tokens_held

    def closed(self, exchange: Exchange, file: str, position: int) -> None:
        """``file`` and ``position``: where the ledger's line ends that will bring these tokens into the database."""
        person, key = self._person(exchange.user_id), self._key(exchange.key_id)
        for meter in (person, key):
            meter.running -= 1
            meter.held -= exchange.tokens_held
        person.learn_from(exchange)
        tokens = (exchange.tokens_in or 0) + (exchange.tokens_out or 0)
        if not tokens or self.table.is_empty:
            return
        now = self._clock()
        today = self._today(now)
        began = datetime.fromtimestamp(exchange.began_at, self._zone).date()
        self._pending.append(Pending(file, position, began, exchange.user_id, exchange.key_id, tokens))
        for meter in (person, key):
            meter.window.add(now, tokens=tokens)
            meter.pending_day += tokens if began == today else 0
            meter.pending_month += tokens if _same_month(began, today) else 0

    def share(self, user_id: int) -> int:
        """Somebody's weight in the queue."""
        allowance = self.table.people.get(user_id)
        return (allowance.share if allowance is not None else None) or 1

    def _person(self, user_id: int) -> Meter:
        meter = self.people.get(user_id)
        if meter is None:
            meter = self.people[user_id] = Meter()
        return meter

    def _key(self, key_id: int) -> Meter:
        meter = self.keys.get(key_id)
        if meter is None:
            meter = self.keys[key_id] = Meter()
        return meter

    def _check(self, who: str, whose: str, allowed: Allowance, meter: Meter, now: float) -> None:
        meter.window.advance(now)
        have = "have" if who == "You" else "has"
        limit = allowed.concurrent
        if limit is not None and meter.all_running >= limit:
            raise _refused(
                f"{who} {have} {meter.all_running} requests under way, and {whose} allows {limit} at once. "
                "Try again when one of them has ended.",
                "requests", CONCURRENT_RETRY_S,
            )  # fmt: skip
        limit = allowed.requests_per_minute
        if limit is not None and meter.minute_requests >= limit:
            wait_s = meter.window.frees_in(now, requests_below=limit - meter.known.minute_requests)
            raise _refused(
                f"{who} {have} made {meter.minute_requests} requests in the last minute, and {whose} allows {limit}. "
                f"The next one may come in {errors.duration(_up(wait_s))}.",
                "requests", wait_s,
            )  # fmt: skip
        limit = allowed.tokens_per_minute
        if limit is not None and meter.minute_tokens >= limit:
            wait_s = meter.window.frees_in(now, tokens_below=limit - meter.known.minute_tokens)
            raise _refused(
                f"{who} {have} used {meter.minute_tokens} tokens in the last minute, and {whose} allows {limit}. "
                f"The next request may come in {errors.duration(_up(wait_s))}.",
                "tokens", wait_s,
            )  # fmt: skip
        if limit is not None and meter.minute_tokens + meter.held >= limit:
            raise _held(who, have, whose, meter.minute_tokens, meter.held, f"{limit} a minute")
        limit = allowed.tokens_per_day
        if limit is not None and meter.day_tokens >= limit:
            raise self._spent(who, have, whose, meter.day_tokens, limit, "today", "a day", self._day_ends_at, now)
        if limit is not None and meter.day_tokens + meter.held >= limit:
            raise _held(who, have, whose, meter.day_tokens, meter.held, f"{limit} a day")
        limit = allowed.tokens_per_month
        if limit is not None and meter.month_tokens >= limit:
            ends_at = self._month_ends_at()
            raise self._spent(who, have, whose, meter.month_tokens, limit, "this month", "a month", ends_at, now)
        if limit is not None and meter.month_tokens + meter.held >= limit:
            raise _held(who, have, whose, meter.month_tokens, meter.held, f"{limit} a month")

    def _spent(
        self, who: str, have: str, whose: str, used: int, limit: int, when: str, per: str, ends_at: float, now: float
    ) -> GatewayError:
        reset = datetime.fromtimestamp(ends_at, self._zone)
        return _refused(
            f"{who} {have} used {used} tokens {when}, and {whose} allows {limit} {per}. "
            f"It begins anew at {reset:%Y-%m-%d %H:%M} ({self._zone.key}). An owner of the panel can raise it.",
            "insufficient_quota", ends_at - now, code="insufficient_quota",
        )  # fmt: skip

    def _headers(self, exchange: Exchange, now: float) -> list[tuple[bytes, bytes]]:
        """What OpenAI's clients read, of whatever is nearest to its end: the person's limits or the key's."""
        subjects = [
            (allowed, meter)
            for allowed, meter in (
                (self.table.people.get(exchange.user_id), self.people.get(exchange.user_id)),
                (self.table.keys.get(exchange.key_id), self.keys.get(exchange.key_id)),
            )
            if allowed is not None and meter is not None
        ]
        requests, tokens = [], []
        for allowed, meter in subjects:
            if (limit := allowed.requests_per_minute) is not None:
                reset_s = meter.window.frees_in(now, requests_below=1)
                requests.append((limit - meter.minute_requests, limit, reset_s))
            held = meter.held + exchange.tokens_held
            if (limit := allowed.tokens_per_minute) is not None:
                tokens.append((limit - meter.minute_tokens - held, limit, meter.window.frees_in(now, tokens_below=1)))
            if (limit := allowed.tokens_per_day) is not None:
                tokens.append((limit - meter.day_tokens - held, limit, self._day_ends_at - now))
            if (limit := allowed.tokens_per_month) is not None:
                tokens.append((limit - meter.month_tokens - held, limit, self._month_ends_at() - now))
        headers = []
        for what, found in ((b"requests", requests), (b"tokens", tokens)):
            if found:
                left, limit, reset_s = min(found)
                headers += [
                    (b"x-ratelimit-limit-" + what, b"%d" % limit),
                    (b"x-ratelimit-remaining-" + what, b"%d" % max(0, left)),
                    (b"x-ratelimit-reset-" + what, _span(reset_s)),
                ]
        return headers

    # -- days -------------------------------------------------------------------------------------

    def _today(self, now: float) -> date:
        if now >= self._day_ends_at:
            before, self._day = self._day, datetime.fromtimestamp(now, self._zone).date()
            self._day_ends_at = self._begins(self._day + timedelta(days=1))
            for meter in (*self.people.values(), *self.keys.values()):
                meter.known.day_tokens = 0
                if not _same_month(before, self._day):
                    meter.known.month_tokens = 0
            self._count_pending()
        return self._day

    def _begins(self, day: date) -> float:
        return datetime.combine(day, clock_time.min, self._zone).timestamp()

    def _month_ends_at(self) -> float:
        return self._begins((self._day.replace(day=1) + timedelta(days=32)).replace(day=1))

    # -- beside it --------------------------------------------------------------------------------

    @property
    def pending_files(self) -> set[str]:
        return {pending.file for pending in self._pending}

    def learn(
        self, people: Mapping[int, Elsewhere], keys: Mapping[int, Elsewhere], read: Mapping[str, int], day: date
    ) -> None:
        """What the database said; ``read``: up to where each file of ours was in it, ``day``: the day it meant."""
        oldest = day.replace(day=1)
        self._pending = deque(p for p in self._pending if p.position > read.get(p.file, -1) and p.day >= oldest)
        if day == self._today(self._clock()):  # else midnight has just passed: the next look knows the new day
            for meters, known in ((self.people, people), (self.keys, keys)):
                for subject in known.keys() - meters.keys():
                    meters[subject] = Meter()
                for subject, meter in meters.items():
                    meter.known = known.get(subject) or Elsewhere()
        self._count_pending()

    def _count_pending(self) -> None:
        for meter in (*self.people.values(), *self.keys.values()):
            meter.pending_day = meter.pending_month = 0
        for pending in self._pending:
            for meter in (self._person(pending.user_id), self._key(pending.key_id)):
                meter.pending_day += pending.tokens if pending.day == self._day else 0
                meter.pending_month += pending.tokens if _same_month(pending.day, self._day) else 0


def resolved(quotas: Iterable[Any], roles: Mapping[int, str]) -> tuple[dict[int, Allowance], dict[int, Allowance]]:
    """People's and keys' allowances from ``Quota`` rows and each person's role."""
    of_role: dict[str, Allowance] = {}
    of_person: dict[int, Allowance] = {}
    keys: dict[int, Allowance] = {}
    for quota in quotas:
        allowance = Allowance(**{name: getattr(quota, name) for name in FIELDS})
        if quota.role:
            of_role[quota.role] = allowance
        elif quota.user_id is not None:
            of_person[quota.user_id] = allowance
        else:
            keys[quota.key_id] = allowance
    people = {
        user_id: of_person.get(user_id, NONE).over(of_role.get(role, NONE))
        for user_id, role in roles.items()
        if user_id in of_person or role in of_role
    }
    return people, keys


def _held(who: str, have: str, whose: str, used: int, held: int, limit: str) -> GatewayError:
    """Not spent yet, but it may be by what is under way."""
    return _refused(
        f"{who} {have} used {used} tokens, requests under way may take {held} more, and {whose} allows {limit}. "
        "Try again when one of them has ended, or ask for fewer with max_tokens.",
        "tokens", CONCURRENT_RETRY_S,
    )  # fmt: skip


def _refused(message: str, kind: str, wait_s: float, code: str = "rate_limit_exceeded") -> GatewayError:
    return GatewayError(429, code, message, error_type=kind, retry_after_s=_up(wait_s))


def _up(seconds: float) -> int:
    return max(1, int(-(-seconds // 1)))


def _same_month(one: date, other: date) -> bool:
    return (one.year, one.month) == (other.year, other.month)


def _span(seconds: float) -> bytes:
    """As OpenAI writes it: ``12s``, ``6m0s``, ``3h5m0s``."""
    whole = _up(seconds)
    hours, minutes = divmod(whole // 60, 60)
    text = f"{hours}h{minutes}m" if hours else f"{minutes}m" if minutes else ""
    return f"{text}{whole % 60}s".encode()
