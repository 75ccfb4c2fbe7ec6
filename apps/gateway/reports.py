"""Use for people: sums by day, person, model and key, with what the energy came to. All from ``UsageDay``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any

from django.conf import settings
from django.db.models import QuerySet, Sum

from apps.accounts.models import ApiKey, User
from apps.common.errors import Invalid
from apps.gateway.models import UsageDay, UsageRefusal
from apps.gateway.selectors import today

SUMMED = (
    "requests", "background", "failed", "interrupted", "unknown", "refused", "tokens_in", "tokens_out",
    "tokens_cached", "seconds", "energy_joules",
)  # fmt: skip
COLUMNS = {"day": "day", "user": "user_id", "model": "model", "key": "key_id"}
DAYS_MOST = 366 * 2
EARLIEST, LATEST = date(2000, 1, 1), date(9000, 1, 1)  # calculating with days ends at the years 1 and 9999
REFUSALS_SHOWN = 8
REASONS = {
    "rate_limit_exceeded": "over a limit per minute or at once",
    "insufficient_quota": "over the tokens of the day or month",
    "model_not_allowed": "the key is not for this model",
    "network_not_allowed": "from a network that the key is not for",
    "person_not_allowed": "by somebody who may not use the gateway",
    "invalid_user_token": "with a name that Open WebUI did not sign properly",
    "invalid_json": "not JSON",
    "invalid_request": "not a request that can be read",
    "request_too_large": "too large",
    "request_too_complex": "too large",
    "request_timeout": "sent too slowly",
    "busy": "too many large requests at once",
}
JOULES_PER_KWH = 3_600_000


@dataclass(frozen=True, slots=True)
class Use:
    """``of`` is the day, person's or key's id, or model that these sums belong to; ``name`` says it in words.

    ``unknown`` requests are those whose tokens nobody told; ``refused`` ones never began and are not in ``requests``.
    Energy is an estimate, see ``energy.py``.
    """

    of: Any
    name: str
    requests: int
    background: int
    failed: int
    interrupted: int
    unknown: int
    refused: int
    tokens_in: int
    tokens_out: int
    tokens_cached: int
    seconds: float
    energy_joules: float

    @property
    def tokens(self) -> int:
        return self.tokens_in + self.tokens_out

    @property
    def energy_kwh(self) -> float:
        return self.energy_joules / JOULES_PER_KWH

    @property
    def cost(self) -> float | None:
        """In ``ENERGY_CURRENCY``; None while no price is set."""
        return None if settings.ENERGY_PRICE is None else self.energy_kwh * settings.ENERGY_PRICE


def period(start: date | None, end: date | None, *, days: int = 30) -> tuple[date, date]:
    """First and last day, both included. Raises Invalid."""
    last = end or today()
    if not EARLIEST <= last <= LATEST:
        raise Invalid(f"There is no use of {last.isoformat()}.", fields={"end": ["too far away"]})
    first = start or last - timedelta(days=days - 1)
    if first > last:
        raise Invalid("The start must not be later than the end.", fields={"start": ["later than end"]})
    if (last - first).days >= DAYS_MOST:
        raise Invalid(f"Ask for at most {DAYS_MOST} days.", fields={"start": ["too long ago"]})
    return first, last


def days_of(first: date, last: date, user: User | None = None) -> QuerySet[UsageDay]:
    """Of one person, or of all."""
    rows = UsageDay.objects.filter(day__gte=first, day__lte=last)
    return rows if user is None else rows.filter(user=user)


def use_by(by: str, first: date, last: date, user: User | None = None) -> list[Use]:
    """Sums by *day* (every day of the period, oldest first), or by *user*, *model* or *key* (most tokens first)."""
    column = COLUMNS[by]
    found = days_of(first, last, user).order_by().values(column).annotate(**{n: Sum(n) for n in SUMMED})
    sums: dict[Any, Mapping[str, Any]] = {row[column]: row for row in found}
    if by == "day":
        days = [first + timedelta(days=n) for n in range((last - first).days + 1)]
        return [_use(day, day.isoformat(), sums.get(day, {})) for day in days]
    names = _names(by, [of for of in sums if of is not None])
    uses = [_use(of, names.get(of, "somebody who is gone" if by == "user" else "a key that is gone"), row)
            for of, row in sums.items()]  # fmt: skip
    return sorted(uses, key=lambda use: (-use.tokens, -use.requests, use.name))


def last_refusals(user: User) -> list[tuple[UsageRefusal, str]]:
    """Somebody's last refused requests with the reason in words, newest first: a minute, key, model and reason each."""
    rows = UsageRefusal.objects.filter(user=user).select_related("key")[:REFUSALS_SHOWN]
    return [(row, REASONS.get(row.code, row.code)) for row in rows]


def total(uses: Sequence[Use]) -> Use:
    return _use(None, "Together", {name: sum(getattr(use, name) for use in uses) for name in SUMMED})


def _use(of: Any, name: str, row: Mapping[str, Any]) -> Use:
    return Use(of, name, **{field: row.get(field, 0) or 0 for field in SUMMED})


def _names(by: str, ids: list[Any]) -> dict[Any, str]:
    if by == "user":
        return {user.pk: user.display_name for user in User.objects.filter(pk__in=ids)}
    if by == "key":
        keys = ApiKey.objects.select_related("user").filter(pk__in=ids)
        return {key.pk: f"{key.name} ({key.prefix}…)" for key in keys}
    return {model: model or "no model that is served here" for model in ids}
