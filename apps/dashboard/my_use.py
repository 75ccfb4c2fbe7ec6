"""On /me/: what one has used, and how far one's limits are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from django.conf import settings

from apps.accounts.models import User
from apps.gateway.meters import Elsewhere
from apps.gateway.quotas import Allowance
from apps.gateway.reports import last_refusals, period, total, use_by
from apps.gateway.selectors import allowance_of, used_of

DAYS = 30


@dataclass(frozen=True, slots=True)
class Meter:
    """``until`` says when it begins anew."""

    label: str
    used: int
    limit: int
    until: str

    @property
    def filled(self) -> int:
        """0 to 100."""
        return 100 if not self.limit else min(100, round(100 * self.used / self.limit))

    @property
    def fill(self) -> str:
        return "bad" if self.used >= self.limit else "warn" if self.filled >= 80 else "accent"


def meters(allowed: Allowance, used: Elsewhere) -> list[Meter]:
    """Those that are limited, the shortest first."""
    zone = settings.PANEL_TIME_ZONE.key
    found = (
        ("Requests at once", used.running, allowed.concurrent, "as they end"),
        ("Requests in the last minute", used.minute_requests, allowed.requests_per_minute, "slides"),
        ("Tokens in the last minute", used.minute_tokens, allowed.tokens_per_minute, "slides"),
        ("Tokens today", used.day_tokens, allowed.tokens_per_day, f"until midnight, {zone}"),
        ("Tokens this month", used.month_tokens, allowed.tokens_per_month, f"until the first, {zone}"),
    )
    return [Meter(label, amount, limit, until) for label, amount, limit, until in found if limit is not None]


def my_use(user: User) -> dict[str, Any]:
    first, last = period(None, None, days=DAYS)
    by_day = use_by("day", first, last, user)
    return {
        "meters": meters(allowance_of(user), used_of(user)),
        "use_days": DAYS,
        "use_chart": [(use.name, use.tokens) for use in by_day],
        "use_by_day": [use for use in reversed(by_day) if use.requests or use.refused],
        "use_by_model": use_by("model", first, last, user),
        "use_by_key": use_by("key", first, last, user),
        "use_total": total(by_day),
        "refusals": last_refusals(user),
        "currency": settings.ENERGY_CURRENCY,
        "priced": settings.ENERGY_PRICE is not None,
        "zone": settings.PANEL_TIME_ZONE.key,
    }
