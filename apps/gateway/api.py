"""Quotas and use in the API."""

from __future__ import annotations

from datetime import date, datetime
from typing import Any, Literal
from uuid import UUID

from django.conf import settings
from django.db.models import QuerySet
from django.http import HttpRequest
from ninja import Router, Schema
from ninja.pagination import paginate
from pydantic import Field, StrictInt

from apps.accounts.models import User
from apps.accounts.selectors import user_get
from apps.common.actors import actor_of
from apps.common.api import Paged, needs
from apps.common.errors import Invalid, NotAllowed
from apps.common.roles import Role
from apps.gateway.models import Quota
from apps.gateway.quotas import FIELDS
from apps.gateway.reports import period, use_by
from apps.gateway.selectors import any_key_get, quota_list
from apps.gateway.services import Subject, quota_set

router = Router(tags=["use"])
Limit = StrictInt | None


class Limits(Schema):
    """null: no limit of its own. ``share`` (1 to 100) is the weight in the queue under load."""

    requests_per_minute: Limit = None
    tokens_per_minute: Limit = None
    tokens_per_day: Limit = None
    tokens_per_month: Limit = None
    concurrent: Limit = Field(None, description="Requests under way at once.")
    share: Limit = None


class QuotaIn(Limits):
    """One of ``role``, ``member`` and ``key``. Limits that are left out are taken away."""

    role: Literal["member", "operator", "owner"] | None = None
    member: str | None = Field(None, description="Id or address.", max_length=254)
    key: int | None = None


class QuotaOut(Limits):
    """``role``: what each person with that role may use. ``member``: takes the place of the role's, field by field.
    ``key``: what may go over this key, within what its person may."""

    role: str | None
    member: UUID | None
    key: int | None
    name: str
    updated_at: datetime | None


def quota_out(quota: Quota) -> dict[str, Any]:
    return {
        "role": quota.role or None,
        "member": quota.user.public_id if quota.user else None,
        "key": quota.key_id,
        "name": quota.name,
        "updated_at": quota.updated_at,
        **{name: getattr(quota, name) for name in FIELDS},
    }


class UseOut(Schema):
    """``of`` is a day, a person's id, a key's id or a model; tokens of ``unknown`` requests are not in the sums.
    ``refused``: over a quota or not allowed, before they began; not among ``requests``. Energy
    is an estimate from the cards' counters, up to an hour late; ``cost`` is null while no price of a kWh is set."""

    of: str
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
    cost: float | None
    currency: str


class UsePage(Schema):
    start: date
    end: date
    items: list[UseOut]
    count: int


class PagedQuotas(Paged):
    def paginate_queryset(self, queryset: Any, pagination: Any, request: HttpRequest, **params: Any) -> Any:
        page = super().paginate_queryset(queryset, pagination, request, **params)
        return {**page, "items": [quota_out(quota) for quota in page["items"]]}


@router.get("/quotas", response=list[QuotaOut], auth=needs(Role.OWNER), summary="Who may use how much")
@paginate(PagedQuotas)
def list_quotas(request: HttpRequest) -> QuerySet[Quota]:
    return quota_list()


@router.put("/quotas", response={200: QuotaOut, 204: None}, auth=needs(Role.OWNER), summary="Set somebody's quota")
def put_quota(request: HttpRequest, data: QuotaIn) -> Any:
    """Sets all limits of a role, a person or a key at once. 204 when nothing is limited any more."""
    quota = quota_set(_subject(data), {name: getattr(data, name) for name in FIELDS}, actor=actor_of(request.user))
    return (204, None) if quota is None else (200, quota_out(quota))


@router.get("/usage", response=UsePage, auth=needs(Role.MEMBER), summary="Who used how much")
def read_usage(
    request: HttpRequest,
    by: Literal["day", "user", "model", "key"] = "day",
    start: date | None = None,
    end: date | None = None,
    member: str = "",
) -> dict[str, Any]:
    """Sums of whole days in the panel's time zone, of the last 30 days by default. Owners see everybody, or one
    ``member`` (id or address); others see themselves."""
    caller: Any = request.user
    if caller.has_role(Role.OWNER):
        who = user_get(member) if member else None
    else:
        who = caller
        # Without looking it up: who has an account is not told to those who may not see others.
        if member and member.lower() not in (str(caller.public_id), str(caller.pk), caller.email):
            raise NotAllowed("Only owners see what others use.")
    first, last = period(start, end)
    uses = use_by(by, first, last, who)
    ids = {u.pk: str(u.public_id) for u in User.objects.filter(pk__in=[x.of for x in uses])} if by == "user" else {}
    items = [
        {**{name: getattr(use, name) for name in UseOut.model_fields if name not in ("of", "currency")},
         "of": ids.get(use.of, "") if by == "user" else str(use.of or ""), "currency": settings.ENERGY_CURRENCY}
        for use in uses
    ]  # fmt: skip
    return {"start": first, "end": last, "items": items, "count": len(items)}


def _subject(data: QuotaIn) -> Subject:
    given = [name for name in ("role", "member", "key") if getattr(data, name) is not None]
    if len(given) != 1:
        raise Invalid("Say whose quota it is: one of role, member and key.", fields={"role": ["One of the three."]})
    if data.role is not None:
        return Role(data.role)
    return user_get(data.member) if data.member is not None else any_key_get(data.key or 0)
