"""The week's plan of profiles: pure. Minutes count from Monday 00:00 on the rig's own clocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

from apps.deployments.policies.times import as_utc, wall

DAY = 24 * 60
WEEK = 7 * DAY
DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")


@dataclass(frozen=True, slots=True)
class Slot:
    """From ``begin`` until before ``end``, both 0..10079; an ``end`` at or before ``begin`` lies in the next week."""

    pk: int
    profile_id: int
    profile_name: str
    begin: int
    end: int

    @property
    def length(self) -> int:
        return (self.end - self.begin) % WEEK or WEEK

    def covers(self, minute: int) -> bool:
        return (minute - self.begin) % WEEK < self.length

    @property
    def words(self) -> str:
        """``Mon 09:00-18:00``, ``Fri 22:00-Sat 06:00``."""
        first, last = DAYS[self.begin // DAY], DAYS[(self.end - 1) % WEEK // DAY]
        until = "24:00" if self.end % DAY == 0 else _time(self.end)
        return f"{first} {_time(self.begin)}–{'' if first == last and self.length <= DAY else last + ' '}{until}"


def _time(minute: int) -> str:
    return f"{minute % DAY // 60:02d}:{minute % 60:02d}"


def overlap(slots: Sequence[Slot]) -> tuple[Slot, Slot] | None:
    """Two slots that share a minute, or None."""
    ordered = sorted(slots, key=lambda s: s.begin)
    for at, one in enumerate(ordered):
        following = ordered[(at + 1) % len(ordered)]
        if following is not one and one.covers(following.begin):
            return one, following
    return None


def minute_of_week(at: datetime, zone: ZoneInfo) -> int:
    local = wall(at, zone)
    return local.weekday() * DAY + local.hour * 60 + local.minute


def active(slots: Sequence[Slot], now: datetime, zone: ZoneInfo) -> Slot | None:
    """The slot that the rig's clocks are in. What is skipped in spring begins with the change; the hour that occurs
    twice in autumn is in its slot twice."""
    minute = minute_of_week(now, zone)
    return next((slot for slot in slots if slot.covers(minute)), None)


def begun_at(slot: Slot, now: datetime, zone: ZoneInfo) -> datetime:
    """When this occurrence of an active slot began."""
    local = wall(now, zone).replace(second=0, microsecond=0)
    return as_utc(local - timedelta(minutes=(minute_of_week(now, zone) - slot.begin) % WEEK), zone)


def ends_at(slot: Slot, now: datetime, zone: ZoneInfo) -> datetime:
    """When the clocks leave an active slot."""
    local = wall(now, zone).replace(second=0, microsecond=0)
    since = (minute_of_week(now, zone) - slot.begin) % WEEK
    return as_utc(local + timedelta(minutes=slot.length - since), zone)


def coming(slots: Sequence[Slot], now: datetime, zone: ZoneInfo) -> tuple[Slot, datetime] | None:
    """The next slot that begins, and when."""
    local = wall(now, zone).replace(second=0, microsecond=0)
    minute = minute_of_week(now, zone)
    found = [(as_utc(local + timedelta(minutes=(s.begin - minute) % WEEK or WEEK), zone), s) for s in slots]
    return min(((s, at) for at, s in found), key=lambda pair: pair[1]) if found else None
