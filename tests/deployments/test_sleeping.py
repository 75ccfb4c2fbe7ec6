"""Models that sleep instead of stopping, with real processes of the simulated engine."""

from __future__ import annotations

import signal
from collections.abc import Callable
from datetime import timedelta
from typing import Any, cast

import pytest
from django.core.management import call_command
from django.test import Client
from django.utils import timezone

from apps.common.actors import PANEL, actor_of
from apps.common.errors import Conflict
from apps.deployments import launching, sleeping, switch_back, switch_forward, switch_sleep
from apps.deployments.decide import Act
from apps.deployments.engine_http import ask
from apps.deployments.memory import card_use
from apps.deployments.models import (
    WHOLE_CARD,
    CardPause,
    Deployment,
    GpuReservation,
    Replica,
    RestartPolicy,
    Route,
    Status,
)
from apps.deployments.pauses import pause_card
from apps.deployments.policies.decide import Asker
from apps.deployments.policies.models import Pin, RigPolicy
from apps.deployments.reconcile import reconcile
from apps.deployments.restarting import look_at_failed, policy_of
from apps.deployments.routes import route_table
from apps.deployments.services import stop_request, switch_request
from apps.jobs.handlers import JobFailed, LeaseLost
from apps.jobs.models import LIVE_STATES, Job, JobState, StepState
from apps.jobs.services import job_cancel
from apps.profiles.models import Profile
from apps.rigs.models import Gpu
from apps.runners.processes import all_processes, send_signal
from apps.runners.protocol import ProcessState
from tests.deployments.test_switch import engine_pids, eventually, in_thread, loading, run
from tests.factories.profiles import add_version, catalogue_model, simulated_profile

GIB = 1 << 30


def sleeper(slug: str, **options: Any) -> Profile:
    return simulated_profile(slug, **{"enable_sleep_mode": True, "gpu_memory_utilization": 0.8, **options})


@pytest.fixture
def switch(sim_rig: Any, alice: Any) -> Any:
    def to(profile: Profile, **more: Any) -> Job:
        job = run(switch_request(profile=profile, actor=actor_of(alice), **more))
        assert job.state == JobState.SUCCEEDED, job.result
        return job

    return to


def deployment(slug: str) -> Deployment:
    return Deployment.objects.filter(version__profile__slug=slug).latest("pk")


def status(slug: str) -> str:
    return deployment(slug).status


def most_in_use() -> int:
    return max(card_use(set(Gpu.objects.values_list("uuid", flat=True))).values())


def test_two_sleepers_change_places_without_starting_again(switch: Any) -> None:
    day, night = sleeper("day"), sleeper("night")
    switch(day)
    first = deployment("day")
    assert first.sleep is not None
    assert first.sleep["first_seconds"] >= 0
    assert 1.0 * GIB < max(first.sleep["in_use_asleep_bytes"].values()) < 1.5 * GIB
    went = switch(night)
    assert "Day: asleep after" in went.steps.get(name="stop").detail
    assert (status("day"), status("night")) == (Status.SLEEPING, Status.READY)
    back = switch(day)
    assert "awake after" in back.steps.get(name="start").detail
    assert back.steps.get(name="ready").detail == "nothing to load"
    assert Deployment.objects.count() == 2  # the same two processes all along
    assert (status("day"), status("night")) == (Status.READY, Status.SLEEPING)
    slots = {
        (r.replica.deployment_id, r.slot)
        for r in GpuReservation.objects.filter(released_at=None).select_related("replica")
    }
    assert slots == {(first.pk, "whole"), (deployment("night").pk, f"sleep-{deployment('night').pk}")}
    switch(night)
    assert (status("day"), status("night")) == (Status.SLEEPING, Status.READY)


def test_nothing_is_routed_to_a_sleeper(switch: Any) -> None:
    day, night = sleeper("day"), sleeper("night")
    switch(day)
    switch(night)
    assert [entry.served_name for entry in route_table().routes if entry.targets] == ["night"]
    assert not Route.objects.filter(served_name="day").exists()
    (replica,) = deployment("day").replicas.all()
    assert ask(replica, "GET", "/health")[0] == 200  # which is why nobody may ask its health whether it serves
    assert ask(replica, "POST", "/v1/completions", {"prompt": "x", "max_tokens": 1}, limit_seconds=0.5)[0] is None


def test_a_profile_that_does_not_ask_for_it_is_stopped(switch: Any) -> None:
    switch(simulated_profile("plain", gpu_memory_utilization=0.8))
    switch(sleeper("night"))
    assert status("plain") == Status.STOPPED


def test_an_engine_that_wants_the_whole_card_ends_the_sleeper_on_it(switch: Any) -> None:
    switch(sleeper("day"))
    switch(simulated_profile("greedy", gpu_memory_utilization=0.96))
    assert status("day") == Status.STOPPED


def test_only_as_many_sleep_as_the_next_engine_leaves_room_for(switch: Any) -> None:
    """0.8 of 23.55 GiB leaves 4.7: three sleepers of 1.1 GiB and a context of 0.6."""
    names = ["one", "two", "three", "four", "five"]
    for name in names:
        switch(sleeper(name))
    assert [status(name) for name in names] == ["stopped", "sleeping", "sleeping", "sleeping", "ready"]


def pinned(slug: str, by: Any) -> Pin:
    until = timezone.now() + timedelta(hours=1)
    profile = Profile.objects.get(slug=slug)
    return Pin.objects.create(
        rig=Deployment.objects.latest("pk").rig,
        profile=profile,
        until=until,
        user_pk=by.pk,
        user_name=actor_of(by).name,
    )


def test_a_pinned_sleeper_is_not_ended_to_make_room(switch: Any, alice: Any, olivia: Any) -> None:
    switch(sleeper("day"))
    switch(sleeper("night"))
    pin = pinned("day", alice)
    greedy = simulated_profile("greedy", gpu_memory_utilization=0.96)
    with pytest.raises(Conflict, match="Not switched: Day is pinned by alice"):
        switch_request(profile=greedy, actor=actor_of(olivia))
    job = switch_request(profile=greedy, actor=actor_of(olivia), override=True)
    Pin.objects.filter(pk=pin.pk).delete()
    pinned("day", alice)  # another one, made while the switch waited
    run(job)
    assert job.state == JobState.FAILED
    assert job.summary.startswith("Not switched: Day is pinned by alice")
    assert (status("day"), status("night")) == (Status.SLEEPING, Status.READY)
    run(switch_request(profile=greedy, actor=actor_of(olivia), override=True))
    assert status("day") == Status.STOPPED


def test_a_pin_that_comes_while_the_switch_drains_holds_too(
    switch: Any, alice: Any, olivia: Any, monkeypatch: Any
) -> None:
    switch(sleeper("day"))
    switch(sleeper("night"))
    job = switch_request(profile=simulated_profile("greedy", gpu_memory_utilization=0.96), actor=actor_of(olivia))
    really = switch_forward.drain

    def meanwhile(*args: Any, **more: Any) -> str:
        pinned("day", alice)
        return really(*args, **more)

    monkeypatch.setattr(switch_forward, "drain", meanwhile)
    run(job)
    assert job.summary.startswith("Not switched: Day is pinned by alice"), job.summary
    assert (status("day"), status("night")) == (Status.SLEEPING, Status.READY)


def test_what_serves_is_stopped_before_a_pinned_sleeper_ends(switch: Any, alice: Any, olivia: Any) -> None:
    """Room for three sleepers, all pinned: the fourth, which serves, is not laid down."""
    for name in ("one", "two", "three", "four"):
        switch(sleeper(name))
    for name in ("one", "two", "three"):
        pinned(name, alice)
    run(switch_request(profile=sleeper("five"), actor=actor_of(olivia)))
    assert [status(n) for n in ("one", "two", "three", "four", "five")] == [
        *["sleeping"] * 3,
        "stopped",
        "ready",
    ]


def test_what_is_pinned_is_renewed_while_its_older_version_sleeps(switch: Any, alice: Any, olivia: Any) -> None:
    """A pin binds no renewal, and the sleeper that would leave no room is the one that this switch ends anyway."""
    switch(sleeper("day"))
    switch(sleeper("night"))
    pinned("day", alice)
    add_day(gpu_memory_utilization=0.96)
    job = run(switch_request(profile=Profile.objects.get(slug="day"), actor=actor_of(olivia)))
    assert job.state == JobState.SUCCEEDED, job.result
    assert job.steps.get(name="stop").detail.startswith("Day: ")
    assert {d.status for d in Deployment.objects.exclude(pk=deployment("day").pk)} == {Status.STOPPED}


def test_an_older_version_that_sleeps_takes_no_place_from_what_is_laid_down(switch: Any, olivia: Any) -> None:
    """0.9 of a card leaves room for one sleeper: the older version goes, so what served may sleep."""
    day, night = sleeper("day"), sleeper("night")
    for profile in (night, day, night):  # what serves was started before what sleeps
        switch(profile)
    pinned("day", olivia)
    add_day(gpu_memory_utilization=0.9)
    switch(day)
    assert (status("day"), status("night")) == (Status.READY, Status.SLEEPING)
    assert Deployment.objects.filter(status=Status.STOPPED).count() == 1


def add_day(**options: Any) -> None:
    profile = Profile.objects.get(slug="day")
    add_version(profile, tp=4, replicas=1, model=catalogue_model("day"), enable_sleep_mode=True, **options)


def test_a_pinned_sleeper_in_the_way_of_a_cold_start_is_told_before_requests_are_held(
    switch: Any, alice: Any, olivia: Any
) -> None:
    """It should have been woken beside the pinned one; it had died, and a cold start wants the whole card."""
    for profile in (sleeper("greedy", gpu_memory_utilization=0.96), sleeper("day"), sleeper("night")):
        switch(profile)
    pinned("day", alice)
    launching.stop_processes(deployment("greedy"))
    job = run(switch_request(profile=Profile.objects.get(slug="greedy"), actor=actor_of(olivia)))
    assert job.summary.startswith("Not switched: Day is pinned by alice"), job.summary
    assert job.steps.get(name="hold").state == StepState.SKIPPED
    assert (status("day"), status("night")) == (Status.SLEEPING, Status.READY)


def test_the_plan_says_what_waking_replaces_and_who_ends_for_room(
    switch: Any, client: Client, olivia: Any, capsys: Any, settings: Any
) -> None:
    client.force_login(olivia)
    switch(sleeper("day"))
    switch(sleeper("night"))
    told = client.get("/api/v1/profiles/day/plan").json()
    assert (told["wakes"], told["replaces"]) == (deployment("day").pk, ["night"])
    page = client.get("/profiles/day/").content.decode()
    assert "a switch wakes it on its own cards" in page
    assert "It replaces Night." in page
    simulated_profile("greedy", gpu_memory_utilization=0.96)
    told = client.get("/api/v1/profiles/greedy/plan").json()
    assert (told["wakes"], told["replaces"], told["stops_sleepers"]) == (None, ["night"], ["day"])
    assert "To make room it stops Day" in client.get("/profiles/greedy/").content.decode()
    with pytest.raises(SystemExit):
        call_command("plan", "day")
    assert "replaces: night" in capsys.readouterr().out


def test_a_stop_while_an_idle_model_is_laid_to_rest_is_a_stop(switch: Any, sim_rig: Any, alice: Any) -> None:
    switch(sleeper("day"))
    RigPolicy.objects.create(rig=sim_rig, minimum_residency_seconds=0)
    resting = stop_request(deployment=deployment("day"), actor=PANEL, reason="idle", asker=Asker.CLOCK, rest=True)
    again = stop_request(deployment=deployment("day"), actor=PANEL, reason="idle", asker=Asker.CLOCK, rest=True)
    assert again.pk == resting.pk
    job = stop_request(deployment=deployment("day"), actor=actor_of(alice))
    assert job.pk != resting.pk
    assert job.title == "Stop Day"
    resting.refresh_from_db()
    assert (resting.state, resting.superseded_by_id) == (JobState.CANCELLED, job.pk)
    assert stop_request(deployment=deployment("day"), actor=PANEL, asker=Asker.CLOCK, rest=True).pk == job.pk
    run(job)
    assert (job.summary, status("day")) == ("Day was stopped.", Status.STOPPED)


def test_waking_keeps_what_a_restart_owes(switch: Any, sim_rig: Any) -> None:
    """What died sleeps under the same version elsewhere: the restart wakes that, and still owes the return."""
    day, night = sleeper("day"), sleeper("night")
    switch(day)
    switch(night)
    job = Job.objects.create(
        kind="switch", title="Restart Day", rig_name=sim_rig.slug, queue="q", user_name="panel",
        params={"version_id": day.current.pk, "exclusive": False}, data={"fallback": [4711], "stopped_old": True},
    )  # fmt: skip
    switch_sleep.plan_to_wake(cast(Any, Context(job)), deployment("day"), exclusive=False)
    assert job.data["fallback"] == [4711, night.current.pk]


class Context:
    """As much of a job's context as a step that plans needs."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def save_data(self, **values: Any) -> None:
        self.job.data = {**self.job.data, **values}

    def set_deployment(self, pk: int) -> None:
        self.job.deployment_id = pk


def test_one_that_does_not_fall_asleep_serves_and_is_switched_cold(switch: Any) -> None:
    switch(sleeper("day", fail_sleep=True))
    assert "cuMem could not be released" in (deployment("day").sleep or {})["problem"]
    switch(sleeper("night"))
    assert status("day") == Status.STOPPED


def test_a_host_without_room_for_the_weights_lets_nothing_sleep(switch: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(sleeping, "host_memory_problem", lambda _: "its sleep needs 70 GiB")
    switch(sleeper("day"))
    assert (deployment("day").sleep or {})["problem"] == "its sleep needs 70 GiB"
    switch(sleeper("night"))
    assert status("day") == Status.STOPPED


def test_a_sleeper_that_died_is_started_cold(switch: Any) -> None:
    day, night = sleeper("day"), sleeper("night")
    switch(day)
    switch(night)
    launching.stop_processes(deployment("day"))
    reconcile()
    assert status("day") == Status.FAILED
    switch(day)
    assert Deployment.objects.filter(version__profile=day).count() == 2
    assert status("day") == Status.READY


def test_a_sleeper_that_is_frozen_is_found_out_and_ended(switch: Any) -> None:
    """Nothing is asked of it until it is woken; by then a switch would wait for it in vain."""
    day = sleeper("day")
    RestartPolicy.objects.create(
        profile=day, probe_every_seconds=0.05, probe_limit_seconds=0.5, probe_failures=2, restarts=3
    )
    switch(day)
    switch(sleeper("night"))
    for _ in range(3):
        reconcile()
    assert status("day") == Status.SLEEPING  # asked, and it answered
    frozen = {p for r in deployment("day").replicas.all() for p in launching.observe(r).pids}
    everybody = all_processes()
    for pid in frozen:
        send_signal(everybody[pid], signal.SIGSTOP)

    def noticed() -> bool:
        reconcile()
        return status("day") == Status.FAILED

    eventually(noticed, "the frozen sleeper is given up")
    assert "hangs: 2 test requests in a row got no answer" in deployment("day").status_reason
    assert not frozen & engine_pids()
    reconcile()
    assert not Job.objects.filter(state__in=LIVE_STATES).exists()  # it was to sleep, so nothing is started again
    assert status("night") == Status.READY


def test_a_sleeper_that_does_not_wake_is_started_cold_in_the_same_switch(switch: Any, monkeypatch: Any) -> None:
    day, night = sleeper("day"), sleeper("night")
    switch(day)
    switch(night)
    old = deployment("day")
    really = sleeping.wake_up

    def fails_for_the_old_one(which: Deployment) -> str:
        if which.pk == old.pk:
            raise sleeping.SleepFailed("HTTP 500: out of memory")
        return really(which)

    monkeypatch.setattr(sleeping, "wake_up", fails_for_the_old_one)
    job = switch(day)
    assert any("did not wake (HTTP 500" in line.text for line in job.log_lines.all())
    old.refresh_from_db()
    assert (old.status, status("day"), status("night")) == (Status.STOPPED, Status.READY, Status.SLEEPING)


def dies(which: Deployment) -> None:
    """Its engine ends, and the reconciler is the first who knows."""
    launching.stop_processes(which)
    reconcile()
    which.refresh_from_db()
    assert which.status == Status.FAILED


def test_a_sleeper_that_dies_while_the_switch_to_it_drains_is_started_cold(
    switch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    day, night = sleeper("day"), sleeper("night")
    switch(day)
    switch(night)
    old = deployment("day")
    really = switch_forward.drain

    def meanwhile(*args: Any, **more: Any) -> str:
        dies(old)
        return really(*args, **more)

    monkeypatch.setattr(switch_forward, "drain", meanwhile)
    job = switch(day)
    assert any("did not wake (it has ended meanwhile)" in line.text for line in job.log_lines.all())
    old.refresh_from_db()
    assert (old.status, old.desired) == (Status.FAILED, "stopped")
    assert (status("day"), status("night")) == (Status.READY, Status.SLEEPING)


def test_a_sleeper_that_is_found_dead_while_it_is_woken_is_started_cold(
    switch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    day, night = sleeper("day"), sleeper("night")
    switch(day)
    switch(night)
    old = deployment("day")

    def wake_up(_: Deployment) -> str:
        dies(deployment("day"))
        raise sleeping.SleepFailed("connection refused")

    monkeypatch.setattr(sleeping, "wake_up", wake_up)
    switch(day)
    old.refresh_from_db()
    assert (old.status, old.desired) == (Status.FAILED, "stopped")
    assert (status("day"), status("night")) == (Status.READY, Status.SLEEPING)


def test_one_that_was_woken_and_dies_before_it_answers_is_not_wanted_afterwards(
    switch: Any, alice: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    day = sleeper("day")
    switch(day)
    switch(sleeper("night"))
    old = deployment("day")
    really = switch_forward.smoke

    def die_first(which: Deployment, *args: Any) -> str:
        dies(deployment("day"))
        return really(which, *args)

    monkeypatch.setattr(switch_forward, "smoke", die_first)
    job = run(switch_request(profile=day, actor=actor_of(alice)))
    assert job.state == JobState.FAILED
    assert job.summary.endswith("Brought back Night.")
    old.refresh_from_db()
    assert (old.status, old.desired) == (Status.FAILED, "stopped")
    assert status("night") == Status.READY


def before_it_stopped(patch: pytest.MonkeyPatch, kill: Callable[..., Any]) -> None:
    patch.setattr(launching, "stop_processes", kill)


def after_it_stopped(patch: pytest.MonkeyPatch, kill: Callable[..., Any]) -> None:
    patch.setattr(Deployment.objects, "create", kill)


@pytest.mark.parametrize("when", [before_it_stopped, after_it_stopped])
def test_a_worker_killed_while_it_ends_a_sleeper_that_did_not_wake_is_carried_on(
    switch: Any, alice: Any, monkeypatch: pytest.MonkeyPatch, when: Callable[..., None]
) -> None:
    day = sleeper("day", fail_wake=True)
    monkeypatch.setattr(sleeping, "first_sleep", lambda *_: None)  # where it would be found out
    switch(day)
    switch(sleeper("night"))
    old = deployment("day")

    def kill(*_: Any, **__: Any) -> None:
        raise LeaseLost

    job = switch_request(profile=day, actor=actor_of(alice))
    with monkeypatch.context() as patch:
        when(patch, kill)
        assert run(job).state == JobState.RUNNING
    Job.objects.filter(pk=job.pk).update(lease_owner="elsewhere:1:tx-1:y", lease_until=timezone.now())
    assert run(job).state == JobState.SUCCEEDED, job.result
    old.refresh_from_db()
    assert (old.status, old.desired) == (Status.STOPPED, "stopped")
    assert deployment("day").pk != old.pk
    assert status("day") == Status.READY


def test_a_new_model_that_fails_wakes_what_it_had_put_to_sleep(switch: Any, sim_rig: Any, alice: Any) -> None:
    switch(sleeper("day"))
    before = deployment("day")
    job = run(switch_request(profile=sleeper("broken", fail_phase="weights"), actor=actor_of(alice)))
    assert job.state == JobState.FAILED
    assert "Brought back Day." in job.summary
    before.refresh_from_db()
    assert before.status == Status.READY
    assert Deployment.objects.filter(version__profile__slug="day").count() == 1
    assert [entry.served_name for entry in route_table().routes if entry.targets] == ["day"]


def test_what_does_not_wake_to_come_back_is_started_cold_and_nobody_wants_the_sleeper_any_more(
    switch: Any, sim_rig: Any, alice: Any, monkeypatch: Any
) -> None:
    switch(sleeper("day"))
    before = deployment("day")
    really = sleeping.wake_up

    def wakes_to_nothing(which: Deployment) -> str:
        really(which)
        raise sleeping.SleepFailed("HTTP 500: out of memory")

    monkeypatch.setattr(sleeping, "wake_up", wakes_to_nothing)
    job = run(switch_request(profile=sleeper("broken", fail_phase="weights"), actor=actor_of(alice)))
    assert "Brought back Day." in job.summary
    before.refresh_from_db()
    assert (before.status, before.desired) == (Status.STOPPED, "stopped")
    assert (deployment("day").status, deployment("day").desired) == (Status.READY, "serving")


def test_a_way_back_that_is_cancelled_while_what_it_woke_is_found_dead_ends_in_order(
    switch: Any, alice: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    switch(sleeper("day"))
    job = switch_request(profile=sleeper("broken", fail_phase="weights"), actor=actor_of(alice))

    def die_first(_: Deployment, pause: Callable[[float], None]) -> str:
        dies(deployment("day"))
        job_cancel(Job.objects.get(pk=job.pk), actor=actor_of(alice))
        pause(60)
        return "not cancelled"

    monkeypatch.setattr(switch_back, "smoke", die_first)
    assert run(job).state == JobState.FAILED
    assert "cancelled by alice" in job.summary
    assert (deployment("day").status, deployment("day").desired) == (Status.FAILED, "stopped")


@pytest.fixture
def heat_stops(sim_rig: Any, alice: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A switch to another profile, whose start fails since a card of it has become too hot."""

    def to(profile: Profile, index: int, then: Callable[[], None] = lambda: None) -> Job:
        def start(*_: Any) -> str:
            pause_card(sim_rig.gpus.get(index=index), "was stopped for heat", "hot")
            then()
            raise JobFailed("It was stopped for heat.")

        with monkeypatch.context() as patch:
            patch.setattr(switch_forward, "start_deployment", start)
            return run(switch_request(profile=profile, actor=actor_of(alice)))

    return to


def test_what_slept_for_a_switch_that_failed_is_woken_once_its_card_may_serve(switch: Any, heat_stops: Any) -> None:
    day = sleeper("day")
    switch(sleeper("night"))
    switch(day)
    before = deployment("day")
    job = heat_stops(sleeper("other"), 1)
    assert "could not be brought back either: Not brought back: GPU 1 was stopped for heat at " in job.summary
    assert (status("night"), status("other")) == (Status.SLEEPING, Status.FAILED)
    before.refresh_from_db()
    assert before.status == Status.SLEEPING
    for _ in range(3):
        reconcile()
    assert not Job.objects.filter(state__in=LIVE_STATES).exists()
    engines = engine_pids()
    CardPause.objects.all().delete()
    reconcile()
    job = run(Job.objects.get(state__in=LIVE_STATES))
    assert (job.state, job.user_name, job.deployment_id) == (JobState.SUCCEEDED, "panel", before.pk)
    before.refresh_from_db()
    assert (before.status, before.desired) == (Status.READY, "serving")
    assert engine_pids() == engines  # woken, not started
    for _ in range(3):
        reconcile()
    assert not Job.objects.filter(state__in=LIVE_STATES).exists()
    assert status("night") == Status.SLEEPING  # as it was meant to


def test_it_is_started_cold_where_the_guard_has_ended_it_meanwhile(switch: Any, heat_stops: Any) -> None:
    switch(sleeper("day"))
    before = deployment("day")
    heat_stops(sleeper("other"), 1)
    run(stop_request(deployment=before, actor=PANEL, reason="GPU 1 has been at 97 °C", override=True))
    CardPause.objects.all().delete()
    reconcile()
    assert run(Job.objects.get(state__in=LIVE_STATES)).state == JobState.SUCCEEDED
    before.refresh_from_db()
    assert (before.status, status("day")) == (Status.STOPPED, Status.READY)


def test_whoever_stops_the_sleeper_does_not_want_it_to_come_back(switch: Any, heat_stops: Any, alice: Any) -> None:
    switch(sleeper("day"))
    before = deployment("day")
    heat_stops(sleeper("other"), 1)
    assert deployment("day").comes_back
    run(stop_request(deployment=before, actor=actor_of(alice)))
    CardPause.objects.all().delete()
    reconcile()
    assert not Job.objects.filter(state__in=LIVE_STATES).exists()


def test_where_other_cards_are_free_it_comes_back_at_once_on_them(switch: Any, heat_stops: Any) -> None:
    switch(sleeper("day", tp=2))
    before = deployment("day")
    job = heat_stops(sleeper("other"), 1)
    assert "Brought back Day." in job.summary
    before.refresh_from_db()
    assert (before.status, status("day")) == (Status.STOPPED, Status.READY)
    held = GpuReservation.objects.filter(replica__deployment=deployment("day"), released_at=None)
    assert sorted(held.values_list("gpu__index", flat=True)) == [2, 3]


def test_what_has_its_place_taken_meanwhile_waits_to_come_back(switch: Any, sim_rig: Any, heat_stops: Any) -> None:
    """Card 3 is taken while the switch has its turn: nobody is pushed out, and the wish stays."""
    switch(simulated_profile("day"))

    def take() -> None:
        beside = simulated_profile("beside", tp=1).current
        CardPause.objects.all().delete()
        taker = Deployment.objects.create(rig=sim_rig, version=beside, served_name="beside", status=Status.READY)
        replica = Replica.objects.create(
            deployment=taker, index=0, launch_id="x", host="127.0.0.1", port=29999, base_url="http://x"
        )
        GpuReservation.objects.create(rig=sim_rig, gpu=sim_rig.gpus.get(index=3), slot=WHOLE_CARD, replica=replica)

    job = heat_stops(simulated_profile("other", tp=2), 1, take)
    assert "could not be brought back either: Not brought back: Beside runs in its place." in job.summary
    assert (status("day"), deployment("day").desired, status("beside")) == (Status.FAILED, "serving", Status.READY)
    decision = look_at_failed(deployment("day"), policy_of(deployment("day").version.profile))
    assert (decision.act, decision.why) == (Act.WAIT, "restart 1 of 3 waits: Beside runs in its place")
    assert not Route.objects.filter(served_name="day").exists()  # no request waits for another model to go


def test_what_slept_for_a_superseded_switch_is_woken_beside_its_successor(
    switch: Any, sim_rig: Any, alice: Any
) -> None:
    switch(sleeper("day", tp=2))
    before = deployment("day")
    slow = switch_request(profile=simulated_profile("slow", load_seconds=30), actor=actor_of(alice))
    thread = in_thread(slow)
    eventually(lambda: loading("slow"), "slow loads")
    assert status("day") == Status.SLEEPING
    right = switch_request(profile=simulated_profile("right", tp=2), actor=actor_of(alice))
    thread.join(60)
    assert "Brought back Day." in run(right).summary
    before.refresh_from_db()
    assert (before.status, status("right")) == (Status.READY, Status.READY)


def test_a_new_version_does_not_wake_the_old_one(switch: Any) -> None:
    day, night = sleeper("day"), sleeper("night")
    switch(day)
    switch(night)
    add_day(gpu_memory_utilization=0.7)
    switch(day)
    assert sorted(Deployment.objects.filter(version__profile=day).values_list("status", flat=True)) == [
        "ready",
        "stopped",
    ]


def test_a_sleeper_is_stopped_like_any_other(switch: Any, alice: Any) -> None:
    switch(sleeper("day"))
    switch(sleeper("night"))
    asleep = deployment("day")
    job = run(stop_request(deployment=asleep, actor=actor_of(alice)))
    assert job.state == JobState.SUCCEEDED, job.result
    assert status("day") == Status.STOPPED
    assert [launching.observe(r).state for r in asleep.replicas.all()] == [ProcessState.EXITED]


def test_alone_means_that_nothing_sleeps_beside_it(switch: Any) -> None:
    switch(sleeper("day"))
    switch(sleeper("night"), exclusive=True)
    assert status("day") == Status.STOPPED
