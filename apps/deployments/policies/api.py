"""Pins, requests and the rig's policies in the API."""

from __future__ import annotations

from datetime import datetime, time
from typing import Any, Literal

from django.db.models import QuerySet
from django.http import HttpRequest
from ninja import Router, Schema
from ninja.pagination import paginate
from pydantic import AwareDatetime, ConfigDict, Field

from apps.common.access import role_of
from apps.common.actors import actor_of
from apps.common.api import Paged, needs
from apps.common.roles import Role
from apps.deployments.pauses import Shown, pause_get, pause_lift, paused_shown
from apps.deployments.policies import services
from apps.deployments.policies.decide import least_role
from apps.deployments.policies.models import CalendarSlot, LoadingPolicy, Pin, RigPolicy, SwitchRequest
from apps.deployments.policies.selectors import (
    calendar_of,
    loading_of,
    pin_get,
    pins_in_force,
    policy_of,
    request_get,
    request_list,
    slot_get,
)
from apps.jobs.api import JobOut
from apps.jobs.models import Job
from apps.profiles.selectors import profile_get
from apps.rigs.models import Rig
from apps.rigs.selectors import rig_default, rig_get

router = Router(tags=["policies"])


class PinOut(Schema):
    id: int
    profile: str
    rig: str
    pinned_by: str
    reason: str
    created_at: datetime
    until: datetime

    @staticmethod
    def resolve_profile(pin: Pin) -> str:
        return pin.profile.slug

    @staticmethod
    def resolve_rig(pin: Pin) -> str:
        return pin.rig.slug

    @staticmethod
    def resolve_pinned_by(pin: Pin) -> str:
        return pin.user_name


class PinIn(Schema):
    """``until`` with its offset, as in ``2026-11-26T18:00:00+01:00``."""

    model_config = ConfigDict(extra="forbid")

    profile: str
    until: AwareDatetime
    reason: str = Field(default="", max_length=200)
    rig: str | None = None


class PauseOut(Schema):
    """``gpu`` is the card's index; ``free_at`` is null while it is not well yet or not read. ``sentence`` says all
    of it."""

    id: int
    gpu: int
    why: str
    at: datetime
    free_at: datetime | None
    sentence: str


class RequestOut(Schema):
    """``state``: waiting, approved, declined, withdrawn or expired. ``job`` is the switch of an approved one."""

    id: int
    profile: str
    rig: str
    asked_by: str
    reason: str
    state: str
    created_at: datetime
    decided_at: datetime | None
    decided_by: str
    answer: str
    job: int | None

    @staticmethod
    def resolve_profile(request: SwitchRequest) -> str:
        return request.profile.slug

    @staticmethod
    def resolve_rig(request: SwitchRequest) -> str:
        return request.rig.slug

    @staticmethod
    def resolve_asked_by(request: SwitchRequest) -> str:
        return request.user_name

    @staticmethod
    def resolve_decided_by(request: SwitchRequest) -> str:
        return request.decided_by_name

    @staticmethod
    def resolve_job(request: SwitchRequest) -> int | None:
        return request.job_id


class RequestIn(Schema):
    model_config = ConfigDict(extra="forbid")

    profile: str
    reason: str = Field(default="", max_length=300)
    rig: str | None = None


class ApproveIn(Schema):
    """``override``: pass over somebody's pin, or a card's pause; it is recorded."""

    override: bool = False


class DeclineIn(Schema):
    answer: str = Field(default="", max_length=300)


class RigPolicyOut(Schema):
    """``home_at`` and the calendar are on the rig's own clocks. ``clock_answer``: why the clock did not do what it
    wanted; empty while nothing stands in its way."""

    time_zone: str
    minimum_residency_seconds: int
    home_profile: str | None
    home_after_idle_seconds: int | None
    home_at: time | None
    idle_action: str
    idle_after_seconds: int
    clock_answer: str

    @staticmethod
    def resolve_home_profile(policy: RigPolicy) -> str | None:
        return policy.home_profile.slug if policy.home_profile else None


class RigPolicyIn(Schema):
    """What is left out stays as it is; null takes ``home_profile``, ``home_after_idle_seconds`` or ``home_at`` away."""

    model_config = ConfigDict(extra="forbid")

    time_zone: str | None = Field(default=None, max_length=60)
    minimum_residency_seconds: int | None = Field(default=None, ge=0, le=86400)
    home_profile: str | None = None
    home_after_idle_seconds: int | None = Field(default=None, ge=60, le=7 * 86400)
    home_at: time | None = None
    idle_action: Literal["nothing", "sleep", "unload"] | None = None
    idle_after_seconds: int | None = Field(default=None, ge=60, le=7 * 86400)


class SlotOut(Schema):
    """``when`` reads ``Mon 09:00–18:00``; minutes count from Monday 00:00."""

    id: int
    profile: str
    when: str
    begin_minute: int
    end_minute: int

    @staticmethod
    def resolve_profile(slot: CalendarSlot) -> str:
        return slot.profile.slug

    @staticmethod
    def resolve_when(slot: CalendarSlot) -> str:
        return slot.words

    @staticmethod
    def resolve_begin_minute(slot: CalendarSlot) -> int:
        return slot.begin

    @staticmethod
    def resolve_end_minute(slot: CalendarSlot) -> int:
        return slot.end


class SlotIn(Schema):
    """``days`` from 0, Monday, to 6. An ``end`` at or before ``begin`` is on the next day."""

    model_config = ConfigDict(extra="forbid")

    profile: str
    days: list[int] = Field(min_length=1, max_length=7)
    begin: time
    end: time


class LoadingOut(Schema):
    """``by``: whose requests at the gateway may load the profile: ``members``, ``operators`` (owners, too), ``nobody``,
    or ``marked``: members' if the profile is marked *members may switch*, else nobody's. ``least_role``: what that
    comes to; null: nobody."""

    by: str
    least_role: str | None


class LoadingIn(Schema):
    model_config = ConfigDict(extra="forbid")

    by: Literal["marked", "members", "operators", "nobody"]


def _loading(policy: LoadingPolicy) -> dict[str, Any]:
    return {"by": policy.by, "least_role": least_role(policy.by, policy.profile.members_may_switch)}


@router.get(
    "/profiles/{profile}/loading", response=LoadingOut, auth=needs(Role.VIEWER), summary="Whose requests may load it"
)
def get_loading(request: HttpRequest, profile: str) -> dict[str, Any]:
    return _loading(loading_of(profile_get(profile)))


@router.put(
    "/profiles/{profile}/loading",
    response=LoadingOut,
    auth=needs(Role.OPERATOR),
    summary="Set whose requests may load it",
)
def put_loading(request: HttpRequest, profile: str, data: LoadingIn) -> dict[str, Any]:
    """In force at the gateway within a second or two."""
    return _loading(services.loading_set(profile=profile_get(profile), actor=actor_of(request.user), by=data.by))


def _rig(reference: str | None) -> Rig:
    return rig_get(reference) if reference else rig_default()


@router.get("/pins", response=list[PinOut], auth=needs(Role.VIEWER), summary="Pins in force")
@paginate(Paged)
def list_pins(request: HttpRequest, rig: str | None = None) -> QuerySet[Pin]:
    return pins_in_force(_rig(rig)).select_related("rig")


@router.post("/pins", response={201: PinOut}, auth=needs(Role.MEMBER), summary="Pin a profile")
def create_pin(request: HttpRequest, data: PinIn) -> Pin:
    """Nobody else replaces or stops it before ``until``. Members pin what they have started, for a day at most."""
    return services.pin_create(
        profile=profile_get(data.profile),
        actor=actor_of(request.user),
        role=role_of(request.user) or Role.VIEWER,
        until=data.until,
        reason=data.reason,
        rig=_rig(data.rig),
    )


@router.delete("/pins/{int:pin}", response={204: None}, auth=needs(Role.MEMBER), summary="Release a pin")
def release_pin(request: HttpRequest, pin: int) -> None:
    """One's own; operators release any."""
    services.pin_release(pin_get(pin), actor=actor_of(request.user), role=role_of(request.user) or Role.VIEWER)


@router.get("/rigs/{rig}/pauses", response=list[PauseOut], auth=needs(Role.VIEWER), summary="Cards that pause")
def list_pauses(request: HttpRequest, rig: str) -> list[Shown]:
    """Cards that were too hot or gone: nothing is loaded there by itself until they have been well for a while."""
    return paused_shown(rig_get(rig))


@router.delete(
    "/pauses/{int:pause}", response={204: None}, auth=needs(Role.OPERATOR), summary="Let a paused card serve again"
)
def lift_pause(request: HttpRequest, pause: int) -> None:
    pause_lift(pause_get(pause), actor=actor_of(request.user))


@router.get("/requests", response=list[RequestOut], auth=needs(Role.VIEWER), summary="Requests for a switch")
@paginate(Paged)
def list_requests(request: HttpRequest, rig: str | None = None, state: str | None = None) -> QuerySet[SwitchRequest]:
    """Newest first."""
    found = request_list(_rig(rig)).select_related("rig")
    return found.filter(state=state) if state else found


@router.post("/requests", response={201: RequestOut}, auth=needs(Role.MEMBER), summary="Ask for a switch")
def create_request(request: HttpRequest, data: RequestIn) -> SwitchRequest:
    """The same wish again is the same request."""
    return services.request_create(
        profile=profile_get(data.profile), actor=actor_of(request.user), reason=data.reason, rig=_rig(data.rig)
    )


@router.post(
    "/requests/{int:pk}/approve", response={202: JobOut}, auth=needs(Role.OPERATOR), summary="Approve a request"
)
def approve_request(request: HttpRequest, pk: int, data: ApproveIn | None = None) -> Job:
    """Begins the switch in both names; everybody who waits for the same profile is answered."""
    override = data.override if data else False
    return services.request_approve(request_get(pk), actor=actor_of(request.user), override=override)


@router.post("/requests/{int:pk}/decline", response={204: None}, auth=needs(Role.OPERATOR), summary="Decline a request")
def decline_request(request: HttpRequest, pk: int, data: DeclineIn | None = None) -> None:
    services.request_decline(request_get(pk), actor=actor_of(request.user), answer=data.answer if data else "")


@router.post(
    "/requests/{int:pk}/withdraw", response={204: None}, auth=needs(Role.MEMBER), summary="Withdraw one's own request"
)
def withdraw_request(request: HttpRequest, pk: int) -> None:
    services.request_withdraw(request_get(pk), actor=actor_of(request.user))


@router.get("/rigs/{rig}/policy", response=RigPolicyOut, auth=needs(Role.VIEWER), summary="A rig's policies")
def get_policy(request: HttpRequest, rig: str) -> RigPolicy:
    return policy_of(rig_get(rig))


@router.put("/rigs/{rig}/policy", response=RigPolicyOut, auth=needs(Role.OPERATOR), summary="Set a rig's policies")
def put_policy(request: HttpRequest, rig: str, data: RigPolicyIn) -> RigPolicy:
    given: dict[str, Any] = data.model_dump(exclude_unset=True)
    values = {name: value for name, value in given.items() if value is not None or name.startswith("home_")}
    if values.get("home_profile") is not None:
        values["home_profile"] = profile_get(values["home_profile"])
    return services.rig_policy_set(rig=rig_get(rig), actor=actor_of(request.user), **values)


@router.get("/rigs/{rig}/calendar", response=list[SlotOut], auth=needs(Role.VIEWER), summary="The week's profiles")
def get_calendar(request: HttpRequest, rig: str) -> list[CalendarSlot]:
    return calendar_of(rig_get(rig))


@router.post(
    "/rigs/{rig}/calendar", response={201: list[SlotOut]}, auth=needs(Role.OPERATOR), summary="Add to the calendar"
)
def add_to_calendar(request: HttpRequest, rig: str, data: SlotIn) -> list[CalendarSlot]:
    """The same hours on each of the days. 422 where entries would overlap."""
    return services.slot_create(
        rig=rig_get(rig),
        profile=profile_get(data.profile),
        actor=actor_of(request.user),
        days=data.days,
        begin=data.begin,
        end=data.end,
    )


@router.delete(
    "/calendar/{int:slot}", response={204: None}, auth=needs(Role.OPERATOR), summary="Take it out of the calendar"
)
def remove_from_calendar(request: HttpRequest, slot: int) -> None:
    services.slot_delete(slot_get(slot), actor=actor_of(request.user))
