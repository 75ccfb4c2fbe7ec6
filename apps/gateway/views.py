"""The owners' pages: what the team uses, and who may use how much."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from django.conf import settings
from django.contrib import messages
from django.http import HttpRequest, HttpResponse, HttpResponseBase
from django.shortcuts import redirect, render
from django.utils.dateparse import parse_date
from django.views.decorators.http import require_http_methods, require_safe

from apps.accounts.models import ApiKey, User
from apps.accounts.selectors import user_get, user_list
from apps.common.access import role_required
from apps.common.actors import actor_of
from apps.common.errors import ApplicationError, Invalid
from apps.common.export import export
from apps.common.roles import Role
from apps.gateway.forms import QuotaForm
from apps.gateway.models import Quota, UsageDay
from apps.gateway.quotas import FIELDS, Allowance
from apps.gateway.reports import days_of, last_refusals, period, total, use_by
from apps.gateway.selectors import any_key_get, ledger_trouble, quota_list
from apps.gateway.services import Subject, quota_set

RANGES = (7, 30, 90, 365)
ROLES = tuple(role for role in Role if role.covers(Role.MEMBER))
CSV_COLUMNS = (
    "day", "person", "email", "key", "model", "deployment", "requests", "background", "failed", "interrupted",
    "unknown", "refused", "tokens_in", "tokens_out", "tokens_cached", "seconds", "energy_joules",
)  # fmt: skip


@role_required(Role.OWNER)
@require_safe
def usage(request: HttpRequest) -> HttpResponseBase:
    """Everybody's use, or one person's (``member``); ``format=csv`` is every day's row."""
    person = user_get(request.GET["member"]) if request.GET.get("member") else None
    days = _days(request)
    first, last = period(_date(request, "start"), _date(request, "end"), days=days or 30)
    if request.GET.get("format"):
        rows = days_of(first, last, person).select_related("user", "key")
        return export(request, rows, CSV_COLUMNS, csv_row, request.GET["format"], "usage")
    by_user = use_by("user", first, last, person)
    context: dict[str, Any] = {
        "first": first,
        "last": last,
        "days": days,
        "ranges": RANGES,
        "person": person,
        "people": list(user_list()),
        "by_day": use_by("day", first, last, person),
        "by_user": by_user,
        "by_model": use_by("model", first, last, person),
        "by_key": use_by("key", first, last, person) if person else [],
        "refusals": last_refusals(person) if person else [],
        "total": total(by_user),
        "currency": settings.ENERGY_CURRENCY,
        "priced": settings.ENERGY_PRICE is not None,
        "zone": settings.PANEL_TIME_ZONE.key,
        "ledger_trouble": ledger_trouble(),
    }
    context["chart"] = [(use.name, use.tokens) for use in context["by_day"]]
    return render(request, "gateway/usage.html", context)


def csv_row(day: UsageDay) -> Mapping[str, Any]:
    return {
        **{name: getattr(day, name) for name in CSV_COLUMNS if name not in ("person", "email", "key", "deployment")},
        "person": day.user.display_name if day.user else "",
        "email": day.user.email if day.user else "",
        "key": str(day.key) if day.key else "",
        "deployment": day.deployment_id or "",
    }


@role_required(Role.OWNER)
@require_http_methods(["GET", "HEAD", "POST"])
def quotas(request: HttpRequest) -> HttpResponse:
    """Everybody's limits; ``?subject=user-3`` opens the form for one of them."""
    reference = (request.POST if request.method == "POST" else request.GET).get("subject", "")
    subject = subject_of(reference) if reference else None
    if request.method != "POST":
        return _quotas(request, subject, _form(subject, reference) if subject is not None else None)
    if subject is None:
        raise Invalid("Say whose quota it is.", fields={"subject": ["role-member, user-3 or key-7"]})
    form = QuotaForm(request.POST, of_key=isinstance(subject, ApiKey))
    if not form.is_valid():
        return _quotas(request, subject, form, status=422)
    try:
        quota = quota_set(subject, form.limits(), actor=actor_of(request.user))
    except ApplicationError as error:
        for name, sentences in error.fields.items():
            form.add_error(name if name in form.fields else None, sentences)
        return _quotas(request, subject, form, status=422)
    name = name_of(subject)
    messages.success(request, f"{name} has a quota now." if quota else f"{name} has no limits of its own any more.")
    return redirect("gateway:quotas")


def _form(subject: Subject, reference: str) -> QuotaForm:
    quota = Quota.objects.filter(**_filter(subject)).first()
    values = {name: getattr(quota, name) for name in FIELDS} if quota else {}
    return QuotaForm(initial={"subject": reference, **values}, of_key=isinstance(subject, ApiKey))


def _quotas(
    request: HttpRequest, subject: Subject | None, form: QuotaForm | None, *, status: int = 200
) -> HttpResponse:
    quotas = list(quota_list())
    of_role = {quota.role: quota for quota in quotas if quota.role}
    of_user = {quota.user_id: quota for quota in quotas if quota.user_id}
    people = [person for person in user_list() if person.is_active and person.has_role(Role.MEMBER)]
    context = {
        "roles": [(f"role-{role.value}", role.label, cells(of_role.get(role.value))) for role in ROLES],
        "people": [(f"user-{p.pk}", p, cells(of_user.get(p.pk), of_role.get(p.role))) for p in people],
        "keys": [(f"key-{q.key_id}", q.name, cells(q)) for q in quotas if q.key_id],
        "columns": [f.name for f in fields(Allowance)],
        "subject": subject,
        "subject_name": name_of(subject) if subject is not None else "",
        "subject_keys": _keys_of(subject),
        "form": form,
        "zone": settings.PANEL_TIME_ZONE.key,
    }
    return render(request, "gateway/quotas.html", context, status=status)


def cells(own: Quota | None, from_role: Quota | None = None) -> list[tuple[int | None, bool]]:
    """For each limit its number (None: no limit) and whether it comes from the role."""
    found: list[tuple[int | None, bool]] = []
    for name in FIELDS:
        value = getattr(own, name) if own is not None else None
        inherited = getattr(from_role, name) if value is None and from_role is not None else None
        found.append((inherited, True) if inherited is not None else (value, False))
    return found


def _keys_of(subject: Subject | None) -> list[ApiKey]:
    person = subject.user if isinstance(subject, ApiKey) else subject if isinstance(subject, User) else None
    return list(person.api_keys.filter(revoked_at=None)) if person is not None else []


def subject_of(reference: str) -> Subject:
    """``role-member``, ``user-3`` or ``key-7``. Raises Invalid or NotFound."""
    kind, _, which = reference.partition("-")
    if kind == "role" and which in ROLES:
        return Role(which)
    if kind == "user" and which.isdecimal():
        return user_get(which)
    if kind == "key" and which.isdecimal():
        return any_key_get(int(which))
    raise Invalid("That is nobody who can have a quota.", fields={"subject": ["role-member, user-3 or key-7"]})


def name_of(subject: Subject) -> str:
    if isinstance(subject, User):
        return subject.display_name
    if isinstance(subject, ApiKey):
        return f"The key {subject} of {subject.user.display_name}"
    return f"The role {subject.label.lower()}"


def _filter(subject: Subject) -> dict[str, Any]:
    if isinstance(subject, User):
        return {"user": subject}
    return {"key": subject} if isinstance(subject, ApiKey) else {"role": subject.value}


def _days(request: HttpRequest) -> int | None:
    """How many days up to today; None where the address gives a start."""
    raw = request.GET.get("days", "")
    if raw.isdecimal() and int(raw) in RANGES:
        return int(raw)
    return None if request.GET.get("start") else 30


def _date(request: HttpRequest, name: str) -> Any:
    raw = request.GET.get(name, "")
    if not raw:
        return None
    try:
        found = parse_date(raw)
    except ValueError:
        found = None
    if found is None:
        raise Invalid(f"{raw[:40]!r} is not a day such as 2026-11-30.", fields={name: ["not a day"]})
    return found
