"""Wall-clock times of a rig's zone, with summer time: pure."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo


def as_utc(wall: datetime, zone: ZoneInfo) -> datetime:
    """The first moment at which the zone's clocks show this naive time or a later one.

    A time that occurs twice (autumn) is its first; one that is skipped (spring) is the moment of the change.
    """
    moment = wall.replace(tzinfo=zone, fold=0).astimezone(UTC)
    if moment.astimezone(zone).replace(tzinfo=None) == wall:
        return moment
    # Skipped: the change lies between the readings by the offsets after and before it.
    early, late = wall.replace(tzinfo=zone, fold=1).astimezone(UTC), moment
    before = early.astimezone(zone).utcoffset()
    while late - early > timedelta(seconds=1):
        middle = early + (late - early) / 2
        if middle.astimezone(zone).utcoffset() == before:
            early = middle
        else:
            late = middle
    return late.replace(microsecond=0)


def wall(at: datetime, zone: ZoneInfo) -> datetime:
    """What the zone's clocks show, naive."""
    return at.astimezone(zone).replace(tzinfo=None)
