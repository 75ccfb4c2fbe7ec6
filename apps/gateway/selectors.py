"""Reads of use and quotas. The gateway's own process uses these too, so nothing of pages is imported here."""

from __future__ import annotations

from collections.abc import Collection
from datetime import date, datetime, timedelta
from typing import Any

import redis
from django.conf import settings
from django.db.models import Count, Q, QuerySet, Sum
from django.db.models.functions import Coalesce
from django.utils import timezone

from apps.accounts.models import ApiKey, User
from apps.accounts.tokens import KEYS_EPOCH
from apps.common.errors import NotFound
from apps.common.models import Epoch
from apps.common.store import last_heartbeat
from apps.gateway.ledger import local_day
from apps.gateway.meters import Elsewhere
from apps.gateway.models import RUNNING, Alias, Quota, UsageDay, UsageRecord, UsageSpool
from apps.gateway.quotas import QUOTAS_EPOCH, Allowance, QuotaTable, resolved
from apps.profiles.models import Engine, ProfileVersion
from apps.profiles.selectors import newest, profile_list

# Option and default. vLLM runs 256 sequences at once unless told otherwise; llama.cpp decides by itself.
ENGINE_SLOTS: dict[str, tuple[str, int | None]] = {
    Engine.VLLM: ("max_num_seqs", 256),
    Engine.RAY_SERVE: ("max_num_seqs", 256),
    Engine.SIMULATED: ("max_num_seqs", 256),
    Engine.LLAMA_CPP: ("parallel", None),
}
TOKENS = Coalesce(Sum("tokens_in"), 0) + Coalesce(Sum("tokens_out"), 0)
LEDGER_HEARTBEAT = "gateway-ledger"
MINUTE = timedelta(seconds=60)


# -- for the gateway's process -------------------------------------------------------------------


def quota_epoch() -> tuple[int, int]:
    """Changes with every quota, and with every person's role."""
    return Epoch.current(QUOTAS_EPOCH), Epoch.current(KEYS_EPOCH)


def quota_table() -> QuotaTable:
    epoch = quota_epoch()  # read first: a change in between is then seen as a newer one
    quotas = list(Quota.objects.all())
    if not quotas:
        return QuotaTable(epoch)
    roles = dict(User.objects.filter(is_active=True).values_list("pk", "role"))
    return QuotaTable(epoch, *resolved(quotas, roles))


def known_elsewhere(
    own_files: Collection[str], pending_files: Collection[str]
) -> tuple[dict[int, Elsewhere], dict[int, Elsewhere], dict[str, int], date]:
    """For ``Quotas.learn``. Sums are read before the offsets: what is imported in between is missed for
    some seconds rather than counted twice."""
    now = timezone.now()
    today = local_day(now)
    people: dict[int, Elsewhere] = {}
    keys: dict[int, Elsewhere] = {}
    month = UsageDay.objects.filter(day__gte=today.replace(day=1), day__lte=today)
    last_minute = UsageRecord.objects.filter(at__gte=now - MINUTE).exclude(spool__name__in=own_files)
    running = UsageRecord.objects.filter(outcome=RUNNING).exclude(spool__name__in=own_files)
    for column, found in (("user_id", people), ("key_id", keys)):
        for subject, month_tokens, day_tokens in (
            month.order_by().values_list(column).annotate(
                month=TOKENS,
                today=Coalesce(Sum("tokens_in", filter=Q(day=today)), 0)
                + Coalesce(Sum("tokens_out", filter=Q(day=today)), 0),
            )
        ):  # fmt: skip
            found.setdefault(subject, Elsewhere()).month_tokens = month_tokens
            found[subject].day_tokens = day_tokens
        minutes = last_minute.order_by().values_list(column).annotate(requests=Count("pk"), tokens=TOKENS)
        for subject, requests, tokens in minutes:
            known = found.setdefault(subject, Elsewhere())
            known.minute_requests, known.minute_tokens = requests, tokens
        for subject, count in running.order_by().values_list(column).annotate(count=Count("pk")):
            found.setdefault(subject, Elsewhere()).running = count
        found.pop(None, None)  # type: ignore[call-overload]
    read = dict(UsageSpool.objects.filter(name__in=pending_files).values_list("name", "offset"))
    return people, keys, read, today


def engine_slots(version_ids: Collection[int]) -> dict[int, int | None]:
    """How many requests one engine of a profile version runs at once; None where that is not known. More would wait
    inside the engine, first come first served."""
    found: dict[int, int | None] = {}
    for version in ProfileVersion.objects.filter(pk__in=version_ids).only("engine", "options"):
        name, otherwise = ENGINE_SLOTS.get(version.engine, ("", None))
        value = version.options.get(name, otherwise)
        found[version.pk] = value if isinstance(value, int) and value > 0 else None
    return found


# -- for pages and the API -----------------------------------------------------------------------


def askable_names() -> list[str]:
    """Every name that a request may ask for: what profiles serve under, and aliases."""
    served = {newest(profile).served_name for profile in profile_list()}
    return sorted(served | set(Alias.objects.values_list("name", flat=True)))


def quota_list() -> QuerySet[Quota]:
    """Roles first, then people, then keys."""
    return Quota.objects.select_related("user", "key__user").order_by("-role", "user__email", "key__user__email", "pk")


def any_key_get(pk: int) -> ApiKey:
    """Anybody's key, for owners. Raises NotFound."""
    key = ApiKey.objects.select_related("user").filter(pk=pk).first() if 0 < pk < 2**63 else None
    if key is None:
        raise NotFound(f"There is no key {pk}.")
    return key


def allowance_of(user: User) -> Allowance:
    """What somebody may use, with what their role gives."""
    quotas = list(Quota.objects.filter(Q(user=user) | Q(role=user.role)))
    return resolved(quotas, {user.pk: user.role})[0].get(user.pk, Allowance())


def key_allowances(keys: Collection[ApiKey]) -> dict[int, Allowance]:
    return resolved(Quota.objects.filter(key__in=keys), {})[1]


def used_of(user: User) -> Elsewhere:
    """What somebody has used, as far as the ledger was read: seconds ago."""
    now = timezone.now()
    today = local_day(now)
    month = UsageDay.objects.filter(user=user, day__gte=today.replace(day=1), day__lte=today)
    sums: dict[str, Any] = month.aggregate(
        month=TOKENS,
        today=Coalesce(Sum("tokens_in", filter=Q(day=today)), 0) + Coalesce(Sum("tokens_out", filter=Q(day=today)), 0),
    )
    mine = UsageRecord.objects.filter(user=user)
    minute: dict[str, Any] = mine.filter(at__gte=now - MINUTE).aggregate(requests=Count("pk"), tokens=TOKENS)
    running = mine.filter(outcome=RUNNING).count()
    return Elsewhere(sums["today"], sums["month"], minute["requests"], minute["tokens"], running)


def ledger_trouble() -> str:
    """Why a gateway cannot write its ledger; empty when it can, or when the store does not tell."""
    try:
        told = last_heartbeat(LEDGER_HEARTBEAT, settings.RIG_NAME)
    except redis.RedisError:
        return ""
    return str(told.get("trouble", "")) if told else ""


def today() -> date:
    return datetime.now(settings.PANEL_TIME_ZONE).date()
