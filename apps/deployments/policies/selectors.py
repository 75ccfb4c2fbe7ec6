"""Reads of pins, requests and the rig's policies."""

from __future__ import annotations

from datetime import datetime

from django.db.models import QuerySet
from django.utils import timezone

from apps.common.errors import NotFound
from apps.deployments.policies.calendar import active, ends_at
from apps.deployments.policies.decide import PinFact, Scheduled
from apps.deployments.policies.models import CalendarSlot, LoadingPolicy, Pin, RequestState, RigPolicy, SwitchRequest
from apps.profiles.models import Profile
from apps.rigs.models import Rig


def policy_of(rig: Rig) -> RigPolicy:
    """The rig's own, or the defaults (not stored)."""
    return RigPolicy.objects.filter(rig=rig).select_related("home_profile").first() or RigPolicy(rig=rig)


def calendar_of(rig: Rig) -> list[CalendarSlot]:
    """By their beginning in the week."""
    return list(CalendarSlot.objects.filter(rig=rig).select_related("profile"))


def slot_now(rig: Rig, policy: RigPolicy, now: datetime) -> Scheduled | None:
    """What the calendar gives this moment to."""
    slot = active([s.as_slot() for s in calendar_of(rig)], now, policy.zone)
    return None if slot is None else Scheduled(slot.profile_id, slot.profile_name, ends_at(slot, now, policy.zone))


def loading_of(profile: Profile) -> LoadingPolicy:
    """The profile's row, or one with the default that is not stored."""
    return LoadingPolicy.objects.filter(profile=profile).first() or LoadingPolicy(profile=profile)


def loading_by_profile() -> dict[int, str]:
    """Of those that have a row; the others are ``LoadBy.MARKED``."""
    return dict(LoadingPolicy.objects.values_list("profile_id", "by"))


def slot_get(pk: int) -> CalendarSlot:
    found = CalendarSlot.objects.filter(pk=pk).select_related("profile", "rig").first()
    if found is None:
        raise NotFound("There is no such entry in the calendar.")
    return found


def pins_in_force(rig: Rig, now: datetime | None = None) -> QuerySet[Pin]:
    return Pin.objects.filter(rig=rig, released_at=None, until__gt=now or timezone.now()).select_related("profile")


def pin_facts(rig: Rig, now: datetime) -> tuple[PinFact, ...]:
    return tuple(
        PinFact(pin.pk, pin.profile_id, pin.profile.name, pin.user_pk, pin.user_name, pin.until, pin.reason)
        for pin in pins_in_force(rig, now)
    )


def pin_get(pk: int) -> Pin:
    """Raises NotFound, also for one that is over."""
    found = Pin.objects.filter(pk=pk, released_at=None).select_related("profile", "rig").first()
    if found is None:
        raise NotFound("There is no such pin, or it is over.")
    return found


def request_list(rig: Rig) -> QuerySet[SwitchRequest]:
    return SwitchRequest.objects.filter(rig=rig).select_related("profile")


def requests_waiting(rig: Rig) -> QuerySet[SwitchRequest]:
    """Oldest first."""
    return request_list(rig).filter(state=RequestState.WAITING).order_by("pk")


def request_get(pk: int) -> SwitchRequest:
    found = SwitchRequest.objects.filter(pk=pk).select_related("profile", "rig").first()
    if found is None:
        raise NotFound("There is no such request.")
    return found
