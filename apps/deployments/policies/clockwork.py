"""What the clock does by itself: the calendar, the way home, and rest after idling. Pure: facts in, one act out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, time, timedelta
from enum import StrEnum
from zoneinfo import ZoneInfo

from apps.common.units import seconds
from apps.deployments.policies.calendar import Slot, active, begun_at
from apps.deployments.policies.decide import clock
from apps.deployments.policies.times import as_utc, wall

# The worker may have been away at the minute itself; past this a missed time is not made up for.
HOME_LATE = timedelta(hours=1)
HOME_AGAIN = timedelta(minutes=30)  # a way home that somebody cancelled or left at once is not tried at every beat
# A switch that failed is tried again after so long, each time, and then no more: loading it may stop what serves.
TRY_AGAIN = (timedelta(minutes=1), timedelta(minutes=5), timedelta(minutes=15), timedelta(minutes=30))
HOME_DAILY = timedelta(days=1)  # and then a home without a time of day, which has no next time of its own


class IdleAction(StrEnum):
    NOTHING = "nothing"
    SLEEP = "sleep"
    UNLOAD = "unload"


class ActKind(StrEnum):
    SWITCH = "switch"
    REST = "rest"
    NOTE = "note"  # nothing to do but to remember that this occurrence was dealt with


@dataclass(frozen=True, slots=True)
class Home:
    """Where the rig returns to: after everything idled, or at a time of each day."""

    profile_id: int
    profile_name: str
    after_idle_seconds: int | None = None
    at: time | None = None


@dataclass(frozen=True, slots=True)
class Running:
    """A serving deployment; ``idle_seconds`` is None where nobody can say."""

    deployment_id: int
    profile_id: int
    profile_name: str
    idle_seconds: float | None


@dataclass(frozen=True, slots=True)
class Tried:
    """The clock's last switch for an occurrence (``mark``) failed, for the ``failures``-th time with the profile as it
    is now, and no person has asked for anything since. ``then``: how long after the last try of ``TRY_AGAIN`` it is
    tried each time; None where it has a next time of its own."""

    mark: datetime
    failures: int
    failed_at: datetime
    sentence: str
    then: timedelta | None = None

    @property
    def again_at(self) -> datetime | None:
        """None: it was tried often enough. At once where the profile was changed since."""
        waits = (timedelta(0), *TRY_AGAIN)
        wait = waits[self.failures] if self.failures < len(waits) else self.then
        return self.failed_at + wait if wait is not None else None

    def is_due(self, now: datetime) -> bool:
        """Also where the clock was set back since: nobody waits for hours."""
        return self.again_at is not None and not self.failed_at <= now < self.again_at

    def words(self, now: datetime, zone: ZoneInfo) -> str:
        if self.again_at is None:
            then = (
                f"and after {self.failures} tries it is left at that: change its profile, switch by hand, or wait for "
                "the next time"
            )
        elif self.is_due(now):
            then = "next once what runs has idled long enough"
        elif self.failures > len(TRY_AGAIN):
            then = (
                f"after {self.failures} failures once a day: next at {clock(self.again_at, now, zone)}, or once its "
                "profile is changed or somebody has switched"
            )
        else:
            then = f"next at {clock(self.again_at, now, zone)}"
        return f"not switched: the last try failed at {clock(self.failed_at, now, zone)}, {then}. {self.sentence}"


@dataclass(frozen=True, slots=True)
class Act:
    """``mark`` is the occurrence (slot or day) that this act deals with; ``deployment_id`` for a rest."""

    kind: ActKind
    why: str
    profile_id: int | None = None
    deployment_id: int | None = None
    slot_pk: int | None = None
    mark: datetime | None = None

    @property
    def occurrence(self) -> dict[str, object]:
        """As the job keeps it, so that its failures can be counted (``Tried``)."""
        return {"slot": self.slot_pk, "mark": self.mark.isoformat() if self.mark else None}


def next_act(
    *,
    slots: Sequence[Slot],
    acted: Mapping[int, datetime],
    home: Home | None,
    home_acted: datetime | None,
    idle_action: IdleAction,
    idle_after_seconds: int,
    running: Sequence[Running],
    empty_seconds: float | None,
    under_way: bool,
    now: datetime,
    zone: ZoneInfo,
    slot_tried: Tried | None = None,
    home_tried: Tried | None = None,
) -> Act | None:
    """At most one act at a time, and none while a switch or stop is under way.

    ``acted`` maps a slot to the beginning of the occurrence that was dealt with: who switches away later in the slot is
    not fought. ``empty_seconds``: for how long nothing has served; None while something does. ``slot_tried`` and
    ``home_tried``: of the entry in force, and of home, where the clock's own switch failed.
    """
    if under_way:
        return None
    serving = {r.profile_id for r in running}
    slot = active(slots, now, zone)
    if slot is not None:
        begun = begun_at(slot, now, zone)
        failed = slot_tried is not None and slot_tried.mark == begun and slot_tried.is_due(now)
        if acted.get(slot.pk) != begun or (failed and slot.profile_id not in serving):
            kind = ActKind.NOTE if slot.profile_id in serving else ActKind.SWITCH
            return Act(kind, f"calendar: {slot.words}", slot.profile_id, slot_pk=slot.pk, mark=begun)
    if (
        home is not None
        and slot is None
        and (act := _home(home, home_acted, serving, running, empty_seconds, now, zone, home_tried))
    ):
        return act
    if idle_action is not IdleAction.NOTHING and idle_after_seconds > 0:
        kept = {home.profile_id if home else None, slot.profile_id if slot else None}
        for one in running:
            idled = _long_enough(one.idle_seconds, idle_after_seconds)
            if one.profile_id not in kept and idled is not None:
                why = f"idle for {seconds(idled)}"
                return Act(ActKind.REST, why, one.profile_id, deployment_id=one.deployment_id)
    return None


def _long_enough(idle: float | None, limit: int | None) -> float | None:
    """The seconds idled where they reach the limit, else None; also where nobody can say, or there is no limit."""
    return idle if idle is not None and limit is not None and idle >= limit else None


def _idle_all(running: Sequence[Running], empty_seconds: float | None) -> float | None:
    """For how long nothing has been used; None where one of what runs cannot say."""
    if not running:
        return empty_seconds
    known = [r.idle_seconds for r in running if r.idle_seconds is not None]
    return min(known) if len(known) == len(running) else None


def _home(
    home: Home,
    acted: datetime | None,
    serving: set[int],
    running: Sequence[Running],
    empty_seconds: float | None,
    now: datetime,
    zone: ZoneInfo,
    tried: Tried | None,
) -> Act | None:
    in_time = False
    if home.at is not None:
        due = as_utc(datetime.combine(wall(now, zone).date(), home.at), zone)
        in_time = tried is not None and tried.mark == due and now < due + HOME_LATE
        # A way home after idling since then counts as well: whoever switches away after it is not fought.
        if due <= now < due + HOME_LATE and not (acted is not None and due <= acted <= now):
            kind = ActKind.NOTE if home.profile_id in serving else ActKind.SWITCH
            return Act(kind, f"home at {home.at:%H:%M}", home.profile_id, mark=due)
    if home.profile_id in serving:
        return None
    idled = _long_enough(_idle_all(running, empty_seconds), home.after_idle_seconds)
    if tried is not None:  # whichever of the two it was
        # Once its time is over, what people have come to use meanwhile stays.
        again = tried.is_due(now) and (in_time or idled is not None or not running)
        return Act(ActKind.SWITCH, "home, once more", home.profile_id, mark=tried.mark) if again else None
    if idled is None:
        return None
    if acted is not None and timedelta(0) <= now - acted < HOME_AGAIN:
        return None
    return Act(ActKind.SWITCH, f"home after {seconds(idled)} idle", home.profile_id, mark=now)
