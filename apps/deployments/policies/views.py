"""The page of policies: what binds the rig now, and why."""

from __future__ import annotations

from typing import Any

from django import forms
from django.contrib import messages
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.urls import reverse
from django.utils import timezone
from django.views.decorators.http import require_POST, require_safe

from apps.common.access import covers, role_of, role_required
from apps.common.actors import actor_of
from apps.common.errors import ApplicationError
from apps.common.htmx import ask, begun, form_status
from apps.common.roles import Role
from apps.deployments.pauses import pause_get, pause_lift, paused_shown
from apps.deployments.policies import services
from apps.deployments.policies.calendar import active, coming, ends_at
from apps.deployments.policies.decide import Asker, clock
from apps.deployments.policies.forms import PinForm, RequestForm, RigPolicyForm, SlotForm, policy_initial
from apps.deployments.policies.models import RigPolicy
from apps.deployments.policies.selectors import (
    calendar_of,
    pin_get,
    pins_in_force,
    policy_of,
    request_get,
    request_list,
    requests_waiting,
    slot_get,
)
from apps.deployments.policies.verdicts import switch_verdict
from apps.deployments.questions import pin_question, switch_question
from apps.profiles.selectors import profile_get
from apps.rigs.models import Rig
from apps.rigs.selectors import rig_default

REQUESTS_SHOWN = 20
Forms = dict[str, forms.Form]


def _page(request: HttpRequest, given: Forms | None = None, status: int = 200) -> HttpResponse:
    rig = rig_default()
    policy = policy_of(rig)
    first = {"profile": request.GET.get("profile", "")}
    context: dict[str, Any] = {
        "rig": rig,
        "policy": policy,
        "pins": pins_in_force(rig),
        "paused": paused_shown(rig),
        "waiting": requests_waiting(rig),
        "requests": request_list(rig).exclude(state="waiting")[:REQUESTS_SHOWN],
        "pin_form": PinForm(zone=policy.zone, initial=first),
        "request_form": RequestForm(initial=first, auto_id="id_request_%s"),
        "policy_form": RigPolicyForm(initial=policy_initial(policy), auto_id="id_policy_%s"),
        "slot_form": SlotForm(initial=first, auto_id="id_slot_%s"),
        "calendar": calendar_of(rig),
        "outlook": _outlook(rig, policy),
        "is_operator": covers(request.user, Role.OPERATOR),
        "is_member": covers(request.user, Role.MEMBER),
    }
    return render(request, "policies/page.html", context | (given or {}), status=status)


def _outlook(rig: Rig, policy: RigPolicy) -> list[str]:
    """What the calendar says now and next, in sentences."""
    slots, now = [slot.as_slot() for slot in calendar_of(rig)], timezone.now()
    told = []
    if (slot := active(slots, now, policy.zone)) is not None:
        told.append(f"Now {slot.profile_name}, until {clock(ends_at(slot, now, policy.zone), now, policy.zone)}.")
    if (following := coming(slots, now, policy.zone)) is not None:
        told.append(f"Next {following[0].profile_name}, from {clock(following[1], now, policy.zone)}.")
    return told


def _refused(form: forms.Form, error: ApplicationError) -> None:
    for name, sentences in error.fields.items():
        for sentence in sentences:
            form.add_error(name if name in form.fields else None, sentence)
    if not error.fields:
        form.add_error(None, error.message)


@role_required(Role.VIEWER)
@require_safe
def page(request: HttpRequest) -> HttpResponse:
    return _page(request)


@role_required(Role.MEMBER)
@require_POST
def pin(request: HttpRequest) -> HttpResponse:
    rig = rig_default()
    form = PinForm(request.POST, zone=policy_of(rig).zone)
    if form.is_valid():
        data, role = form.cleaned_data, role_of(request.user)
        try:
            services.pin_create(
                profile=profile_get(data["profile"]),
                actor=actor_of(request.user),
                role=role or Role.VIEWER,
                until=data["until"],
                reason=data["reason"],
                rig=rig,
            )
        except ApplicationError as error:
            _refused(form, error)
        else:
            messages.success(request, "Pinned.")
            return redirect("policies:page")
    return _page(request, {"pin_form": form}, form_status(form))


@role_required(Role.MEMBER)
@require_POST
def release(request: HttpRequest, pk: int) -> HttpResponse:
    services.pin_release(pin_get(pk), actor=actor_of(request.user), role=role_of(request.user) or Role.VIEWER)
    return redirect("policies:page")


@role_required(Role.OPERATOR)
@require_POST
def allow(request: HttpRequest, pk: int) -> HttpResponse:
    """A card that the guard paused may serve again."""
    pause_lift(pause_get(pk), actor=actor_of(request.user))
    messages.success(request, "The card may serve again.")
    return redirect("policies:page")


@role_required(Role.MEMBER)
@require_POST
def wish(request: HttpRequest) -> HttpResponse:
    form = RequestForm(request.POST, auto_id="id_request_%s")
    if form.is_valid():
        try:
            services.request_create(
                profile=profile_get(form.cleaned_data["profile"]),
                actor=actor_of(request.user),
                reason=form.cleaned_data["reason"],
                rig=rig_default(),
            )
        except ApplicationError as error:
            _refused(form, error)
        else:
            messages.success(request, "Asked. Operators see it on their home page.")
            return redirect("policies:page")
    return _page(request, {"request_form": form}, form_status(form))


@role_required(Role.OPERATOR)
@require_POST
def approve(request: HttpRequest, pk: int) -> HttpResponse:
    wanted, actor, passing = request_get(pk), actor_of(request.user), request.POST.getlist("about")
    version = wanted.profile.current
    verdict = switch_verdict(version, wanted.rig, asker=Asker.OPERATOR, asker_pk=actor.user_pk, passing=passing)
    asked = [pin_question(verdict), "" if "confirmed" in request.POST else switch_question(version, wanted.rig)]
    if question := " ".join(filter(None, asked)):
        return ask(request, f"Switch to {wanted.profile.name}?", question, verb="Switch", about=verdict.keys)
    job = services.request_approve(wanted, actor=actor, passing=passing)
    return begun(request, reverse("jobs:detail", args=[job.pk]))


@role_required(Role.OPERATOR)
@require_POST
def decline(request: HttpRequest, pk: int) -> HttpResponse:
    services.request_decline(request_get(pk), actor=actor_of(request.user), answer=request.POST.get("answer", ""))
    return redirect("/" if request.POST.get("next") == "home" else "policies:page")


@role_required(Role.MEMBER)
@require_POST
def withdraw(request: HttpRequest, pk: int) -> HttpResponse:
    services.request_withdraw(request_get(pk), actor=actor_of(request.user))
    return redirect("policies:page")


@role_required(Role.OPERATOR)
@require_POST
def rig_policy(request: HttpRequest) -> HttpResponse:
    form = RigPolicyForm(request.POST, auto_id="id_policy_%s")
    if form.is_valid():
        try:
            services.rig_policy_set(rig=rig_default(), actor=actor_of(request.user), **form.values())
        except ApplicationError as error:
            _refused(form, error)
        else:
            messages.success(request, "Saved.")
            return redirect("policies:page")
    return _page(request, {"policy_form": form}, form_status(form))


@role_required(Role.OPERATOR)
@require_POST
def slot_add(request: HttpRequest) -> HttpResponse:
    form = SlotForm(request.POST, auto_id="id_slot_%s")
    if form.is_valid():
        data = form.cleaned_data
        try:
            services.slot_create(
                rig=rig_default(),
                profile=profile_get(data["profile"]),
                actor=actor_of(request.user),
                days=data["days"],
                begin=data["begin"],
                end=data["end"],
            )
        except ApplicationError as error:
            _refused(form, error)
        else:
            messages.success(request, "It is in the calendar.")
            return redirect("policies:page")
    return _page(request, {"slot_form": form}, form_status(form))


@role_required(Role.OPERATOR)
@require_POST
def slot_remove(request: HttpRequest, pk: int) -> HttpResponse:
    services.slot_delete(slot_get(pk), actor=actor_of(request.user))
    return redirect("policies:page")
