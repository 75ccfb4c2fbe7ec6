"""Changes to pins, requests and the rig's policies."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from datetime import datetime, time, timedelta
from typing import Any
from zoneinfo import available_timezones

from django.db import IntegrityError, transaction
from django.utils import timezone

from apps.audit.services import record
from apps.common.actors import PANEL, Actor
from apps.common.errors import Conflict, Invalid, NotAllowed
from apps.common.realtime import page_changed
from apps.common.roles import Role
from apps.deployments.models import LIVE, Deployment
from apps.deployments.policies.calendar import DAY, WEEK, overlap
from apps.deployments.policies.decide import PIN_LONGEST, PIN_LONGEST_OF_MEMBERS, clock
from apps.deployments.policies.models import (
    CalendarSlot,
    LoadBy,
    LoadingPolicy,
    Pin,
    RequestState,
    RigPolicy,
    SwitchRequest,
)
from apps.deployments.policies.selectors import calendar_of, loading_of, policy_of
from apps.deployments.routes import routes_changed
from apps.jobs.models import Job
from apps.profiles.models import Profile
from apps.rigs.models import Rig

CONTROL = re.compile(r"[\x00-\x1f\x7f]+")
SLOTS_MAX = 200
REQUEST_EXPIRES = timedelta(days=1)


def _line(text: str, limit: int) -> str:
    return CONTROL.sub(" ", text).strip()[:limit]


# -- pins -----------------------------------------------------------------------------------------


def pin_create(*, profile: Profile, actor: Actor, role: Role, until: datetime, reason: str = "", rig: Rig) -> Pin:
    """Pin a profile until a time. Members pin what they have started themselves, for a day at most.

    Raises NotAllowed, Invalid with fields, or Conflict while somebody else's pin is in force. One's own pin is renewed.
    """
    now = timezone.now()
    if until <= now:
        raise Invalid("A pin ends in the future.", fields={"until": ["Choose a time in the future."]})
    longest = PIN_LONGEST if role.covers(Role.OPERATOR) else PIN_LONGEST_OF_MEMBERS
    if until - now > longest:
        most = "30 days" if longest is PIN_LONGEST else "24 hours"
        raise Invalid(f"A pin lasts {most} at most.", fields={"until": [f"Choose a time within {most}."]})
    if not role.covers(Role.OPERATOR) and not _started_by(profile, actor, rig):
        raise NotAllowed("Members pin what they have started themselves; ask an operator to pin this profile.")
    try:
        with transaction.atomic():
            for old in Pin.objects.select_for_update(no_key=True).filter(rig=rig, profile=profile, released_at=None):
                if old.until > now and old.user_pk != actor.user_pk:
                    when = clock(old.until, now, policy_of(rig).zone)
                    raise Conflict(f"{profile} is already pinned by {old.user_name} until {when}.", code="pinned")
                Pin.objects.filter(pk=old.pk).update(released_at=now, released_by_name=actor.name)
            pin = Pin.objects.create(
                rig=rig,
                profile=profile,
                reason=_line(reason, 200),
                until=until,
                user_pk=actor.user_pk,
                user_name=actor.name,
            )
            record(
                actor,
                "pin.create",
                "pin",
                pin.pk,
                profile.name,
                {"rig": rig.slug, "until": until.isoformat(), "reason": pin.reason},
            )
            page_changed("policy", pin=pin.pk)
    except IntegrityError:
        raise Conflict("Somebody else pinned it in this moment.", code="pinned") from None
    return pin


def _started_by(profile: Profile, actor: Actor, rig: Rig) -> bool:
    live = Deployment.objects.filter(rig=rig, version__profile=profile, status__in=LIVE, job_id__isnull=False)
    jobs = [pk for pk in live.values_list("job_id", flat=True) if pk is not None]
    return actor.user_pk is not None and Job.objects.filter(pk__in=jobs, user_id=actor.user_pk).exists()


def pin_release(pin: Pin, *, actor: Actor, role: Role) -> None:
    """End a pin before its time: its owner, or an operator. Raises NotAllowed."""
    if not role.covers(Role.OPERATOR) and pin.user_pk != actor.user_pk:
        raise NotAllowed(f"This pin is {pin.user_name}'s; they or an operator can release it.")
    with transaction.atomic():
        changed = Pin.objects.filter(pk=pin.pk, released_at=None).update(
            released_at=timezone.now(), released_by_name=actor.name
        )
        if changed:
            detail = {"pinned_by": pin.user_name, "until": pin.until.isoformat()}
            record(actor, "pin.release", "pin", pin.pk, pin.profile.name, detail)
            page_changed("policy", pin=pin.pk)


# -- requests -------------------------------------------------------------------------------------


def request_create(*, profile: Profile, actor: Actor, reason: str = "", rig: Rig) -> SwitchRequest:
    """Ask for a switch; the same wish again is the same request."""
    if profile.archived_at is not None:
        raise Conflict(f"{profile} is archived.", code="archived")
    with transaction.atomic():
        Rig.objects.select_for_update(no_key=True).get(pk=rig.pk)
        same = SwitchRequest.objects.filter(
            rig=rig, profile=profile, user_pk=actor.user_pk, state=RequestState.WAITING
        ).first()
        if same is not None:
            return same
        made = SwitchRequest.objects.create(
            rig=rig, profile=profile, reason=_line(reason, 300), user_pk=actor.user_pk, user_name=actor.name
        )
        record(actor, "request.create", "request", made.pk, profile.name, {"rig": rig.slug, "reason": made.reason})
        page_changed("policy", request=made.pk)
    return made


def request_approve(
    request: SwitchRequest, *, actor: Actor, override: bool = False, passing: Collection[str] = ()
) -> Job:
    """Switch, in the operator's name and the member's; whoever else waits for the same profile is answered too. For
    ``override`` and ``passing`` see ``switch_request``.

    Raises Conflict when it was decided already, or where a pin forbids the switch."""
    from apps.deployments.services import switch_request

    with transaction.atomic():
        Rig.objects.select_for_update(no_key=True).get(pk=request.rig_id)
        _still_waiting(request)
        together = list(
            SwitchRequest.objects.filter(rig=request.rig, profile=request.profile, state=RequestState.WAITING).order_by(
                "pk"
            )
        )
        names = ", ".join(dict.fromkeys(one.user_name for one in together))
        reason = f"asked for by {names}" + (f": {request.reason}" if request.reason else "")
        job = switch_request(
            profile=request.profile,
            actor=actor,
            reason=reason,
            rig=request.rig,
            override=override,
            passing=passing,
        )
        for one in together:
            _decide(one, RequestState.APPROVED, actor, job_id=job.pk)
    return job


def request_decline(request: SwitchRequest, *, actor: Actor, answer: str = "") -> None:
    with transaction.atomic():
        _still_waiting(request)
        _decide(request, RequestState.DECLINED, actor, answer=_line(answer, 300))


def request_withdraw(request: SwitchRequest, *, actor: Actor) -> None:
    """Whoever asked takes it back. Raises NotAllowed for anybody else."""
    if request.user_pk is None or request.user_pk != actor.user_pk:
        raise NotAllowed(f"This request is {request.user_name}'s.")
    with transaction.atomic():
        _still_waiting(request)
        _decide(request, RequestState.WITHDRAWN, actor)


def requests_expire(rig: Rig) -> int:
    """End requests that nobody answered within a day. Returns how many."""
    old = SwitchRequest.objects.filter(
        rig=rig, state=RequestState.WAITING, created_at__lt=timezone.now() - REQUEST_EXPIRES
    )
    ended = 0
    for one in old.select_related("profile"):
        with transaction.atomic():
            _decide(one, RequestState.EXPIRED, PANEL, answer="Nobody answered within a day.")
        ended += 1
    return ended


def _still_waiting(request: SwitchRequest) -> None:
    request.refresh_from_db(fields=["state", "decided_by_name"])
    if request.state != RequestState.WAITING:
        by = f" by {request.decided_by_name}" if request.decided_by_name else ""
        raise Conflict(f"This request was {request.get_state_display().lower()}{by} already.", code="decided")


def _decide(request: SwitchRequest, state: RequestState, actor: Actor, **values: Any) -> None:
    won = SwitchRequest.objects.filter(pk=request.pk, state=RequestState.WAITING).update(
        state=state, decided_at=timezone.now(), decided_by_name=actor.name, **values
    )
    if won != 1:
        raise Conflict("Somebody else answered this request in this moment.", code="decided")
    record(
        actor,
        f"request.{state}",
        "request",
        request.pk,
        str(request),
        {"asked_by": request.user_name, **values},
    )
    page_changed("policy", request=request.pk)


# -- the calendar ---------------------------------------------------------------------------------


def slot_create(
    *, rig: Rig, profile: Profile, actor: Actor, days: Sequence[int], begin: time, end: time
) -> list[CalendarSlot]:
    """The same hours on each of these days (0 is Monday), on the rig's own clocks. An ``end`` at or before ``begin``
    is on the next day. Raises Invalid where two entries would overlap."""
    if not days or any(not 0 <= day < 7 for day in days):
        raise Invalid("Choose at least one day.", fields={"days": ["Choose at least one day."]})
    _on_the_rigs_clocks(begin=begin, end=end)
    first, last = begin.hour * 60 + begin.minute, end.hour * 60 + end.minute
    length = (last - first) % DAY or DAY
    made = [
        CalendarSlot(rig=rig, profile=profile, begin=day * DAY + first, end=(day * DAY + first + length) % WEEK)
        for day in sorted(set(days))
    ]
    with transaction.atomic():
        Rig.objects.select_for_update(no_key=True).get(pk=rig.pk)  # two people at once: one after the other
        existing = calendar_of(rig)
        if len(existing) + len(made) > SLOTS_MAX:
            raise Invalid(f"A calendar has at most {SLOTS_MAX} entries.")
        both = overlap([*(s.as_slot() for s in existing), *(s.as_slot() for s in made)])
        if both is not None:
            told = f"{both[0].profile_name} {both[0].words} and {both[1].profile_name} {both[1].words} overlap."
            raise Invalid(told, fields={"begin": [told]})
        for slot in made:
            slot.save()
            record(actor, "calendar.create", "calendar", slot.pk, profile.name, {"rig": rig.slug, "when": slot.words})
        page_changed("policy", rig=rig.pk)
    return made


def _on_the_rigs_clocks(**times: time | None) -> None:
    """Raises Invalid for a time with an offset: it would mean another one than it says."""
    for name, value in times.items():
        if value is not None and value.tzinfo is not None:
            told = "Times are on the rig's own clocks; leave the offset out, as in 18:00."
            raise Invalid(told, fields={name: [told]})


def slot_delete(slot: CalendarSlot, *, actor: Actor) -> None:
    with transaction.atomic():
        record(
            actor, "calendar.delete", "calendar", slot.pk, slot.profile.name, {"rig": slot.rig.slug, "when": slot.words}
        )
        slot.delete()
        page_changed("policy")


# -- loading by request ---------------------------------------------------------------------------


def loading_set(*, profile: Profile, actor: Actor, by: str) -> LoadingPolicy:
    """Say whose requests may load a profile; ``by``: a ``LoadBy``. Raises Invalid."""
    if by not in LoadBy.values:
        words = f"One of {', '.join(LoadBy.values)}."
        raise Invalid(f"Nobody is called {by[:40]!r} here.", fields={"by": [words]})
    with transaction.atomic():
        before = loading_of(profile).by
        policy, _ = LoadingPolicy.objects.update_or_create(profile=profile, defaults={"by": by})
        if before != by:
            record(actor, "profile.loading", "profile", profile.pk, profile.slug, {"by": [before, by]})
            page_changed("profile", profile=profile.pk)
            routes_changed()  # gateways look at what could be loaded
    return policy


# -- the rig's policies ---------------------------------------------------------------------------


def rig_policy_set(*, rig: Rig, actor: Actor, **values: Any) -> RigPolicy:
    """Change the given fields; the others stay. Raises Invalid with fields."""
    zone = values.get("time_zone")
    if zone is not None and zone not in available_timezones():
        raise Invalid("There is no such time zone.", fields={"time_zone": ["Use a name like Europe/Berlin."]})
    _on_the_rigs_clocks(home_at=values.get("home_at"))
    with transaction.atomic():
        policy, _ = RigPolicy.objects.update_or_create(rig=rig, defaults=values)
        if "home_at" in values:
            RigPolicy.objects.filter(pk=policy.pk).update(home_acted_for=None)
        record(actor, "rig.policy", "rig", rig.pk, rig.slug, {k: str(v) for k, v in values.items()})
        page_changed("policy", rig=rig.pk)
    return policy
