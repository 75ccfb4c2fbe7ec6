"""Models that are wanted and not loaded: asking for the switch, once for all who want the same.

A wish never supersedes what is under way, neither a switch nor another wish: it waits its turn, so that two groups who
want different models cannot keep the rig loading for ever. Whether a wish may be granted at all is said in ``granted``.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import KW_ONLY, dataclass
from datetime import datetime, timedelta

import structlog
from django.db import transaction
from django.utils import timezone

from apps.accounts.models import User
from apps.common.errors import ApplicationError
from apps.common.roles import Role
from apps.deployments.models import LIVE_OR_COMES_BACK, Deployment
from apps.gateway.database import Worker
from apps.profiles.models import Profile
from apps.rigs.models import Rig

log = structlog.get_logger(__name__)
LOOK_EVERY_S = 1.0
FAILED_FOR = timedelta(seconds=60)
BRINGS = ("install", "download")  # jobs after which a start may find what it missed
RESIDENT = "resident"  # the policies' code for a model that has to stay a while; who waits may wait for that
CARD_PAUSED = "card_paused"  # a card was stopped for heat: nobody waits for minutes
CARD_PAUSED_AGAIN_S = 600
REASON = "asked for at the gateway"


@dataclass(frozen=True, slots=True)
class Wish:
    """``explicit``: somebody pressed *load*; else a request named the model. ``guest``: somebody behind Open WebUI's
    key without an account here; then ``user_id`` is the key's owner, whose rights and pins are not theirs.

    What they may is not in it: a wish can wait for minutes, and the role counts that they have when it is granted."""

    served_name: str
    user_id: int
    _: KW_ONLY
    explicit: bool = False
    guest: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """``refused`` and ``waits`` are sentences; at most one is not empty. Neither: the switch is under way."""

    refused: str = ""
    waits: str = ""
    job_id: int | None = None
    eta_at: datetime | None = None
    forbidden: bool = False
    again_s: int | None = None  # when to try again


def granted(wish: Wish) -> Answer:
    """Look after a wish: start its switch, or say why not (yet). Runs in a thread; may be called again and again.

    Whoever may switch may have it loaded by pressing *load*; a request alone loads what its profile's policy says: by
    default only what is marked for members, so that a name in a script moves nothing that an operator had in mind."""
    # Late: jobs, planner and engines cost ten MB, which a gateway that nobody asks does not need.
    from apps.common.actors import Actor, actor_of
    from apps.deployments.policies.decide import Asker, least_role, request_may_load
    from apps.deployments.policies.models import LoadBy
    from apps.deployments.policies.selectors import loading_by_profile
    from apps.deployments.policies.verdicts import asker_of
    from apps.deployments.services import may_switch, switch_request
    from apps.deployments.switch import exclusion
    from apps.jobs.models import LIVE_STATES, Job
    from apps.rigs.selectors import rig_default

    user = User.objects.filter(pk=wish.user_id, is_active=True).first()
    profiles = list(Profile.objects.filter(archived_at=None, versions__served_name=wish.served_name).distinct())
    profiles = [p for p in profiles if p.current.served_name == wish.served_name]
    if user is None or not profiles:
        return Answer(refused="There is no profile that could serve it.")
    rig = rig_default()
    coming = Job.objects.filter(
        kind="switch", exclusion=exclusion(rig), state__in=LIVE_STATES, cancel_requested_at=None
    )
    if (job := coming.filter(profile_slug__in=[p.slug for p in profiles]).order_by("-pk").first()) is not None:
        # Somebody has clicked it a moment ago and its route is not held yet: whoever may ask for it may wait for it.
        return Answer(job_id=job.pk, eta_at=job.eta_at)
    role, loading = _role(wish, user), loading_by_profile()

    def may(profile: Profile) -> bool:
        by = loading.get(profile.pk, LoadBy.MARKED)
        asking_is_enough = request_may_load(role, by, profile.members_may_switch)
        return asking_is_enough or (wish.explicit and may_switch(role, profile))

    allowed = [profile for profile in profiles if may(profile)]
    if not allowed:
        least = {least_role(loading.get(p.pk, LoadBy.MARKED), p.members_may_switch) for p in profiles}
        return Answer(refused=_why_not(wish, for_operators=Role.OPERATOR in least), forbidden=True)
    ran = dict(
        Deployment.objects.filter(version__profile__in=allowed)
        .exclude(ready_at=None)
        .order_by("pk")
        .values_list("version__profile_id", "pk")
    )
    profile = max(allowed, key=lambda p: (ran.get(p.pk, 0), -p.pk))
    asker = asker_of(role) if wish.explicit else Asker.AUTOMATIC
    with transaction.atomic():
        Rig.objects.select_for_update(no_key=True).get(
            pk=rig.pk
        )  # what somebody clicks meanwhile comes after or before, not between
        under_way = (
            Job.objects.filter(exclusion=exclusion(rig), state__in=LIVE_STATES, cancel_requested_at=None)
            .order_by("-pk")
            .first()
        )
        if under_way is not None:
            if under_way.kind == "switch" and under_way.profile_slug == profile.slug:  # clicked since we looked
                return Answer(job_id=under_way.pk, eta_at=under_way.eta_at)
            return Answer(waits=f"{under_way.title} is under way first.", eta_at=under_way.eta_at)
        if not wish.explicit and (failure := _failed_lately(profile, rig)) is not None:
            return Answer(refused=f"The last try to load it ended so: {failure}", again_s=60)
        try:
            actor = Actor("", f"{wish.guest} (Open WebUI)") if wish.guest else actor_of(user)
            job = switch_request(profile=profile, actor=actor, reason=REASON, rig=rig, asker=asker)
        except ApplicationError as error:
            if error.code == RESIDENT and not wish.explicit:
                return Answer(waits=error.message)
            if error.code == CARD_PAUSED:
                return Answer(refused=error.message, again_s=CARD_PAUSED_AGAIN_S)
            return Answer(refused=error.message, forbidden=error.status == 403)
    log.info("a switch was asked for", model=wish.served_name, profile=profile.slug, user=actor.user_pk, job=job.pk)
    return Answer(job_id=job.pk, eta_at=job.eta_at)


def unloaded(wish: Wish) -> Answer:
    """Stop what serves that name, for somebody who may. Runs in a thread."""
    from apps.common.actors import actor_of
    from apps.deployments.services import stop_request

    # One that failed and is to be started again can be ended here, too: else it comes up though somebody unloaded it.
    there = Deployment.objects.filter(LIVE_OR_COMES_BACK, served_name=wish.served_name)
    deployment = there.order_by("-pk").first()
    user = User.objects.filter(pk=wish.user_id, is_active=True).first()
    if deployment is None or user is None or not _role(wish, user).covers(Role.OPERATOR):
        return Answer(refused="Nothing of it runs, or you may not stop it.", forbidden=True)
    try:
        job = stop_request(deployment=deployment, actor=actor_of(user), reason=REASON)
    except ApplicationError as error:
        return Answer(refused=error.message, forbidden=error.status == 403)
    return Answer(job_id=job.pk)


def _role(wish: Wish, user: User) -> Role:
    return Role.MEMBER if wish.guest else Role(user.role)


def _why_not(wish: Wish, *, for_operators: bool) -> str:
    if wish.explicit:
        return "It is not marked as one that members may switch to; ask an operator to switch."
    if for_operators:
        return "Only operators' requests may load it; ask for a switch on the panel's page /policies/."
    return "It is not marked as one that requests may load; load it on the panel's page /profiles/ first."


def _failed_lately(profile: Profile, rig: Rig) -> str | None:
    """How the last switch to it ended, if that was a moment ago and not well: another try would end so again. Not
    where something has been installed or downloaded since, or the profile has a newer version."""
    from apps.jobs.models import Job, JobState

    jobs = Job.objects.filter(rig_name=rig.slug)
    last = jobs.filter(kind="switch", profile_slug=profile.slug).order_by("-pk").first()
    if last is None or last.finished_at is None or last.state == JobState.SUCCEEDED:
        return None
    ago = timezone.now() - last.finished_at
    if not timedelta(0) <= ago < FAILED_FOR:  # below zero: the clock was set back since, and nobody waits for hours
        return None
    if last.profile_version != profile.current.number:
        return None
    brought = jobs.filter(kind__in=BRINGS, state=JobState.SUCCEEDED, finished_at__gt=last.finished_at)
    return None if brought.exists() else last.summary


class Wishes:
    """Who waits for what is not loaded. One look at a time, oldest wish first; who wants the same shares the answer."""

    def __init__(self, refresh: Callable[[], Awaitable[None]]) -> None:
        self._refresh = refresh
        self._worker = Worker("wish")
        self._wanted: dict[str, _Wanted] = {}  # by served name, oldest first
        self._looking: asyncio.Task[None] | None = None

    async def stop(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)
        await self._worker.close()

    def wake(self) -> None:
        """Routes have changed: who waits looks whether his is there."""
        for wanted in list(self._wanted.values()):
            wanted.changed()

    async def ask(self, wish: Wish) -> Answer:
        """One look now, for somebody who does not wait."""
        return await self._worker.run(granted, wish)

    async def unload(self, wish: Wish) -> Answer:
        return await self._worker.run(unloaded, wish)

    def join(self, wish: Wish) -> _Wanted:
        """Want it; call ``leave`` when not any more."""
        key = f"{wish.user_id} {wish.guest} {wish.served_name}"
        wanted = self._wanted.setdefault(key, _Wanted(key, wish))
        wanted.waiting += 1
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look())
        return wanted

    def leave(self, wanted: _Wanted) -> None:
        wanted.waiting -= 1
        if not wanted.waiting and self._wanted.get(wanted.key) is wanted:
            del self._wanted[wanted.key]

    async def _look(self) -> None:
        while self._wanted:
            began = time.monotonic()
            for wanted in list(self._wanted.values()):
                try:
                    wanted.answer = await self._worker.run(granted, wanted.wish)
                except Exception as error:  # a database that is away: ask again
                    log.warning("a wish could not be looked after", model=wanted.wish.served_name, error=str(error))
                    continue
                if wanted.answer.refused:  # who comes later is answered anew
                    self._wanted.pop(wanted.key, None)
                wanted.changed()
            await self._refresh()
            await asyncio.sleep(max(0.1, LOOK_EVERY_S - (time.monotonic() - began)))


class _Wanted:
    def __init__(self, key: str, wish: Wish) -> None:
        self.key = key
        self.wish = wish
        self.waiting = 0
        self.answer: Answer | None = None
        self._futures: list[asyncio.Future[None]] = []

    def change(self) -> asyncio.Future[None]:
        """Done when there is a new answer."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._futures.append(future)
        return future

    def changed(self) -> None:
        futures, self._futures = self._futures, []
        for future in futures:
            if not future.done():
                future.set_result(None)
