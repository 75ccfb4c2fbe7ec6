"""Whether a switch may happen now: one pure decision for page, API, command line, gateway and clock alike.

Facts in, a verdict with its sentence out; every time is aware, and sentences give it in the rig's own zone.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any
from zoneinfo import ZoneInfo

from apps.common.roles import Role
from apps.common.units import seconds

PIN_LONGEST = timedelta(days=30)
PIN_LONGEST_OF_MEMBERS = timedelta(hours=24)
# A card that was stopped for heat has to be well for so long before anything is loaded there by itself: its fan and the
# air around it did not change in the seconds in which an idle card cools.
PAUSE = timedelta(minutes=10)


class Asker(StrEnum):
    """Who wants to switch. ``automatic``: a request at the gateway for a model that does not serve. ``restart``: what
    died is started again, which replaces nothing."""

    OPERATOR = "operator"
    MEMBER = "member"
    AUTOMATIC = "automatic"
    CLOCK = "clock"
    RESTART = "restart"

    @property
    def waits_for_residents(self) -> bool:
        """Whether minimum residency binds it."""
        return self not in (Asker.OPERATOR, Asker.RESTART)


@dataclass(frozen=True, slots=True)
class PinFact:
    """A pin in force: nobody but its owner replaces this profile before ``until``."""

    pk: int
    profile_id: int
    profile_name: str
    owner_pk: int | None
    owner_name: str
    until: datetime
    reason: str

    @property
    def key(self) -> str:
        """What a question about it names: a pin that is renewed or moved is another one."""
        return f"pin-{self.pk}"


@dataclass(frozen=True, slots=True)
class PausedCard:
    """A card that the guard took work from. ``why`` follows its name; ``free_at`` is when it may serve again if it is
    well until then, None while it is not well yet. Not ``is_read``: nobody can tell now how it is."""

    pk: int
    index: int
    why: str
    at: datetime
    free_at: datetime | None
    is_read: bool

    @property
    def key(self) -> str:
        return f"card-{self.pk}-{self.at.timestamp():.0f}"

    @property
    def expected_at(self) -> datetime | None:
        """``free_at`` where somebody watches over it."""
        return self.free_at if self.is_read else None

    def words(self, now: datetime, zone: ZoneInfo) -> str:
        again = (
            f"after {clock(self.expected_at, now, zone)}"
            if self.expected_at
            else f"once it has been well for {seconds(PAUSE.total_seconds())}"
        )
        return (
            f"GPU {self.index} {self.why} at {clock(self.at, now, zone)}"
            f"{'' if self.is_read else ' and is not read at present'}; it may serve again {again}, "
            "or when an operator says so"
        )


@dataclass(frozen=True, slots=True)
class InTheWay:
    """A deployment that the switch would replace; ``since`` is when it became ready, None while it comes up or sleeps.
    ``asleep``: it serves nobody."""

    profile_id: int
    profile_name: str
    since: datetime | None
    asleep: bool = False


@dataclass(frozen=True, slots=True)
class Scheduled:
    """Whom the calendar gives these hours to, until when."""

    profile_id: int
    profile_name: str
    until: datetime


@dataclass(frozen=True, slots=True)
class Verdict:
    """``sentence`` says why not, ``why`` the same within another sentence. ``overridable``: an operator may do it all
    the same by saying so, which is recorded; ``overridden`` and ``cards`` are the pins and paused cards that it passes
    over, or which forbid it. ``taken_by`` are the profiles that run where a restart would be."""

    allowed: bool
    sentence: str = ""
    code: str = ""
    why: str = ""
    overridable: bool = False
    overridden: tuple[PinFact, ...] = ()
    cards: tuple[PausedCard, ...] = ()
    taken_by: tuple[int, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        """What somebody who says so passes over, for the question and for the job that begins later."""
        return (*(pin.key for pin in self.overridden), *(card.key for card in self.cards))


def role_allows(role: Role | None, members_may_switch: bool) -> bool:
    """Operators switch to anything, members to what is marked for them."""
    if role is None:
        return False
    return role.covers(Role.OPERATOR) or (role.covers(Role.MEMBER) and members_may_switch)


def least_role(by: str, members_may_switch: bool) -> Role | None:
    """Whose requests at the gateway may load a profile: this role's and those above it, or nobody's. ``by``: a
    ``LoadBy``."""
    if by == "marked":
        by = "members" if members_may_switch else "nobody"
    return {"members": Role.MEMBER, "operators": Role.OPERATOR}.get(by)


def request_may_load(role: Role | None, by: str, members_may_switch: bool) -> bool:
    least = least_role(by, members_may_switch)
    return role is not None and least is not None and role.covers(least)


def may_switch(
    *,
    asker: Asker,
    asker_pk: int | None,
    in_the_way: Sequence[InTheWay],
    target_profile_id: int | None,
    pins: Sequence[PinFact],
    minimum_residency_seconds: float,
    now: datetime,
    zone: ZoneInfo,
    cards: Sequence[PausedCard] = (),
    override: bool = False,
    passing: Collection[str] = (),
    scheduled: Scheduled | None = None,
) -> Verdict:
    """Who runs in the place of a restart; then pins and paused cards, then the calendar, then minimum residency.

    A restart replaces nothing that is awake. A pin binds everybody but its owner; it does not bind a renewal of the
    pinned profile itself. ``cards`` are those of the target that the guard has paused: they bind everybody. An operator
    passes over both with ``override``, or over those whose keys are in ``passing``. Minimum residency binds members,
    the gateway and the clock, not operators. What the calendar gives these hours to is not replaced by a request at the
    gateway; people may. ``target_profile_id`` is None for a stop.
    """
    replaced = [d for d in in_the_way if d.profile_id != target_profile_id]
    what = "stopped" if target_profile_id is None else "restarted" if asker is Asker.RESTART else "switched"
    awake = [d for d in in_the_way if not d.asleep]
    if asker is Asker.RESTART and awake:
        why = in_its_place([d.profile_name for d in awake])
        return refused(what, why, "replaced", taken_by=tuple(d.profile_id for d in awake))
    binding = tuple(
        pin
        for pin in pins
        if pin.until > now
        and any(d.profile_id == pin.profile_id for d in replaced)
        and (pin.owner_pk is None or pin.owner_pk != asker_pk)
    )
    says_so = asker is Asker.OPERATOR
    found = [*(pin.key for pin in binding), *(card.key for card in cards)]
    if found and not (says_so and (override or all(key in passing for key in found))):
        told = "; ".join(filter(None, (_pinned(binding, now, zone), *(card.words(now, zone) for card in cards))))
        code = "pinned" if binding else "card_paused"
        return refused(what, told, code, overridable=says_so, overridden=binding, cards=tuple(cards))
    theirs = scheduled is not None and any(d.profile_id == scheduled.profile_id for d in replaced)
    if asker is Asker.AUTOMATIC and scheduled is not None and theirs:
        until = clock(scheduled.until, now, zone)
        return refused(what, f"the calendar gives these hours to {scheduled.profile_name}, until {until}", "scheduled")
    if asker.waits_for_residents and minimum_residency_seconds > 0:
        for one in replaced:
            if one.since is None or one.since > now:  # the clock was set back since: nobody waits for hours
                continue
            free_at = one.since + timedelta(seconds=minimum_residency_seconds)
            if free_at > now:
                served = seconds((now - one.since).total_seconds())
                return refused(
                    what,
                    f"{one.profile_name} has served for {served} only, and each model stays at least "
                    f"{seconds(minimum_residency_seconds)} (until {clock(free_at, now, zone)})",
                    "resident",
                )
    return Verdict(True, overridden=binding, cards=tuple(cards))


def refused(what: str, why: str, code: str, **more: Any) -> Verdict:
    """``what`` was not done: *switched*, *stopped*, *restarted*."""
    return Verdict(False, f"Not {what}: {why}.", code, why, **more)


def _pinned(pins: Sequence[PinFact], now: datetime, zone: ZoneInfo) -> str:
    return " and ".join(pin_words(pin, now, zone) for pin in pins)


def in_its_place(names: Sequence[str]) -> str:
    return f"{', '.join(names)} {'run' if len(names) > 1 else 'runs'} in its place"


def pin_words(pin: PinFact, now: datetime, zone: ZoneInfo) -> str:
    until = clock(pin.until, now, zone)
    why = f" ({pin.reason})" if pin.reason else ""
    return f"{pin.profile_name} is pinned by {pin.owner_name} until {until}{why}"


def clock(at: datetime, now: datetime, zone: ZoneInfo) -> str:
    """``18:00`` today, ``Thu 18:00`` within the week, else the date too; in the rig's zone."""
    local, today = at.astimezone(zone), now.astimezone(zone)
    if local.date() == today.date():
        return f"{local:%H:%M}"
    if timedelta(0) < at - now < timedelta(days=6):
        return f"{local:%a %H:%M}"
    return f"{local:%Y-%m-%d %H:%M}"
