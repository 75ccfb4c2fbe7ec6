"""The calendar through summer time, the way home, rest after idling: what the clock does, and why not."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, time, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from django.test import Client
from django.utils import timezone
from hypothesis import given
from hypothesis import strategies as st

from apps.common.actors import actor_of
from apps.common.errors import Invalid
from apps.deployments.models import Deployment
from apps.deployments.policies import services, ticking
from apps.deployments.policies.calendar import DAY, WEEK, Slot, active, begun_at, coming, ends_at, overlap
from apps.deployments.policies.clockwork import (
    HOME_DAILY,
    Act,
    ActKind,
    Home,
    IdleAction,
    Running,
    Tried,
    next_act,
)
from apps.deployments.policies.models import CalendarSlot, RigPolicy
from apps.deployments.policies.selectors import policy_of
from apps.deployments.policies.times import as_utc, wall
from apps.deployments.scrape import EngineFacts
from apps.deployments.services import switch_request
from apps.jobs.models import Job
from apps.profiles.models import Profile
from apps.profiles.services import profile_update
from tests.deployments.test_policies import pin, serving
from tests.factories.profiles import simulated_profile

BERLIN = ZoneInfo("Europe/Berlin")


def slot(begin: str, end: str, pk: int = 1, profile: int = 7) -> Slot:
    """``"0 09:00"`` is Monday at nine."""

    def minute(text: str) -> int:
        day, _, clock = text.partition(" ")
        hours, _, minutes = clock.partition(":")
        return (int(day) * DAY + int(hours) * 60 + int(minutes)) % WEEK

    return Slot(pk, profile, f"p{profile}", minute(begin), minute(end))


def naive(year: int, month: int, day: int, hour: int = 0, minute: int = 0) -> datetime:
    return datetime(year, month, day, hour, minute)  # noqa: DTZ001 - what a clock on the wall shows


def berlin(*parts: int) -> datetime:
    return as_utc(naive(*parts), BERLIN)


# -- the calendar ---------------------------------------------------------------------------------

NIGHT = slot("5 22:00", "6 06:00")  # Saturday night into Sunday, when clocks are changed


def test_a_slot_is_told_in_words() -> None:
    assert slot("0 09:00", "0 18:00").words == "Mon 09:00–18:00"
    assert NIGHT.words == "Sat 22:00–Sun 06:00"
    assert slot("6 20:00", "7 00:00").words == "Sun 20:00–24:00"


@pytest.mark.parametrize(
    ("first", "second", "both"),
    [
        (("0 09:00", "0 12:00"), ("0 12:00", "0 18:00"), False),
        (("0 09:00", "0 12:01"), ("0 12:00", "0 18:00"), True),
        (("6 22:00", "0 06:00"), ("0 05:00", "0 07:00"), True),  # over the end of the week
        (("6 22:00", "0 06:00"), ("0 06:00", "0 07:00"), False),
        (("0 09:00", "0 09:00"), ("3 10:00", "3 11:00"), True),  # a whole week
        (("0 09:00", "0 10:00"), ("0 09:00", "0 10:00"), True),
    ],
)
def test_overlaps_are_found(first: tuple[str, str], second: tuple[str, str], both: bool) -> None:
    assert (overlap([slot(*first, pk=1), slot(*second, pk=2)]) is not None) is both


@given(st.lists(st.tuples(st.integers(0, WEEK - 1), st.integers(1, WEEK - 1)), min_size=2, max_size=5))
def test_an_overlap_is_exactly_a_shared_minute(pairs: list[tuple[int, int]]) -> None:
    slots = [Slot(n, n, "p", begin, (begin + length) % WEEK) for n, (begin, length) in enumerate(pairs)]
    minutes = [m for s in slots for m in ((s.begin + k) % WEEK for k in range(s.length))]
    assert (overlap(slots) is not None) == (len(minutes) != len(set(minutes)))


def test_the_same_hours_hold_in_summer_and_winter() -> None:
    office = slot("0 09:00", "0 18:00")
    for monday in ((2026, 1, 12), (2026, 7, 13)):
        assert active([office], berlin(*monday, 9, 0), BERLIN) == office
        assert active([office], berlin(*monday, 8, 59), BERLIN) is None
        assert active([office], berlin(*monday, 18, 0), BERLIN) is None
        assert begun_at(office, berlin(*monday, 17, 0), BERLIN) == berlin(*monday, 9, 0)
        assert ends_at(office, berlin(*monday, 9, 30), BERLIN) == berlin(*monday, 18, 0)


def test_a_night_of_the_change_is_one_occurrence() -> None:
    spring = [datetime(2026, 3, 28, 21, 0, tzinfo=UTC) + timedelta(minutes=10 * n) for n in range(42)]
    autumn = [datetime(2026, 10, 24, 20, 0, tzinfo=UTC) + timedelta(minutes=10 * n) for n in range(54)]
    for moments, hours in ((spring, 7), (autumn, 9)):
        inside = [m for m in moments if active([NIGHT], m, BERLIN)]
        assert len({begun_at(NIGHT, m, BERLIN) for m in inside}) == 1
        assert len({ends_at(NIGHT, m, BERLIN) for m in inside}) == 1
        assert inside[-1] - inside[0] + timedelta(minutes=10) == timedelta(hours=hours)


def test_a_slot_in_the_hour_that_is_skipped_begins_with_the_change() -> None:
    skipped = slot("6 02:30", "6 04:00")
    change = datetime(2026, 3, 29, 1, 0, tzinfo=UTC)
    assert as_utc(naive(2026, 3, 29, 2, 30), BERLIN) == change
    assert active([skipped], change, BERLIN) == skipped
    assert active([skipped], change - timedelta(minutes=1), BERLIN) is None
    assert begun_at(skipped, change + timedelta(minutes=20), BERLIN) == change
    assert coming([skipped], change - timedelta(minutes=5), BERLIN) == (skipped, change)


def test_an_hour_that_comes_twice_begins_once() -> None:
    twice = slot("6 02:00", "6 03:00")
    first = datetime(2026, 10, 25, 0, 30, tzinfo=UTC)
    second = first + timedelta(hours=1)
    assert wall(first, BERLIN) == wall(second, BERLIN)
    assert active([twice], first, BERLIN) == active([twice], second, BERLIN) == twice
    assert begun_at(twice, first, BERLIN) == begun_at(twice, second, BERLIN)


@given(
    st.datetimes(naive(2024, 1, 1), naive(2030, 1, 1)),
    st.sampled_from(["Europe/Berlin", "America/New_York", "UTC"]),
)
def test_a_time_is_where_the_clock_shows_it_or_the_first_later_one(moment: datetime, name: str) -> None:
    zone, moment = ZoneInfo(name), moment.replace(microsecond=0)
    found = as_utc(moment, zone)
    assert wall(found, zone) >= moment
    assert wall(found - timedelta(seconds=1), zone) < moment


# -- the act --------------------------------------------------------------------------------------

MONDAY = berlin(2026, 11, 23, 10, 0)
OFFICE = slot("0 09:00", "0 18:00", pk=3, profile=7)
HOME = Home(9, "Home", after_idle_seconds=600, at=time(20, 0))


def act(**changes: Any) -> Act | None:
    given: dict[str, Any] = {
        "slots": [],
        "acted": {},
        "home": None,
        "home_acted": None,
        "idle_action": IdleAction.NOTHING,
        "idle_after_seconds": 600,
        "running": [Running(1, 8, "Other", 5.0)],
        "empty_seconds": None,
        "under_way": False,
        "now": MONDAY,
        "zone": BERLIN,
    }
    return next_act(**{**given, **changes})


def test_the_calendar_switches_once_for_each_occurrence() -> None:
    found = act(slots=[OFFICE])
    assert found is not None
    assert (found.kind, found.profile_id, found.why) == (ActKind.SWITCH, 7, "calendar: Mon 09:00–18:00")
    assert found.mark == berlin(2026, 11, 23, 9, 0)
    assert act(slots=[OFFICE], acted={3: found.mark}) is None  # who switches away later is not fought
    assert act(slots=[OFFICE], acted={3: found.mark - timedelta(days=7)}) is not None
    assert act(slots=[OFFICE], under_way=True) is None
    there = act(slots=[OFFICE], running=[Running(1, 7, "Office", 0.0)])
    assert there is not None
    assert there.kind is ActKind.NOTE


def failed(failures: int, minutes_ago: float, mark: datetime) -> Tried:
    return Tried(mark, failures, MONDAY - timedelta(minutes=minutes_ago), "Office did not start: no.")


def test_a_switch_by_the_calendar_that_failed_is_tried_again_with_backoff_and_a_bound() -> None:
    begun = berlin(2026, 11, 23, 9, 0)
    asked: dict[str, Any] = {"slots": [OFFICE], "acted": {3: begun}}
    waits = {1: 1, 2: 5, 3: 15, 4: 30}
    for failures, minutes in waits.items():
        assert act(**asked, slot_tried=failed(failures, minutes - 0.1, begun)) is None
        found = act(**asked, slot_tried=failed(failures, minutes, begun))
        assert found is not None
        assert (found.kind, found.profile_id, found.mark) == (ActKind.SWITCH, 7, begun)
    assert act(**asked, slot_tried=failed(5, 600, begun)) is None
    assert act(**asked, slot_tried=failed(1, -600, begun)) is not None  # the clock was set back
    assert act(**asked, slot_tried=failed(1, 10, begun), running=[Running(1, 7, "Office", 0.0)]) is None
    assert act(**asked, slot_tried=failed(1, 10, begun), under_way=True) is None
    last_week = begun - timedelta(days=7)
    assert act(**asked, slot_tried=failed(1, 10, last_week)) is None


def test_a_way_home_that_failed_is_tried_again_with_the_same_backoff() -> None:
    due = berlin(2026, 11, 22, 20, 0)
    asked: dict[str, Any] = {"home": HOME, "home_acted": due, "running": []}
    assert act(**asked, home_tried=failed(2, 4, due)) is None
    found = act(**asked, home_tried=failed(2, 5, due))
    assert found is not None
    assert (found.kind, found.profile_id, found.mark) == (ActKind.SWITCH, 9, due)
    assert act(**asked, home_tried=failed(5, 600, due)) is None
    idle: dict[str, Any] = {**asked, "running": [Running(1, 8, "Other", 9000.0)]}
    assert act(**idle, home_tried=failed(5, 600, due)) is None  # left at that until somebody asks for something
    used: dict[str, Any] = {**asked, "running": [Running(1, 8, "Other", 0.0)]}
    assert act(**used, home_tried=failed(2, 5, due)) is None  # people have come to use what runs
    late = berlin(2026, 11, 22, 20, 10)
    in_time = Tried(due, 2, late - timedelta(minutes=5), "Home did not start: no.")
    assert act(**used, now=late, home_tried=in_time) is not None  # its time is not over
    evening = berlin(2026, 11, 23, 20, 1)
    assert act(**asked, now=evening, home_tried=failed(5, 600, due)) is not None  # the next day is another time


def test_a_home_without_a_time_of_day_is_tried_once_a_day_after_the_bound() -> None:
    asked: dict[str, Any] = {"home": Home(9, "Home", after_idle_seconds=600), "running": []}
    begun = MONDAY - timedelta(days=3)

    def tried(hours_ago: float) -> Tried:
        return replace(failed(5, hours_ago * 60, begun), then=HOME_DAILY)

    assert act(**asked, home_tried=tried(23.9)) is None
    found = act(**asked, home_tried=tried(24))
    assert found is not None
    assert (found.profile_id, found.mark) == (9, begun)
    used: dict[str, Any] = {**asked, "running": [Running(1, 8, "Other", 0.0)]}
    assert act(**used, home_tried=tried(24)) is None
    assert tried(1).words(MONDAY, BERLIN) == (
        "not switched: the last try failed at 09:00, after 5 failures once a day: next at Tue 09:00, or once its "
        "profile is changed or somebody has switched. Office did not start: no."
    )
    assert "next once what runs has idled long enough" in tried(24).words(MONDAY, BERLIN)


def test_what_was_changed_since_it_failed_is_tried_at_once() -> None:
    begun = berlin(2026, 11, 23, 9, 0)
    unchanged, changed = failed(5, 0, begun), failed(0, 0, begun)
    for asked in ({"slots": [OFFICE], "acted": {3: begun}}, {"home": HOME, "home_acted": begun, "running": []}):
        whose = "slot_tried" if "slots" in asked else "home_tried"
        assert act(**asked, **{whose: unchanged}) is None
        assert act(**asked, **{whose: changed}) is not None


def test_a_try_that_failed_says_when_the_next_one_is() -> None:
    begun = berlin(2026, 11, 23, 9, 0)
    told = failed(1, 0.5, begun).words(MONDAY, BERLIN)
    assert told == "not switched: the last try failed at 09:59, next at 10:00. Office did not start: no."
    told = failed(5, 10, begun).words(MONDAY, BERLIN)
    assert (
        "failed at 09:50, and after 5 tries it is left at that: change its profile, switch by hand, or wait for the "
        "next time. Office" in told
    )


def test_home_is_where_the_rig_goes_after_everything_idled() -> None:
    running = [Running(1, 8, "Other", 700.0), Running(2, 6, "Small", 650.0)]
    found = act(home=HOME, running=running)
    assert found is not None
    assert (found.kind, found.profile_id) == (ActKind.SWITCH, 9)
    assert "idle" in found.why
    assert act(home=HOME, running=[*running, Running(3, 5, "Busy", 2.0)]) is None
    assert act(home=HOME, running=[*running, Running(3, 5, "Silent", None)]) is None  # nobody can say: not idle
    assert act(home=HOME, running=[Running(1, 9, "Home", 900.0)]) is None
    assert act(home=HOME, running=running, slots=[OFFICE], acted={3: berlin(2026, 11, 23, 9, 0)}) is None
    assert act(home=HOME, running=[], empty_seconds=700.0) is not None
    assert act(home=HOME, running=[], empty_seconds=None) is None
    assert act(home=HOME, running=running, home_acted=MONDAY - timedelta(minutes=5)) is None  # failed a moment ago
    assert act(home=HOME, running=running, home_acted=MONDAY - timedelta(hours=1)) is not None


def test_home_at_a_time_happens_once_a_day_and_not_long_after() -> None:
    due = berlin(2026, 11, 23, 20, 0)
    found = act(home=HOME, now=due + timedelta(minutes=2))
    assert found is not None
    assert (found.kind, found.mark, found.why) == (ActKind.SWITCH, due, "home at 20:00")
    assert act(home=HOME, now=due + timedelta(minutes=2), home_acted=due) is None
    assert act(home=HOME, now=due - timedelta(minutes=1)) is None
    later = due + timedelta(minutes=30)  # it went home by idling since, and somebody switched away again
    assert act(home=HOME, now=later, home_acted=due + timedelta(minutes=12)) is None
    assert act(home=HOME, now=later, home_acted=due - timedelta(minutes=12)) is not None
    assert act(home=HOME, now=due + timedelta(hours=2)) is None


def test_what_is_idle_rests_but_home_and_the_calendars_profile_stay() -> None:
    idle = [Running(1, 8, "Other", 900.0), Running(2, 9, "Home", 900.0), Running(3, 7, "Office", 900.0)]
    found = act(
        idle_action=IdleAction.UNLOAD,
        running=idle,
        home=Home(9, "Home"),
        slots=[OFFICE],
        acted={3: berlin(2026, 11, 23, 9, 0)},
    )
    assert found is not None
    assert (found.kind, found.deployment_id, found.why) == (ActKind.REST, 1, "idle for 15 min")
    kept = act(
        idle_action=IdleAction.UNLOAD,
        running=idle[1:],
        home=Home(9, "Home"),
        slots=[OFFICE],
        acted={3: berlin(2026, 11, 23, 9, 0)},
    )
    assert kept is None
    assert act(idle_action=IdleAction.SLEEP, running=[Running(1, 8, "Other", None)]) is None


# -- in the panel ---------------------------------------------------------------------------------

pytestmark = pytest.mark.django_db


@pytest.fixture
def clocked(rig: Any, settings: Any, live_store: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    settings.RIG_NAME = rig.slug
    monkeypatch.setattr(ticking, "_refused_at", {})
    monkeypatch.setattr(ticking, "streams_by_deployment", lambda: {})
    return rig


def all_week(rig: Any, profile: Any, user: Any) -> CalendarSlot:
    """One entry that is in force now, whatever the hour."""
    (made,) = services.slot_create(
        rig=rig, profile=profile, actor=actor_of(user), days=[timezone.now().weekday()], begin=time(0), end=time(0)
    )
    return made


def test_the_clock_switches_by_the_calendar_once(clocked: Any, olivia: Any) -> None:
    serving(clocked)
    office = simulated_profile("office")
    all_week(clocked, office, olivia)
    ticking.tick(clocked.slug)
    job = Job.objects.get(state="queued")
    assert (job.profile_slug, job.user_name) == ("office", "panel")
    assert job.reason.startswith("calendar: ")
    Job.objects.update(state="failed", finished_at=timezone.now(), result={"summary": "Office did not start: no."})
    ticking.tick(clocked.slug)
    assert not Job.objects.filter(state="queued").exists()
    told = policy_of(clocked).clock_answer
    assert told.startswith("calendar: ")
    assert "not switched: the last try failed at " in told
    assert told.endswith("Office did not start: no.")
    Job.objects.update(finished_at=timezone.now() - timedelta(minutes=2))
    ticking.tick(clocked.slug)
    again = Job.objects.get(state="queued")
    assert again.data["clock"] == job.data["clock"]
    assert policy_of(clocked).clock_answer == ""
    Job.objects.filter(pk=again.pk).update(state="failed", finished_at=timezone.now() - timedelta(minutes=2))
    ticking.tick(clocked.slug)
    assert not Job.objects.filter(state="queued").exists()  # five minutes after the second


def test_who_asks_for_anything_after_a_failed_try_of_the_clock_is_not_fought(clocked: Any, olivia: Any) -> None:
    serving(clocked)
    all_week(clocked, simulated_profile("office"), olivia)
    ticking.tick(clocked.slug)
    Job.objects.update(state="failed", finished_at=timezone.now() - timedelta(minutes=2), result={"summary": "no."})
    theirs = switch_request(profile=simulated_profile("other"), actor=actor_of(olivia), rig=clocked, override=True)
    Job.objects.filter(pk=theirs.pk).update(state="succeeded", finished_at=timezone.now())
    ticking.tick(clocked.slug)
    assert not Job.objects.filter(state="queued").exists()
    assert policy_of(clocked).clock_answer == ""


def test_a_way_home_that_failed_is_tried_again(clocked: Any, olivia: Any) -> None:
    home = simulated_profile("home")
    serving(clocked)
    Deployment.objects.update(status="stopped", ended_at=timezone.now() - timedelta(hours=1))
    values = {"home_profile": home, "home_after_idle_seconds": 60}
    services.rig_policy_set(rig=clocked, actor=actor_of(olivia), **values)
    ticking.tick(clocked.slug)
    first = Job.objects.get(state="queued", kind="switch")
    Job.objects.filter(pk=first.pk).update(state="errored", finished_at=timezone.now())
    ticking.tick(clocked.slug)
    assert not Job.objects.filter(state="queued").exists()
    assert policy_of(clocked).clock_answer.startswith("home: not switched: the last try failed at ")
    Job.objects.filter(pk=first.pk).update(finished_at=timezone.now() - timedelta(minutes=2))
    ticking.tick(clocked.slug)
    assert Job.objects.get(state="queued").data["clock"] == first.data["clock"]


@pytest.fixture
def failed_home(clocked: Any, olivia: Any) -> Profile:
    """Home after idling, with nothing that serves and five tries that failed, the last one just now."""
    home = simulated_profile("home")
    serving(clocked)
    Deployment.objects.update(status="stopped", ended_at=timezone.now() - timedelta(hours=9))
    services.rig_policy_set(rig=clocked, actor=actor_of(olivia), home_profile=home, home_after_idle_seconds=60)
    for _ in range(5):
        Job.objects.update(finished_at=timezone.now() - timedelta(hours=1))
        ticking.tick(clocked.slug)
        Job.objects.filter(state="queued").update(
            state="failed", finished_at=timezone.now(), result={"summary": "Home did not start: no."}
        )
    assert Job.objects.filter(data__has_key="clock").count() == 5
    RigPolicy.objects.update(home_acted_for=timezone.now() - timedelta(hours=4))
    return home


def test_a_home_that_failed_too_often_is_tried_again_a_day_later(clocked: Any, failed_home: Profile) -> None:
    Job.objects.update(finished_at=timezone.now() - timedelta(hours=23))
    ticking.tick(clocked.slug)
    assert not Job.objects.filter(state="queued").exists()
    told = policy_of(clocked).clock_answer
    assert "after 5 failures once a day: next at " in told
    assert told.endswith("Home did not start: no.")
    Job.objects.update(finished_at=timezone.now() - timedelta(hours=24))
    ticking.tick(clocked.slug)
    assert Job.objects.get(state="queued").profile_slug == "home"
    Job.objects.filter(state="queued").update(state="failed", finished_at=timezone.now() - timedelta(hours=23))
    ticking.tick(clocked.slug)  # once a day, not five times
    assert not Job.objects.filter(state="queued").exists()


def test_a_home_that_failed_too_often_is_tried_again_once_its_profile_is_changed(
    clocked: Any, failed_home: Profile, olivia: Any
) -> None:
    ticking.tick(clocked.slug)
    assert not Job.objects.filter(state="queued").exists()
    profile_update(failed_home, actor=actor_of(olivia), options={"load_seconds": 1})
    ticking.tick(clocked.slug)
    again = Job.objects.get(state="queued")
    assert (again.profile_slug, again.profile_version) == ("home", 2)
    Job.objects.filter(pk=again.pk).update(state="failed", finished_at=timezone.now() - timedelta(minutes=2))
    ticking.tick(clocked.slug)  # a minute after its first failure
    assert Job.objects.get(state="queued").profile_version == 2


def test_another_home_does_not_inherit_the_failures_of_the_one_before(
    clocked: Any, failed_home: Profile, olivia: Any
) -> None:
    services.rig_policy_set(rig=clocked, actor=actor_of(olivia), home_profile=simulated_profile("other"))
    ticking.tick(clocked.slug)
    job = Job.objects.get(state="queued")
    assert job.profile_slug == "other"
    assert policy_of(clocked).clock_answer == ""
    Job.objects.filter(pk=job.pk).update(state="failed", finished_at=timezone.now() - timedelta(minutes=2))
    ticking.tick(clocked.slug)  # a minute after its first failure
    assert Job.objects.get(state="queued").profile_slug == "other"


def test_who_takes_home_away_takes_its_words_away(clocked: Any, failed_home: Profile, olivia: Any) -> None:
    ticking.tick(clocked.slug)
    assert policy_of(clocked).clock_answer.startswith("home: ")
    services.rig_policy_set(rig=clocked, actor=actor_of(olivia), home_profile=None)
    ticking.tick(clocked.slug)
    assert policy_of(clocked).clock_answer == ""


def test_a_pin_holds_the_clock_and_the_page_says_so(clocked: Any, client: Client, alice: Any, olivia: Any) -> None:
    pin(clocked, serving(clocked), alice)
    all_week(clocked, simulated_profile("office"), olivia)
    ticking.tick(clocked.slug)
    assert not Job.objects.filter(state="queued").exists()
    assert "Not switched: Coder is pinned by alice" in policy_of(clocked).clock_answer
    client.force_login(olivia)
    page = client.get("/policies/").content.decode()
    assert "The clock waits:" in page
    assert "pinned by alice" in page


def watched(rig: Any, moment: list[float], seconds: float) -> None:
    """So much time passes, and the rig's beats see it."""
    until = moment[0] + seconds
    while moment[0] < until:
        moment[0] = min(until, moment[0] + 20)
        ticking.tick(rig.slug)


def test_what_idles_is_put_to_rest_and_what_works_is_not(
    clocked: Any, olivia: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving(clocked)
    deployment = Deployment.objects.get()
    services.rig_policy_set(rig=clocked, actor=actor_of(olivia), idle_action="sleep", idle_after_seconds=600)
    facts = {deployment.pk: EngineFacts(requests_running=1.0)}
    monkeypatch.setattr(ticking, "engine_facts", lambda ids: facts)
    moment = [1_000_000.0]
    monkeypatch.setattr(ticking, "epoch", lambda: moment[0])
    ticking.tick(clocked.slug)
    facts[deployment.pk] = EngineFacts(requests_running=0.0)
    watched(clocked, moment, 599)
    assert not Job.objects.filter(kind="stop").exists()
    watched(clocked, moment, 2)
    job = Job.objects.get(kind="stop")
    assert (job.title, job.data, job.reason) == ("Rest Coder", {"rest": True}, "idle for 10 min 1 s")
    Job.objects.filter(pk=job.pk).update(state="cancelled", finished_at=timezone.now())
    ticking.tick(clocked.slug)  # whoever cancelled it is not asked again at the next beat
    assert Job.objects.filter(kind="stop").count() == 1
    Job.objects.filter(pk=job.pk).update(finished_at=timezone.now() - timedelta(seconds=601))
    ticking.tick(clocked.slug)
    assert Job.objects.filter(kind="stop").count() == 2


@pytest.mark.parametrize("what", ["the worker was away", "the engine said nothing", "the clock was set back"])
def test_what_nobody_saw_is_not_counted_as_idle(
    what: str, clocked: Any, olivia: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving(clocked)
    deployment = Deployment.objects.get()
    services.rig_policy_set(rig=clocked, actor=actor_of(olivia), idle_action="sleep", idle_after_seconds=600)
    facts = {deployment.pk: EngineFacts(requests_running=0.0)}
    monkeypatch.setattr(ticking, "engine_facts", lambda ids: facts)
    moment = [1_000_000.0]
    monkeypatch.setattr(ticking, "epoch", lambda: moment[0])
    ticking.tick(clocked.slug)
    watched(clocked, moment, 300)
    if what == "the engine said nothing":
        facts.clear()
        watched(clocked, moment, 7200)
        facts[deployment.pk] = EngineFacts(requests_running=0.0)
        ticking.tick(clocked.slug)
    else:
        moment[0] += 7200 if what == "the worker was away" else -7200
        ticking.tick(clocked.slug)
    watched(clocked, moment, 599)
    assert not Job.objects.filter(kind="stop").exists()
    watched(clocked, moment, 2)
    assert Job.objects.get(kind="stop").reason == "idle for 10 min 1 s"


def test_an_engine_that_says_nothing_is_not_called_idle(clocked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    serving(clocked)
    monkeypatch.setattr(ticking, "engine_facts", lambda ids: {})
    assert ticking.idle_seconds(list(Deployment.objects.all())) == {}


def test_overlaps_are_refused_with_both_entries(rig: Any, olivia: Any) -> None:
    office = simulated_profile("office")
    made = services.slot_create(
        rig=rig, profile=office, actor=actor_of(olivia), days=[0, 1], begin=time(22), end=time(6)
    )
    assert [s.words for s in made] == ["Mon 22:00–Tue 06:00", "Tue 22:00–Wed 06:00"]
    with pytest.raises(Invalid, match=r"Office Mon 22:00–Tue 06:00 and Office Tue 05:00–07:00 overlap"):
        services.slot_create(rig=rig, profile=office, actor=actor_of(olivia), days=[1], begin=time(5), end=time(7))
    assert CalendarSlot.objects.count() == 2


def test_calendar_and_home_by_page_and_api(client: Client, rig: Any, olivia: Any) -> None:
    simulated_profile("office")
    client.force_login(olivia)
    form = {"profile": "office", "days": ["0", "4"], "begin": "09:00", "end": "18:00"}
    assert client.post("/policies/calendar/", form).status_code == 302
    assert client.post("/policies/calendar/", form).status_code == 422
    rules = {
        "time_zone": "Europe/Berlin",
        "minimum_residency_seconds": 60,
        "home_profile": "office",
        "home_after_idle_minutes": 30,
        "home_at": "20:00",
        "idle_action": "sleep",
        "idle_after_minutes": 45,
    }
    assert client.post("/policies/rig/", rules).status_code == 302
    page = client.get("/policies/").content.decode()
    for words in ("Fri 09:00–18:00", "Home is Office", "every day at 20:00", "Next Office", "Europe/Berlin"):
        assert words in page, words
    listed = client.get("/api/v1/rigs/bench-01/calendar").json()
    assert [s["when"] for s in listed] == ["Mon 09:00–18:00", "Fri 09:00–18:00"]
    body = {"profile": "office", "days": [0], "begin": "10:00", "end": "11:00"}
    refused = client.post("/api/v1/rigs/bench-01/calendar", body, content_type="application/json")
    assert refused.status_code == 422
    assert "overlap" in refused.json()["error"]["message"]
    assert client.delete(f"/api/v1/calendar/{listed[0]['id']}").status_code == 204
    again = client.post("/api/v1/rigs/bench-01/calendar", body, content_type="application/json")
    assert again.status_code == 201
    for path, body in (
        ("policy", {"home_at": "20:00Z"}),
        ("calendar", {"profile": "office", "days": [6], "begin": "20:00+05:00", "end": "21:00"}),
    ):
        send = client.put if path == "policy" else client.post
        refused = send(f"/api/v1/rigs/bench-01/{path}", body, content_type="application/json")
        assert refused.status_code == 422, path
        assert "rig's own clocks" in refused.json()["error"]["message"]
    policy = client.put("/api/v1/rigs/bench-01/policy", {"home_profile": None}, content_type="application/json").json()
    assert (policy["home_profile"], policy["idle_action"], policy["home_at"]) == (None, "sleep", "20:00:00")
    assert RigPolicy.objects.get().idle_after_seconds == 2700
