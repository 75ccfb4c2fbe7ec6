"""A card that the guard took work from: nothing comes there by itself until it has been well for a while."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import time_machine
from django.core.management import call_command
from django.db.models import F
from django.test import Client
from django.utils import timezone

from apps.audit.models import AuditEntry
from apps.common.actors import PANEL, actor_of
from apps.common.errors import Conflict
from apps.deployments import guard, switch_forward
from apps.deployments.decide import Act, Decision
from apps.deployments.giving_up import claim, give_up_for
from apps.deployments.guard import HOT_SECONDS
from apps.deployments.models import (
    SLEEPER,
    WHOLE_CARD,
    CardPause,
    Deployment,
    DeploymentEvent,
    Desired,
    GpuReservation,
    Status,
)
from apps.deployments.pauses import pause_card, paused_cards, paused_shown, pauses_look
from apps.deployments.plan import placed, plan
from apps.deployments.policies import ticking
from apps.deployments.policies.decide import PAUSE, Asker
from apps.deployments.policies.models import Pin, RigPolicy
from apps.deployments.policies.selectors import policy_of
from apps.deployments.restarting import coming_back, look_at_failed
from apps.deployments.restarting import policy_of as restarts_of
from apps.deployments.selectors import empty_because
from apps.deployments.services import switch_request
from apps.gateway.wishes import Wish, granted
from apps.hardware.server import HardwareServer
from apps.hardware.simulated import SimulatedDriver, SimulatedRig
from apps.jobs.handlers import JobCancelled, JobFailed
from apps.jobs.models import Job, JobState
from apps.jobs.services import job_cancel
from apps.profiles.models import Profile
from apps.profiles.services import profile_archive, profile_update
from apps.rigs.models import Rig
from apps.rigs.services import hardware_failed, inventory_sync
from apps.telemetry.frames import FrameBuilder, parse
from tests.deployments.conftest import PLANNED, Begun
from tests.deployments.test_guard import serve
from tests.deployments.test_switch import run
from tests.factories.profiles import add_version, llama_cpp_profile, simulated_profile

pytestmark = pytest.mark.django_db


@pytest.fixture
def cards(settings: Any, tmp_path: Path) -> Iterator[HardwareServer]:
    settings.SAMPLER_SOCKET = tmp_path / "s.sock"
    with HardwareServer(SimulatedDriver(SimulatedRig()), settings.SAMPLER_SOCKET) as server:
        yield server


@pytest.fixture
def quad(rig: Any, cards: HardwareServer) -> Any:
    rig.gpus.all().delete()
    inventory_sync(rig, cards.inventory())
    return rig


@pytest.fixture
def degrees(quad: Any, cards: HardwareServer, monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """What each card reports from now on, by index."""
    set_to: dict[int, float] = {}

    def frame() -> Any:
        row = FrameBuilder().build(cards._driver.read())
        found = parse({**row, "at": time.time()})
        for gpu in quad.gpus.all():
            if gpu.index in set_to:
                found.gpus[gpu.uuid]["temperature_celsius"] = set_to[gpu.index]
        return found

    monkeypatch.setattr(guard, "recent", lambda _, count: [frame()] * count)
    return set_to


def hot(quad: Any, degrees: dict[int, float]) -> Deployment:
    """Coder on all four cards, of which GPU 1 has just been found too hot."""
    deployment = serve(quad, "coder", (0, 1, 2, 3), None)
    degrees[1] = 97.0
    guard.guard()
    Deployment.objects.filter(pk=deployment.pk).update(status=Status.STOPPED, desired=Desired.STOPPED)
    GpuReservation.objects.update(released_at=timezone.now())
    Job.objects.update(state=JobState.SUCCEEDED, finished_at=timezone.now())
    return deployment


def test_a_card_that_is_stopped_for_heat_is_paused_from_before_the_stop(quad: Any, degrees: dict[int, float]) -> None:
    hot(quad, degrees)
    pause = CardPause.objects.get()
    assert (pause.gpu.index, pause.why, pause.well_since) == (1, "was stopped for heat", None)
    assert Job.objects.get(kind="stop").created_at >= pause.at
    entry = AuditEntry.objects.get(action="card.pause")
    assert f"for {HOT_SECONDS} s" in str(entry.detail)


def test_a_start_on_a_hot_card_is_cancelled_once_and_its_log_says_why(quad: Any, degrees: dict[int, float]) -> None:
    deployment = serve(quad, "coder", (0, 1), None)
    job = switch_request(profile=deployment.version.profile, actor=PANEL, rig=quad)
    Job.objects.filter(pk=job.pk).update(state=JobState.RUNNING)
    Deployment.objects.update(status=Status.LOADING, job_id=job.pk)
    degrees[1] = 97.0
    guard.guard()
    guard.guard()
    assert AuditEntry.objects.filter(action="job.cancel").count() == 1
    assert AuditEntry.objects.filter(action="card.pause").count() == 1
    assert "panel stops it: GPU 1 has been at 97 °C" in job.log_lines.get().text


def test_the_next_request_does_not_load_it_on_the_same_hot_card(quad: Any, degrees: dict[int, float], bob: Any) -> None:
    deployment = hot(quad, degrees)
    profile_update(deployment.version.profile, actor=PANEL, members_may_switch=True)
    answer = granted(Wish("coder", bob.pk))
    assert answer.refused.startswith("Not switched: GPU 1 was stopped for heat at ")
    assert answer.refused.endswith("it may serve again once it has been well for 10 min, or when an operator says so.")
    assert answer.again_s == 600
    assert not Job.objects.filter(kind="switch").exists()


def test_neither_does_the_way_home_which_says_why(quad: Any, degrees: dict[int, float]) -> None:
    deployment = hot(quad, degrees)
    Deployment.objects.update(ended_at=timezone.now() - timedelta(hours=1))
    RigPolicy.objects.create(rig=quad, home_profile=deployment.version.profile, home_after_idle_seconds=60)
    ticking._refused_at.clear()
    ticking.tick(quad.slug)
    assert not Job.objects.filter(kind="switch").exists()
    assert "GPU 1 was stopped for heat at" in policy_of(quad).clock_answer


def test_the_way_home_waits_for_a_missing_card_without_using_up_its_tries(quad: Any) -> None:
    home = simulated_profile("coder", tp=4)
    gone = lies_on(quad, "others", 0, 1)
    end(gone)
    Deployment.objects.update(ended_at=timezone.now() - timedelta(hours=1))
    RigPolicy.objects.create(rig=quad, home_profile=home, home_after_idle_seconds=60)
    quad.gpus.filter(index=3).update(present=False)
    for _ in range(3):
        ticking._refused_at.clear()
        ticking.tick(quad.slug)
    assert not Job.objects.exists()
    assert policy_of(quad).clock_answer.endswith("Not switched: GPU 3 is missing.")
    quad.gpus.update(present=True)
    ticking._refused_at.clear()
    ticking.tick(quad.slug)
    assert Job.objects.get().profile_slug == "coder"


def test_a_request_for_what_lacks_a_card_is_told_so_and_makes_no_job(quad: Any, bob: Any) -> None:
    simulated_profile("coder", tp=4, members_may_switch=True)
    quad.gpus.filter(index=3).update(present=False)
    assert granted(Wish("coder", bob.pk)).refused.startswith("Not switched: GPU 3 is missing.")
    assert not Job.objects.exists()


def test_neither_does_a_restart(quad: Any, degrees: dict[int, float]) -> None:
    deployment = hot(quad, degrees)
    Deployment.objects.filter(pk=deployment.pk).update(status=Status.FAILED, desired=Desired.SERVING)
    deployment.refresh_from_db()
    decision = look_at_failed(deployment, restarts_of(deployment.version.profile))
    assert decision.act == Act.WAIT
    assert "restart 1 of 3 waits: GPU 1 was stopped for heat" in decision.why
    CardPause.objects.all().delete()
    assert look_at_failed(deployment, restarts_of(deployment.version.profile)).act == Act.RESTART


def test_it_serves_again_after_it_has_been_well_for_a_while(quad: Any, degrees: dict[int, float]) -> None:
    deployment = hot(quad, degrees)
    degrees[1] = 70.0
    guard.guard()
    pause = CardPause.objects.get()
    assert pause.well_since is not None
    assert "it may serve again after " in paused_shown(quad)[0].sentence
    degrees[1] = 96.0
    guard.guard()
    assert CardPause.objects.get().well_since is None
    degrees[1] = 70.0
    guard.guard()
    CardPause.objects.update(well_since=timezone.now() - PAUSE)
    assert paused_cards(quad)  # its time is over when somebody has looked at the card
    guard.guard()
    assert paused_cards(quad) == {}
    assert AuditEntry.objects.get(action="card.allow").actor_name == "panel"
    assert switch_request(profile=deployment.version.profile, actor=PANEL, rig=quad, asker=Asker.CLOCK).kind == "switch"


def test_a_clock_that_was_set_back_does_not_keep_it_for_ever(quad: Any) -> None:
    gpu = quad.gpus.get(index=1)
    pause_card(gpu, "was stopped for heat", "hot")
    ahead = timezone.now() + timedelta(days=1)
    CardPause.objects.update(well_since=ahead, read_at=ahead)
    pauses_look(CardPause.objects.all(), {gpu.pk: [(ahead, True), (timezone.now(), True)]})
    since = CardPause.objects.get().well_since
    assert since is not None
    assert since <= timezone.now()


@pytest.fixture
def clock() -> Iterator[time_machine.Coordinates]:
    with time_machine.travel(datetime(2026, 11, 23, 14, 0, tzinfo=UTC), tick=False) as coordinates:
        yield coordinates


def test_it_stays_paused_while_nobody_reads_the_card(
    clock: time_machine.Coordinates, quad: Any, degrees: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    hot(quad, degrees)
    degrees[1] = 70.0
    clock.shift(1)
    guard.guard()
    assert "it may serve again after 14:10, or" in paused_shown(quad)[0].sentence
    last = guard.recent("", 1)
    with monkeypatch.context() as silent:
        silent.setattr(guard, "recent", lambda *_: last)
        clock.shift(PAUSE)
        assert paused_shown(quad)[0].free_at is None
        guard.guard()
        (shown,) = paused_shown(quad)
        assert shown.free_at is None
        assert "and is not read at present; it may serve again once it has been well for 10 min, or" in shown.sentence
    guard.guard()  # it is read again, and its time begins anew
    assert "it may serve again after 14:20, or" in paused_shown(quad)[0].sentence


def test_its_time_begins_anew_where_nobody_looked_at_the_readings(
    clock: time_machine.Coordinates, quad: Any, degrees: dict[int, float]
) -> None:
    hot(quad, degrees)
    degrees[1] = 70.0
    clock.shift(1)
    guard.guard()
    clock.shift(PAUSE)
    guard.guard()
    assert CardPause.objects.get().well_since == timezone.now()


def test_a_look_that_comes_late_counts_the_readings_in_between(clock: time_machine.Coordinates, quad: Any) -> None:
    gpu = quad.gpus.get(index=1)
    pause_card(gpu, "was stopped for heat", "hot")
    began = timezone.now()

    def look(well: dict[int, bool]) -> datetime | None:
        looks = [(began + timedelta(seconds=second), well[second]) for second in sorted(well)]
        pauses_look(CardPause.objects.all(), {gpu.pk: looks})
        return CardPause.objects.get().well_since

    clock.shift(9)
    assert look(dict.fromkeys(range(10), True)) == began + timedelta(seconds=1)
    clock.shift(9)
    assert look(dict.fromkeys(range(9, 19), True)) == began + timedelta(seconds=1)
    clock.shift(9)  # it was hot in between, which the last reading does not show
    assert look(dict.fromkeys(range(18, 28), True) | {20: False}) == began + timedelta(seconds=21)
    clock.shift(9)  # and here some readings are missing
    assert look({28: True, 35: True, 36: True}) == began + timedelta(seconds=35)


def test_a_card_that_nobody_can_read_is_not_called_well(quad: Any) -> None:
    card = quad.gpus.get(index=1)
    assert guard.is_well(card, {"temperature_celsius": 60.0})
    assert not guard.is_well(card, {})
    assert not guard.is_well(card, {"temperature_celsius": 95.0})
    assert not guard.is_well(card, {"lost": 1, "temperature_celsius": 60.0})


def test_an_operators_click_asks_and_a_yes_passes_over_it(
    quad: Any, degrees: dict[int, float], client: Client, olivia: Any
) -> None:
    hot(quad, degrees)
    client.force_login(olivia)
    html = client.post("/deployments/switch/", {"profile": "coder"}).content.decode()
    assert "GPU 1 was stopped for heat at" in html
    assert "Going on passes over the card&#x27;s pause, which is recorded." in html
    about = next(iter(paused_cards(quad).values())).key
    assert f'name="about" value="{about}"' in html
    client.post("/deployments/switch/", {"profile": "coder", "confirmed": "1", "about": about})
    assert Job.objects.get(kind="switch").data["leave"]["passed"] == [about]
    assert AuditEntry.objects.filter(action="card.override").count() == 1


def test_the_api_names_the_reason_and_takes_override_of_operators(
    quad: Any, degrees: dict[int, float], client: Client, olivia: Any
) -> None:
    hot(quad, degrees)
    client.force_login(olivia)
    told = client.post("/api/v1/switch", {"profile": "coder"}, content_type="application/json")
    assert (told.status_code, told.json()["error"]["code"]) == (409, "card_paused")
    assert client.get(f"/api/v1/rigs/{quad.slug}/pauses").json()[0]["gpu"] == 1
    done = client.post("/api/v1/switch", {"profile": "coder", "override": True}, content_type="application/json")
    assert done.status_code == 202


def test_an_operator_lets_the_card_serve_again_on_the_page_of_policies(
    quad: Any, degrees: dict[int, float], client: Client, olivia: Any, bob: Any
) -> None:
    hot(quad, degrees)
    client.force_login(bob)
    html = client.get("/policies/").content.decode()
    assert "GPU 1 was stopped for heat at" in html
    assert "Let it serve again" not in html
    client.force_login(olivia)
    assert "Let it serve again" in client.get("/policies/").content.decode()
    client.post(f"/policies/cards/{CardPause.objects.get().pk}/allow/")
    assert not CardPause.objects.exists()
    assert AuditEntry.objects.get(action="card.allow").actor_name == actor_of(olivia).name


def test_what_fits_on_other_cards_goes_there_and_is_not_refused(quad: Any, degrees: dict[int, float]) -> None:
    hot(quad, degrees)
    small = simulated_profile("small", tp=1)
    cards = {g.pk: g.index for g in quad.gpus.all()}
    for _ in range(2):
        assert cards[plan(small.current, quad).replica_gpus[0][0]] != 1
    pair = simulated_profile("pair", tp=2)
    assert {cards[g] for g in plan(pair.current, quad).replica_gpus[0]} == {2, 3}
    assert switch_request(profile=pair, actor=PANEL, rig=quad, asker=Asker.CLOCK).kind == "switch"
    big = plan(simulated_profile("big", tp=4).current, quad)
    assert any(w.startswith("GPU 1 was stopped for heat at") for w in big.warnings)


def lies_on(quad: Any, slug: str, *indexes: int, slot: str = WHOLE_CARD) -> Deployment:
    deployment = serve(quad, slug, indexes, None)
    for reservation in GpuReservation.objects.filter(replica__deployment=deployment):
        own = f"{slot}{deployment.pk}" if slot == SLEEPER else slot
        GpuReservation.objects.filter(pk=reservation.pk).update(slot=own)
    if slot == SLEEPER:
        Deployment.objects.filter(pk=deployment.pk).update(status=Status.SLEEPING, desired=Desired.STOPPED)
    return deployment


def rest(quad: Any, *indexes: int) -> None:
    for index in indexes:
        pause_card(quad.gpus.get(index=index), "was stopped for heat", "hot")


def laid(quad: Any, profile: Profile) -> tuple[set[int], list[str]]:
    """On which cards it would lie, and whom it would replace."""
    found, index = plan(profile.current, quad), {g.pk: g.index for g in quad.gpus.all()}
    return {index[g] for gpus in found.replica_gpus for g in gpus}, [d.served_name for d in found.in_the_way]


def test_nothing_that_serves_is_replaced_because_another_card_rests(quad: Any) -> None:
    """GPU 0 rests and 3 is free; the bridges want 3 beside 2, where somebody serves."""
    lies_on(quad, "middle", 1, 2)
    rest(quad, 0)
    pair = simulated_profile("pair", tp=2)
    assert laid(quad, simulated_profile("small", tp=1)) == ({3}, [])
    assert laid(quad, pair) == ({0, 3}, [])
    with pytest.raises(Conflict, match="Not switched: GPU 0 was stopped for heat at"):
        switch_request(profile=pair, actor=PANEL, rig=quad, asker=Asker.CLOCK)
    lies_on(quad, "last", 3)
    assert laid(quad, Profile.objects.get(slug="small")) == ({0}, [])
    assert laid(quad, pair) == ({2, 3}, ["last", "middle"])  # somebody goes in any case: then none that rests


def wanted(deployment: Deployment) -> Deployment:
    """It failed a moment ago and should serve."""
    GpuReservation.objects.filter(replica__deployment=deployment).update(released_at=timezone.now())
    Deployment.objects.filter(pk=deployment.pk).update(
        status=Status.FAILED, desired=Desired.SERVING, ended_at=timezone.now(), status_reason="Its engine died."
    )
    deployment.refresh_from_db()
    return deployment


def test_a_restart_waits_for_the_card_rather_than_push_out_what_serves(quad: Any) -> None:
    died = wanted(lies_on(quad, "coder", 3))
    lies_on(quad, "beside", 0, 1, 2)
    rest(quad, 3)
    decision = look_at_failed(died, restarts_of(died.version.profile))
    assert decision.act == Act.WAIT
    assert "restart 1 of 3 waits: GPU 3 was stopped for heat" in decision.why
    CardPause.objects.all().delete()
    assert look_at_failed(died, restarts_of(died.version.profile)).act == Act.RESTART


def looked(deployment: Deployment) -> Decision:
    deployment.refresh_from_db()
    return look_at_failed(deployment, restarts_of(deployment.version.profile))


def a_minute_passes() -> None:
    """Longer than the backoff after one or two tries."""
    for rows, field in ((Deployment.objects.all(), "ended_at"), (Job.objects.all(), "finished_at")):
        rows.update(**{field: F(field) - timedelta(minutes=1)})


def its_restart() -> Job:
    return Job.objects.get(kind="switch", state=JobState.QUEUED)


def end(deployment: Deployment) -> None:
    Deployment.objects.filter(pk=deployment.pk).update(status=Status.STOPPED, desired=Desired.STOPPED)
    GpuReservation.objects.filter(replica__deployment=deployment).update(released_at=timezone.now())


def test_the_page_of_what_waits_for_its_restart_says_why_and_lets_an_operator_give_it_up(
    quad: Any, client: Client, olivia: Any, bob: Any
) -> None:
    died = wanted(lies_on(quad, "coder", 0, 1, 2, 3))
    url = f"/deployments/{died.pk}/"
    client.force_login(bob)
    assert "The panel starts it again.</p>" in client.get(url).content.decode()
    rest(quad, 1)
    html = client.get(url).content.decode()
    assert "The panel starts it again, but not yet: GPU 1 was stopped for heat at " in html
    assert ">Stop</button>" not in html
    client.force_login(olivia)
    assert ">Stop</button>" in client.get(url).content.decode()
    client.post(f"{url}stop/")
    assert run(Job.objects.get(kind="stop")).state == JobState.SUCCEEDED
    html = client.get(url).content.decode()
    assert "The panel starts it again" not in html
    assert ">Stop</button>" not in html


def test_every_page_says_what_comes_back_and_when_whatever_ended_after_it(quad: Any) -> None:
    died = wanted(lies_on(quad, "coder", 0, 1, 2, 3))
    assert empty_because(quad) == "Coder: Its engine died. The panel starts it again."
    quad.gpus.filter(index=3).update(present=False)
    waits = "Coder: Its engine died. The panel starts it again, but not yet: GPU 3 is missing."
    assert empty_because(quad) == waits
    tried = lies_on(quad, "others", 0)
    assert empty_because(quad) == ""
    end(tried)
    ended = Deployment.objects.filter(pk=tried.pk)
    for status in (Status.FAILED, Status.STOPPED):
        ended.update(status=status, ended_at=timezone.now())
        assert empty_because(quad) == waits
    claim(died)
    ended.update(status=Status.FAILED, status_reason="It did not load.")
    assert empty_because(quad) == (
        "Others: It did not load. Nothing is started by itself any more: switch to a model that works."
    )


@pytest.mark.parametrize("named", [("coder",), ()])
def test_the_command_line_ends_the_wish_of_what_waits_for_its_restart(
    quad: Any, named: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    died = wanted(lies_on(quad, "coder", 0, 1, 2, 3))
    with pytest.raises(SystemExit) as accepted:
        call_command("stop", *named)
    assert accepted.value.code == 0
    assert run(Job.objects.get(kind="stop")).state == JobState.SUCCEEDED
    died.refresh_from_db()
    assert (died.status, died.desired) == (Status.FAILED, Desired.STOPPED)
    capsys.readouterr()
    with pytest.raises(SystemExit) as refused:
        call_command("stop", *named)
    assert (refused.value.code, *capsys.readouterr()) == (
        (1, "", "Coder is not running.\n") if named else (0, "Nothing runs.\n", "")
    )


def test_what_waits_for_its_restart_is_given_up_once_its_profile_is_archived(quad: Any) -> None:
    died = wanted(lies_on(quad, "coder", 0, 1, 2, 3))
    profile_archive(died.version.profile, actor=PANEL)
    died = Deployment.objects.get(pk=died.pk)
    assert looked(died).act == Act.GIVE_UP
    died.refresh_from_db()
    assert died.desired == Desired.STOPPED
    assert died.status_reason == "Its engine died. Its profile was archived."


def test_a_restart_that_is_refused_when_it_begins_gives_the_wish_back_and_waits(quad: Any) -> None:
    died = wanted(lies_on(quad, "coder", 0, 1, 2, 3))
    assert looked(died).act == Act.RESTART
    rest(quad, 1)
    job = run(its_restart())
    assert job.state == JobState.FAILED
    assert job.summary.startswith("Not restarted: GPU 1 was stopped for heat at ")
    died.refresh_from_db()
    assert (died.status, died.desired) == (Status.FAILED, Desired.SERVING)
    for _ in range(5):
        decision = looked(died)
        assert (decision.act, decision.at) == (Act.WAIT, None)
        assert decision.why.startswith("restart 2 of 3 waits: GPU 1 was stopped for heat at ")
    assert Job.objects.filter(kind="switch").count() == 1
    CardPause.objects.all().delete()
    a_minute_passes()
    assert looked(died).act == Act.RESTART


def test_a_restart_waits_until_what_runs_in_its_place_is_gone(quad: Any) -> None:
    died = wanted(lies_on(quad, "coder", 0, 1, 2, 3))
    beside = lies_on(quad, "beside", 3)
    for _ in range(5):
        assert looked(died).why == "restart 1 of 3 waits: Beside runs in its place"
    assert not Job.objects.exists()
    end(beside)
    assert looked(died).act == Act.RESTART
    beside = lies_on(quad, "back", 3)  # it came back in this moment
    job = run(its_restart())
    assert job.summary.startswith("Not restarted: Back runs in its place.")
    assert looked(died).why == "restart 2 of 3 waits: Back runs in its place"
    assert Deployment.objects.get(pk=beside.pk).status == Status.READY


def test_a_restart_waits_for_a_pin_of_a_sleeper_that_it_would_end(quad: Any, alice: Any) -> None:
    greedy = simulated_profile("coder", tp=4, gpu_memory_utilization=0.98).current
    died = wanted(Deployment.objects.create(rig=quad, version=greedy, served_name="coder", status=Status.READY))
    asleep = lies_on(quad, "asleep", 2, 3, slot=SLEEPER)
    pin = Pin.objects.create(
        rig=quad,
        profile=asleep.version.profile,
        user_pk=alice.pk,
        user_name="alice",
        until=timezone.now() + timedelta(hours=2),
    )
    for _ in range(5):
        assert looked(died).why.startswith("restart 1 of 3 waits: Asleep is pinned by alice until ")
    assert not Job.objects.exists()
    pin.delete()
    assert looked(died).act == Act.RESTART


def test_an_older_version_that_sleeps_does_not_keep_the_newer_one_from_its_restart(quad: Any, begun: Begun) -> None:
    asleep = lies_on(quad, "coder", 0, 1, slot=SLEEPER)
    newer = add_version(asleep.version.profile, tp=2, replicas=1, model=asleep.version.model)
    died = Deployment.objects.create(rig=quad, version=newer, served_name="coder", status=Status.READY)
    assert looked(wanted(died)).act == Act.RESTART
    assert PLANNED in begun(its_restart()).summary


def event(deployment: Deployment, before: Status, after: Status) -> None:
    DeploymentEvent.objects.create(deployment=deployment, from_status=before, to_status=after)


def came_up(deployment: Deployment) -> None:
    event(deployment, Status.LOADING, Status.READY)


def test_what_somebody_asked_for_since_in_its_place_ends_the_wish_and_says_so(quad: Any, olivia: Any) -> None:
    died = wanted(lies_on(quad, "coder", 0, 1, 2, 3))
    others = lies_on(quad, "others", 3)
    came_up(others)
    event(died, Status.READY, Status.FAILED)
    job = Job.objects.create(
        kind="switch", title="Switch to Others", rig_name=quad.slug, queue="q", user_name="olivia",
        state=JobState.SUCCEEDED, finished_at=timezone.now(), deployment_id=others.pk, data={"restart_of": 1},
    )  # fmt: skip
    assert looked(died).act == Act.WAIT  # it was there before
    came_up(others)
    assert looked(died).act == Act.WAIT  # nobody asked for it: it was started again
    # The clock has been set back in between.
    Job.objects.filter(pk=job.pk).update(data={}, finished_at=timezone.now() - timedelta(hours=1))
    assert looked(died).act == Act.GIVE_UP
    died.refresh_from_db()
    assert died.desired == Desired.STOPPED
    assert died.status_reason == "Its engine died. Others was asked for since and runs in its place."


def test_what_was_asked_for_since_and_was_started_again_itself_ends_the_wish_too(quad: Any) -> None:
    died = wanted(lies_on(quad, "coder", 0, 1, 2, 3))
    event(died, Status.READY, Status.FAILED)
    asked = lies_on(quad, "others", 3)
    again = Deployment.objects.create(rig=quad, version=asked.version, served_name="others", status=Status.READY)
    for deployment, data in ((asked, {}), (again, {"restart_of": asked.pk})):
        came_up(deployment)
        Job.objects.create(
            kind="switch", title="Switch to Others", rig_name=quad.slug, queue="q", user_name="olivia",
            state=JobState.SUCCEEDED, finished_at=timezone.now(), deployment_id=deployment.pk, data=data,
        )  # fmt: skip
    Deployment.objects.filter(pk=asked.pk).update(status=Status.FAILED, desired=Desired.STOPPED)
    GpuReservation.objects.filter(replica__deployment=asked).update(replica=again.replicas.create(index=0, port=1))
    assert looked(died).act == Act.GIVE_UP
    died.refresh_from_db()
    assert (died.desired, again.status) == (Desired.STOPPED, Status.READY)


def test_a_restart_waits_for_a_card_that_is_missing_and_for_cards_that_cannot_be_read(quad: Any) -> None:
    """As after a power cut or an upgrade of the driver: nobody is there for an hour, then all is well again."""
    died = wanted(lies_on(quad, "coder", 0, 1, 2, 3))
    quad.gpus.filter(index__in=(1, 3)).update(present=False)
    for _ in range(5):
        decision = looked(died)
        assert (decision.act, decision.at) == (Act.WAIT, None)
        assert decision.why == "restart 1 of 3 waits: GPUs 1 and 3 are missing"
    quad.gpus.update(present=True)
    hardware_failed(quad, "nvml", "Driver/library version mismatch. Restart the machine.")
    assert looked(died).why == "restart 1 of 3 waits: the cards cannot be read"
    assert coming_back(died) == "The panel starts it again, but not yet: the cards cannot be read."
    assert not Job.objects.exists()
    Rig.objects.update(hardware_error="")
    assert looked(died).act == Act.RESTART


def test_while_the_cards_cannot_be_read_nothing_is_switched_to_them_and_the_wish_stays(quad: Any, begun: Begun) -> None:
    """The way home and the calendar try all night; what they would start there would die, and end the wish."""
    died = wanted(lies_on(quad, "coder", 0, 1))
    beside = lies_on(quad, "beside", 2, 3)
    hardware_failed(quad, "nvml", "Driver/library version mismatch. Restart the machine.")
    for profile in (died.version.profile, simulated_profile("whole", tp=4)):
        with pytest.raises(Conflict, match="Not switched: the cards cannot be read"):
            switch_request(profile=profile, actor=PANEL, rig=quad, asker=Asker.CLOCK)
        job = begun(switch_request(profile=profile, actor=PANEL, rig=quad))
        assert job.summary == (
            f"{profile} cannot start on {quad}: The cards cannot be read: "
            "Driver/library version mismatch. Restart the machine. Nothing was stopped."
        )
    beside.refresh_from_db()
    assert beside.status == Status.READY
    assert looked(died).why == "restart 1 of 3 waits: the cards cannot be read"
    assert not any("cards" in problem for problem in plan(llama_cpp_profile("gemma").current, quad).problems)
    Rig.objects.update(hardware_error="")
    assert looked(died).act == Act.RESTART


def test_what_is_asked_for_in_place_of_what_waits_for_a_card_ends_its_wish(quad: Any) -> None:
    """With the card it would have run there, and the switch would have ended it."""
    died = wanted(lies_on(quad, "coder", 0, 1, 2, 3))
    quad.gpus.filter(index=3).update(present=False)
    asked = lies_on(quad, "others", 0, 1)
    assert give_up_for(asked, alone=False) == ["Coder"]
    end(asked)
    quad.gpus.update(present=True)
    assert looked(died).act == Act.LEAVE
    assert died.status_reason == "Its engine died. Others was asked for since and runs in its place."


def test_what_is_asked_for_beside_what_waits_for_a_card_leaves_it_its_wish(quad: Any) -> None:
    died = wanted(lies_on(quad, "coder", 0, 1, 2))
    quad.gpus.filter(index__in=(0, 1)).update(present=False)
    on_cpu = Deployment.objects.create(rig=quad, version=llama_cpp_profile("gemma").current, served_name="gemma")
    for asked in (on_cpu, lies_on(quad, "others", 3)):
        assert give_up_for(asked, alone=False) == []
    assert give_up_for(lies_on(quad, "more", 2), alone=False) == ["Coder"]
    died.refresh_from_db()
    assert died.desired == Desired.STOPPED


def test_a_restart_that_fits_without_the_missing_card_does_not_wait_for_it(quad: Any) -> None:
    died = wanted(lies_on(quad, "coder", 2, 3))
    quad.gpus.filter(index=3).update(present=False)
    assert looked(died).act == Act.RESTART


def test_what_needs_no_card_is_restarted_while_these_cannot_be_read(quad: Any) -> None:
    on_cpu = llama_cpp_profile("gemma").current
    died = wanted(Deployment.objects.create(rig=quad, version=on_cpu, served_name="gemma", status=Status.READY))
    hardware_failed(quad, "nvml", "Driver/library version mismatch. Restart the machine.")
    assert looked(died).act == Act.RESTART


def test_a_card_that_another_replaced_while_a_switch_was_under_way_is_named_as_gone(quad: Any) -> None:
    version = simulated_profile("coder", tp=2).current
    before = plan(version, quad)
    assert before.replica_gpus == (tuple(quad.gpus.get(index=index).pk for index in (0, 1)),)
    quad.gpus.filter(index=1).update(present=False, retired_at=timezone.now())
    assert placed(plan(version, quad), before.replica_gpus).problems == (
        "A card on which it was to lie is not in this rig any more.",
    )


def test_a_restart_that_cannot_be_planned_is_tried_again_within_its_budget(quad: Any) -> None:
    died = wanted(lies_on(quad, "coder", 0, 1, 2, 3))
    quad.gpus.filter(index=3).update(present=False, retired_at=timezone.now())
    for tries in (1, 2, 3):
        assert looked(died).act == Act.RESTART
        assert "cannot start on" in run(its_restart()).summary
        if tries < 3:
            decision = looked(died)
            assert decision.why.startswith(f"restart {tries + 1} of 3 in ")
            assert decision.at is not None
            a_minute_passes()
    assert looked(died).act == Act.GIVE_UP
    died.refresh_from_db()
    assert died.status_reason == "Its engine died. It was restarted 3 times within 10 min and failed each time."


def test_a_restart_that_breaks_before_it_made_anything_keeps_the_wish(
    quad: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    died = wanted(lies_on(quad, "coder", 0, 1))
    assert looked(died).act == Act.RESTART
    monkeypatch.setattr(switch_forward, "ask_again", lambda *_: 1 / 0)
    assert run(its_restart()).state == JobState.ERRORED
    died.refresh_from_db()
    assert died.desired == Desired.SERVING


def test_a_restart_that_somebody_cancels_or_supersedes_does_not_give_the_wish_back(
    quad: Any, olivia: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    died = wanted(lies_on(quad, "coder", 0, 1))
    assert looked(died).act == Act.RESTART
    cancelled = its_restart()

    def cancel(*_: Any) -> None:
        job_cancel(cancelled, actor=actor_of(olivia))
        raise JobCancelled

    monkeypatch.setattr(switch_forward, "ask_again", cancel)
    assert run(cancelled).state == JobState.CANCELLED
    died.refresh_from_db()
    assert died.desired == Desired.STOPPED
    Deployment.objects.filter(pk=died.pk).update(desired=Desired.SERVING)
    a_minute_passes()
    assert looked(died).act == Act.RESTART
    superseded = its_restart()

    def supersede(*_: Any) -> None:
        switch_request(profile=simulated_profile("other", tp=1), actor=actor_of(olivia), rig=quad)
        raise JobFailed("It was refused in this moment.")

    monkeypatch.setattr(switch_forward, "ask_again", supersede)
    assert run(superseded).state == JobState.FAILED
    died.refresh_from_db()
    assert died.desired == Desired.STOPPED  # who superseded it owes the return


def test_one_that_sleeps_on_the_other_cards_spares_what_serves(quad: Any) -> None:
    lies_on(quad, "awake", 0, 1)
    lies_on(quad, "asleep", 2, 3, slot=SLEEPER)
    assert laid(quad, simulated_profile("pair", tp=2)) == ({2, 3}, [])
    rest(quad, 2)
    assert laid(quad, simulated_profile("small", tp=1)) == ({3}, [])


def test_a_queued_switch_asks_again_when_it_begins(quad: Any, degrees: dict[int, float], bob: Any) -> None:
    profile = simulated_profile("coder", tp=4)
    job = switch_request(profile=profile, actor=actor_of(bob), rig=quad, asker=Asker.MEMBER)
    pause_card(quad.gpus.get(index=1), "was stopped for heat", "hot")
    run(job)
    assert job.state == JobState.FAILED
    assert job.summary.startswith("Not switched: GPU 1 was stopped for heat at ")


def test_an_operators_queued_switch_that_passed_over_the_pause_begins(quad: Any, olivia: Any, begun: Begun) -> None:
    pause_card(quad.gpus.get(index=1), "was stopped for heat", "hot")
    profile = simulated_profile("coder", tp=4)
    with pytest.raises(Conflict):
        switch_request(profile=profile, actor=actor_of(olivia), rig=quad)
    job = switch_request(profile=profile, actor=actor_of(olivia), rig=quad, override=True)
    assert PLANNED in begun(job).summary
