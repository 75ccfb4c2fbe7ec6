"""What the clock does for the policies of this rig: reads the facts, asks ``clockwork``, carries the act out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from itertools import takewhile
from typing import Any

import redis
import structlog
from django.conf import settings
from django.utils import timezone

from apps.common.actors import PANEL
from apps.common.errors import ApplicationError
from apps.common.realtime import page_changed
from apps.common.store import store
from apps.deployments.models import LIVE, SERVING, Deployment
from apps.deployments.policies.calendar import active, begun_at
from apps.deployments.policies.clockwork import (
    HOME_DAILY,
    TRY_AGAIN,
    Act,
    ActKind,
    Home,
    IdleAction,
    Running,
    Tried,
    next_act,
)
from apps.deployments.policies.decide import Asker
from apps.deployments.policies.models import CalendarSlot, RigPolicy
from apps.deployments.policies.selectors import calendar_of, policy_of
from apps.deployments.policies.services import requests_expire
from apps.deployments.restarting import engines_busy
from apps.deployments.scrape import engine_facts
from apps.deployments.selectors import streams_by_deployment
from apps.jobs.models import Job, JobState
from apps.profiles.models import Profile
from apps.rigs.models import Rig

log = structlog.get_logger(__name__)
RETRY_SECONDS = 30.0  # after a refusal: pins and residency change slowly, and asking costs a plan
AWAY_SECONDS = 30  # between two looks at an engine: what happened meanwhile was not watched. Beats come every 2 s
_refused_at: dict[str, float] = {}


def tick(rig_name: str, **_: Any) -> None:
    rig = Rig.objects.filter(slug=rig_name).first()
    if rig is None or rig_name != settings.RIG_NAME:
        return
    requests_expire(rig)
    policy, slots = policy_of(rig), [slot for slot in calendar_of(rig) if slot.profile.archived_at is None]
    if not slots and _home_of(policy) is None and policy.idle_action == IdleAction.NOTHING:
        _answer(policy, "")
        return
    act = wanted(rig, policy, slots)
    if act is None:
        _answer(policy, failure_words(rig, policy, slots))
    elif time.monotonic() - _refused_at.get(rig_name, float("-inf")) >= RETRY_SECONDS:
        _carry_out(act, rig, policy)


def wanted(rig: Rig, policy: RigPolicy, slots: Sequence[CalendarSlot]) -> Act | None:
    """The act that is due now, or None."""
    home = _home_of(policy)
    serving = list(Deployment.objects.filter(rig=rig, status__in=SERVING).select_related("version__profile"))
    idle = since_cancelled(idle_seconds(serving))
    return next_act(
        slots=[slot.as_slot() for slot in slots],
        acted={slot.pk: slot.acted_for for slot in slots if slot.acted_for},
        home=Home(home.pk, home.name, policy.home_after_idle_seconds, policy.home_at) if home is not None else None,
        home_acted=policy.home_acted_for,
        idle_action=IdleAction(policy.idle_action),
        idle_after_seconds=policy.idle_after_seconds,
        running=[Running(d.pk, d.version.profile_id, d.profile_name, idle.get(d.pk)) for d in serving],
        empty_seconds=_empty_seconds(rig) if not serving else None,
        under_way=engines_busy(rig),
        now=timezone.now(),
        zone=policy.zone,
        slot_tried=_slot_tried(rig, policy, slots),
        home_tried=_home_tried(rig, policy),
    )


def _home_of(policy: RigPolicy) -> Profile | None:
    home = policy.home_profile
    return None if home is None or home.archived_at is not None else home


def _slot_tried(rig: Rig, policy: RigPolicy, slots: Sequence[CalendarSlot]) -> Tried | None:
    slot = active([s.as_slot() for s in slots], timezone.now(), policy.zone)
    profiles = {s.pk: s.profile for s in slots}
    return None if slot is None else tried(rig, slot.pk, profiles[slot.pk])


def _home_tried(rig: Rig, policy: RigPolicy) -> Tried | None:
    home = _home_of(policy)
    found = tried(rig, None, home) if home is not None else None
    return replace(found, then=HOME_DAILY) if found is not None and policy.home_at is None else found


def tried(rig: Rig, slot_pk: int | None, profile: Profile) -> Tried | None:
    """How the clock's switches to a profile for the newest occurrence of a calendar entry, or of home (None), failed.

    None where the last did not or was to another profile, or a person has asked for anything since. Failures of an
    earlier version do not count."""
    jobs = Job.objects.filter(rig_name=rig.slug, kind="switch", data__clock__slot=slot_pk, data__has_key="clock")
    newest = list(jobs.order_by("-pk")[: len(TRY_AGAIN) + 1])
    last = newest[0] if newest else None
    if last is None or last.state not in (JobState.FAILED, JobState.ERRORED) or last.finished_at is None:
        return None
    people = Job.objects.filter(rig_name=rig.slug, kind__in=("switch", "stop"), pk__gt=last.pk)
    if last.profile_slug != profile.slug or people.exclude(user=None, user_name=PANEL.name).exists():
        return None
    mark, version = last.data["clock"]["mark"], profile.current.number

    def counts(job: Job) -> bool:
        of = (job.data["clock"]["mark"], job.profile_slug, job.profile_version)
        return of == (mark, profile.slug, version)

    failures = sum(1 for _ in takewhile(counts, newest))
    return Tried(datetime.fromisoformat(mark), failures, last.finished_at, last.summary)


def failure_words(rig: Rig, policy: RigPolicy, slots: Sequence[CalendarSlot]) -> str:
    """Why the clock's last switch is not there, and when it is tried again; empty where it did not fail, or what failed
    was changed since."""
    now, zone = timezone.now(), policy.zone
    slot = active([s.as_slot() for s in slots], now, zone)
    if slot is not None:
        found, whose = _slot_tried(rig, policy, slots), f"calendar: {slot.words}"
        if found is None or found.mark != begun_at(slot, now, zone):
            return ""
    else:
        found, whose = _home_tried(rig, policy), "home"
    return f"{whose}: {found.words(now, zone)}" if found is not None and found.failures else ""


def _empty_seconds(rig: Rig) -> float | None:
    """For how long nothing has run; None while something comes up or goes, or where nothing ever ran."""
    if Deployment.objects.filter(rig=rig, status__in=LIVE - {"sleeping"}).exists():
        return None
    last = Deployment.objects.filter(rig=rig, ended_at__isnull=False).order_by("-ended_at").first()
    return (timezone.now() - last.ended_at).total_seconds() if last and last.ended_at else None


def epoch() -> float:
    return time.time()


def idle_seconds(serving: Sequence[Deployment]) -> dict[int, float]:
    """For how long each of them has had nothing to do, as far as this was watched; those that say nothing are left out.

    A panel that was away begins to count anew, as after a silence of the engine or when the clock is set: it cannot
    know what it did not see."""
    facts = engine_facts(d.pk for d in serving)
    streams = streams_by_deployment() or {}
    now = epoch()
    idle = {}
    try:
        for deployment in serving:
            seen = facts.get(deployment.pk)
            if seen is None or seen.requests_running is None:
                continue
            busy = (
                seen.requests_running > 0
                or (seen.requests_waiting or 0) > 0
                or (seen.generation_tokens_per_second or 0) > 0
                or streams.get(deployment.pk, 0) > 0
            )
            key = f"policies:busy:{deployment.pk}"
            last = now if busy else _busy_last(str(store().get(key) or ""), now)
            store().set(key, f"{last} {now}", ex=AWAY_SECONDS)
            idle[deployment.pk] = now - last
    except (redis.RedisError, ValueError):
        return {}
    return idle


def _busy_last(kept: str, now: float) -> float:
    """When it was busy last, from what the look before this one kept: that moment and its own."""
    last, _, looked_at = kept.partition(" ")
    return float(last) if looked_at and 0 <= now - float(looked_at) <= AWAY_SECONDS else now


def since_cancelled(idle: dict[int, float]) -> dict[int, float]:
    """Whoever cancels a rest wants the model to stay: it counts as used until then, or the next beat asked again."""
    if not idle:
        return idle
    now = timezone.now()
    ended = Job.objects.filter(kind="stop", state=JobState.CANCELLED, deployment_id__in=idle, finished_at__lte=now)
    return idle | {
        pk: min(idle[pk], (now - at).total_seconds())
        for pk, at in ended.order_by("finished_at").values_list("deployment_id", "finished_at")
        if pk is not None and at is not None
    }


def _carry_out(act: Act, rig: Rig, policy: RigPolicy) -> None:
    from apps.deployments.services import stop_request, switch_request

    try:
        if act.kind is ActKind.SWITCH:
            profile = Profile.objects.get(pk=act.profile_id or 0)
            switch_request(
                profile=profile, actor=PANEL, reason=act.why, rig=rig, asker=Asker.CLOCK, clock=act.occurrence
            )
        elif act.kind is ActKind.REST:
            deployment = Deployment.objects.get(pk=act.deployment_id or 0)
            rest = policy.idle_action == IdleAction.SLEEP
            stop_request(deployment=deployment, actor=PANEL, reason=act.why, asker=Asker.CLOCK, rest=rest)
    except ApplicationError as error:
        _refused_at[rig.slug] = time.monotonic()
        _answer(policy, f"{act.why}: {error.message}")
        return
    _refused_at.pop(rig.slug, None)
    log.info("the clock acts", act=act.kind, why=act.why, profile=act.profile_id)
    if act.mark is not None and act.slot_pk is not None:
        CalendarSlot.objects.filter(pk=act.slot_pk).update(acted_for=act.mark)
    elif act.mark is not None:
        RigPolicy.objects.filter(pk=policy.pk).update(home_acted_for=act.mark)
    _answer(policy, "")


def _answer(policy: RigPolicy, sentence: str) -> None:
    """Keep why the clock did not do what it wanted, for the page; written only when it changes."""
    if policy.clock_answer == sentence[:500]:
        return
    row, _ = RigPolicy.objects.get_or_create(rig=policy.rig)
    RigPolicy.objects.filter(pk=row.pk).update(
        clock_answer=sentence[:500], clock_at=timezone.now() if sentence else None
    )
    page_changed("policy")
