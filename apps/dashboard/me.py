"""/me/: one's name, password, second factor, keys and last jobs. Composed here, because keys belong to
``accounts`` and jobs and deployments to apps above it."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from django.conf import settings
from django.contrib import messages
from django.http import HttpRequest, HttpResponse, QueryDict
from django.shortcuts import redirect, render
from django.urls import path
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_POST, require_safe

from apps.accounts.forms import OVERLAPS, KeyForm, NameForm, RotateForm
from apps.accounts.models import ApiKey
from apps.accounts.selectors import has_second_factor, key_get, key_list
from apps.accounts.services import key_create, key_revoke, key_rotate, user_update
from apps.accounts.tokens import people_secret
from apps.common.access import role_required
from apps.common.actors import actor_of
from apps.common.errors import ApplicationError
from apps.common.roles import Role
from apps.dashboard.my_use import my_use
from apps.deployments.selectors import serving_deployments
from apps.gateway.selectors import askable_names
from apps.jobs.selectors import job_list
from apps.rigs.selectors import rig_default

LAST_JOBS = 8


@role_required(Role.VIEWER)
@require_safe
def me(request: HttpRequest) -> HttpResponse:
    return _me(request)


@role_required(Role.VIEWER)
@require_POST
def name(request: HttpRequest) -> HttpResponse:
    form = NameForm(request.POST)
    if not form.is_valid():
        return _me(request, name_form=form, status=422)
    user_update(request.user, actor=actor_of(request.user), name=form.cleaned_data["name"].strip())  # type: ignore[arg-type]
    messages.success(request, "Your name is saved.")
    return redirect("accounts:me")


@role_required(Role.MEMBER)
@never_cache
@require_POST
def new_key(request: HttpRequest) -> HttpResponse:
    """Answers with the key itself, this once: neither session nor database keeps it."""
    form = _key_form(request.user, request.POST)
    if form.is_valid():
        try:
            row, token = key_create(request.user, actor=actor_of(request.user), **form.values())  # type: ignore[arg-type]
        except ApplicationError as error:
            form.refused(error)
        else:
            return _me(request, new=_shown(row, token))
    return _me(request, key_form=form, status=422)


@role_required(Role.MEMBER)
@never_cache
@require_POST
def rotate_key(request: HttpRequest, pk: int) -> HttpResponse:
    """A new key in place of one of theirs, shown this once; the old one goes on for as long as they chose."""
    key = key_get(request.user, pk)  # type: ignore[arg-type]
    form = RotateForm(request.POST)
    if not form.is_valid():
        messages.error(request, f"{key.name} is as it was: choose from the list how long the old key goes on.")
        return _me(request, status=422)
    overlap = timedelta(hours=form.cleaned_data["overlap_hours"])
    try:
        row, token = key_rotate(key, actor=actor_of(request.user), overlap=overlap)
    except ApplicationError as error:
        messages.error(request, error.message)
        return _me(request, status=error.status)
    key.refresh_from_db()
    return _me(request, new=_shown(row, token) | {"old": key})


def _shown(row: ApiKey, token: str) -> dict[str, Any]:
    return {"key": row, "token": token, "secret": people_secret(row.digest) if row.names_people else ""}


def _key_form(user: Any, data: QueryDict | None = None) -> KeyForm:
    return KeyForm(data, model_names=askable_names(), by_owner=user.has_role(Role.OWNER))


@role_required(Role.VIEWER)
@require_POST
def revoke_key(request: HttpRequest, pk: int) -> HttpResponse:
    """Viewers too: somebody who was a member once may still end a key of that time."""
    key = key_get(request.user, pk)  # type: ignore[arg-type]
    key_revoke(key, actor=actor_of(request.user))
    messages.success(request, f"The key {key.name} is revoked; what used it gets 401 from now on.")
    return redirect("accounts:me")


def _me(
    request: HttpRequest,
    *,
    name_form: NameForm | None = None,
    key_form: KeyForm | None = None,
    new: dict[str, Any] | None = None,
    status: int = 200,
) -> HttpResponse:
    user: Any = request.user
    serving = serving_deployments(rig_default())
    context = {
        "person": user,
        "name_form": name_form or NameForm(initial={"name": user.name}),
        "may_have_keys": user.has_role(Role.MEMBER),
        "keys": list(key_list(user)),
        "new": new,
        "base_url": f"{settings.GATEWAY_URL}/v1",
        "gateway_url": settings.GATEWAY_URL,
        "served_model": serving[0].served_name if serving else "",
        "second_factor": has_second_factor(user),
        "last_jobs": list(job_list().filter(user=user)[:LAST_JOBS]),
    }
    if user.has_role(Role.MEMBER):
        context |= my_use(user) | {"key_form": key_form or _key_form(user), "overlaps": OVERLAPS}
    return render(request, "accounts/me.html", context, status=status)


urlpatterns = [
    path("me/", me, name="me"),
    path("me/name", name, name="me_name"),
    path("me/keys", new_key, name="key_new"),
    path("me/keys/<int:pk>/rotate", rotate_key, name="key_rotate"),
    path("me/keys/<int:pk>/revoke", revoke_key, name="key_revoke"),
]
