"""The switch, with real engine processes of the simulated engine and real rows."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest
from django.db import connections

from apps.audit.services import verify_chain
from apps.common.actors import actor_of
from apps.common.errors import Conflict
from apps.common.identity import process_key
from apps.deployments import launching, routes, switch_back
from apps.deployments.models import (
    COMES_BACK,
    LIVE,
    Deployment,
    Desired,
    GpuReservation,
    RestartPolicy,
    Route,
    Status,
)
from apps.deployments.reconcile import reconcile
from apps.deployments.routes import route_table
from apps.deployments.services import cut_request, stop_request, switch_request
from apps.jobs.models import Job, JobState, StepState
from apps.jobs.runner import job_claim
from apps.jobs.services import job_cancel
from apps.profiles.models import Profile
from tests.factories.profiles import add_version, catalogue_model, simulated_profile

PATIENCE_SECONDS = 60.0


def eventually(check: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        if found := check():
            return found
        time.sleep(0.05)
    raise AssertionError(f"did not happen: {what}")


def run(job: Job) -> Job:
    context = job_claim(job.pk)
    assert context is not None
    context.run()
    job.refresh_from_db()
    return job


def in_thread(job: Job) -> threading.Thread:
    def work() -> None:
        run(job)
        connections.close_all()

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def serving() -> list[str]:
    return sorted(d.version.profile.slug for d in Deployment.objects.filter(status=Status.READY))


def engine_pids() -> set[int]:
    found = set()
    for deployment in Deployment.objects.all():
        for replica in deployment.replicas.all():
            found.update(launching.observe(replica).pids)
    return found


def test_a_switch_serves_and_tells_its_story(sim_rig: Any, alice: Any) -> None:
    job = run(
        switch_request(profile=simulated_profile("coder", tp=2, replicas=2), actor=actor_of(alice), reason="sprint")
    )
    assert job.state == JobState.SUCCEEDED, job.result
    deployment = Deployment.objects.get(pk=job.deployment_id)
    assert deployment.status == Status.READY
    assert [s.state for s in job.steps.all()] == [StepState.DONE] * 11
    (entry,) = route_table().routes
    assert entry.served_name == "coder"
    assert len(entry.targets) == 2
    held = {
        frozenset(r.gpu.index for r in replica.reservations.all() if r.gpu) for replica in deployment.replicas.all()
    }
    assert held == {frozenset({0, 1}), frozenset({2, 3})}
    assert job.user_name == "alice"
    assert job.reason == "sprint"
    assert any("Application startup complete" in line.text for line in job.log_lines.filter(source="engine"))
    assert verify_chain().whole


def test_the_old_model_makes_room_for_the_new_one(sim_rig: Any, alice: Any) -> None:
    run(switch_request(profile=simulated_profile("old"), actor=actor_of(alice)))
    job = run(switch_request(profile=simulated_profile("new"), actor=actor_of(alice)))
    assert job.state == JobState.SUCCEEDED, job.result
    assert serving() == ["new"]
    assert [r.served_name for r in Route.objects.all()] == ["new"]
    assert Deployment.objects.get(version__profile__slug="old").status == Status.STOPPED


@pytest.mark.parametrize("phase", ["weights", "compile", "graphs"])
def test_a_model_that_does_not_come_up_brings_the_old_one_back(sim_rig: Any, alice: Any, phase: str) -> None:
    run(switch_request(profile=simulated_profile("old"), actor=actor_of(alice)))
    job = run(switch_request(profile=simulated_profile("broken", fail_phase=phase), actor=actor_of(alice)))
    assert job.state == JobState.FAILED
    assert "Brought back Old." in job.summary
    assert job.result
    assert job.result["exit_code"] == 1
    assert job.result["log_tail"]
    assert serving() == ["old"]
    assert Deployment.objects.get(version__profile__slug="broken").status == Status.FAILED
    assert [(r.served_name, r.state) for r in Route.objects.all()] == [("old", "open")]


def test_a_broken_new_version_brings_the_older_version_back(sim_rig: Any, alice: Any) -> None:
    profile = simulated_profile("coder")
    run(switch_request(profile=profile, actor=actor_of(alice)))
    add_version(profile, tp=4, replicas=1, model=catalogue_model("coder"), fail_phase="weights")
    job = run(switch_request(profile=profile, actor=actor_of(alice)))
    assert job.state == JobState.FAILED
    ready = Deployment.objects.get(status=Status.READY)
    assert ready.version.number == 1


def test_when_nothing_served_before_nothing_is_left_over(sim_rig: Any, alice: Any) -> None:
    job = run(switch_request(profile=simulated_profile("broken", fail_phase="weights"), actor=actor_of(alice)))
    assert job.state == JobState.FAILED
    assert "Nothing served before" in job.summary
    assert not Deployment.objects.filter(status__in=LIVE).exists()
    assert not GpuReservation.objects.filter(released_at=None).exists()
    assert not Route.objects.exists()
    assert engine_pids() == set()


def test_a_double_click_is_one_job(sim_rig: Any, alice: Any) -> None:
    profile = simulated_profile("coder")
    first = switch_request(profile=profile, actor=actor_of(alice))
    second = switch_request(profile=profile, actor=actor_of(alice))
    assert first.pk == second.pk
    run(first)
    third = run(switch_request(profile=profile, actor=actor_of(alice)))
    assert third.pk != first.pk
    assert "already serving" in third.summary
    assert Deployment.objects.count() == 1


def test_of_two_people_at_once_the_later_wish_wins(sim_rig: Any, alice: Any, olivia: Any) -> None:
    run(switch_request(profile=simulated_profile("old"), actor=actor_of(alice)))
    slow = switch_request(profile=simulated_profile("slow", load_seconds=30), actor=actor_of(alice))
    thread = in_thread(slow)
    eventually(
        lambda: Deployment.objects.filter(version__profile__slug="slow", status=Status.LOADING).exists(), "slow loads"
    )
    quick = switch_request(profile=simulated_profile("quick"), actor=actor_of(olivia))
    assert job_claim(quick.pk) is None  # one switch at a time runs on a rig
    thread.join(PATIENCE_SECONDS)
    slow.refresh_from_db()
    assert slow.state == JobState.CANCELLED
    assert slow.superseded_by_id == quick.pk
    assert run(quick).state == JobState.SUCCEEDED
    assert serving() == ["quick"]


def test_a_superseding_switch_that_fails_brings_back_what_served_at_first(sim_rig: Any, alice: Any) -> None:
    run(switch_request(profile=simulated_profile("old"), actor=actor_of(alice)))
    slow = switch_request(profile=simulated_profile("slow", load_seconds=30), actor=actor_of(alice))
    thread = in_thread(slow)
    eventually(
        lambda: Deployment.objects.filter(version__profile__slug="slow", status=Status.LOADING).exists(), "slow loads"
    )
    broken = switch_request(profile=simulated_profile("broken", fail_phase="weights"), actor=actor_of(alice))
    thread.join(PATIENCE_SECONDS)
    assert run(broken).state == JobState.FAILED
    assert serving() == ["old"]
    assert [(r.served_name, r.state) for r in Route.objects.all()] == [("old", "open")]


def test_what_a_switch_replaced_that_succeeded_while_it_was_superseded_is_owed_to_nobody(
    sim_rig: Any, alice: Any
) -> None:
    run(switch_request(profile=simulated_profile("old"), actor=actor_of(alice)))
    done = run(switch_request(profile=simulated_profile("new"), actor=actor_of(alice)))
    assert done.state == JobState.SUCCEEDED
    broken = switch_request(profile=simulated_profile("broken", fail_phase="weights"), actor=actor_of(alice))
    Job.objects.filter(pk=done.pk).update(superseded_by=broken)  # the click came while its last step ran
    assert "Brought back New." in run(broken).summary
    assert serving() == ["new"]
    assert not Deployment.objects.filter(COMES_BACK).exists()


def test_cancelling_while_it_loads_brings_the_old_model_back(sim_rig: Any, alice: Any) -> None:
    run(switch_request(profile=simulated_profile("old"), actor=actor_of(alice)))
    slow = switch_request(profile=simulated_profile("slow", load_seconds=30), actor=actor_of(alice))
    thread = in_thread(slow)
    eventually(
        lambda: Deployment.objects.filter(version__profile__slug="slow", status=Status.LOADING).exists(), "slow loads"
    )
    job_cancel(slow, actor=actor_of(alice))
    thread.join(PATIENCE_SECONDS)
    slow.refresh_from_db()
    assert slow.state == JobState.CANCELLED
    assert "Cancelled by alice" in slow.summary
    assert serving() == ["old"]


def _work_in_child(job_id: int) -> None:
    connections.close_all()
    context = job_claim(job_id)
    assert context is not None
    context.run()


@pytest.mark.parametrize("step", ["stop", "ready", "smoke"])
def test_a_killed_workers_switch_is_carried_on_to_the_end(sim_rig: Any, alice: Any, step: str) -> None:
    run(switch_request(profile=simulated_profile("old"), actor=actor_of(alice)))
    job = switch_request(
        profile=simulated_profile("new", load_seconds=2, slow_first_token_seconds=2), actor=actor_of(alice)
    )
    connections.close_all()
    worker = multiprocessing.get_context("fork").Process(target=_work_in_child, args=(job.pk,))
    worker.start()
    eventually(lambda: job.steps.filter(name=step).exclude(state=StepState.PENDING).exists(), f"the step {step} begins")
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    job = run(job)
    assert job.state == JobState.SUCCEEDED, job.result
    assert job.attempts == 2
    assert serving() == ["new"]
    assert len(engine_pids() & set(psutil.pids())) == 1  # one engine, not one per try


def test_a_worker_whose_job_was_taken_over_touches_nothing_more(sim_rig: Any, alice: Any) -> None:
    job = switch_request(profile=simulated_profile("new"), actor=actor_of(alice))
    first = job_claim(job.pk)
    assert first is not None
    Job.objects.filter(pk=job.pk).update(lease_owner="elsewhere:1:1.0:x")
    first.run()
    job.refresh_from_db()
    assert job.state == JobState.RUNNING
    assert not Deployment.objects.exists()


def test_stopping_takes_the_traffic_away_and_ends_the_engine(sim_rig: Any, alice: Any) -> None:
    run(switch_request(profile=simulated_profile("coder"), actor=actor_of(alice)))
    job = run(stop_request(deployment=Deployment.objects.get(), actor=actor_of(alice)))
    assert job.state == JobState.SUCCEEDED
    assert Deployment.objects.get().status == Status.STOPPED
    assert not Route.objects.exists()
    assert engine_pids() == set()


def test_two_profiles_that_fit_side_by_side_both_serve(sim_rig: Any, alice: Any) -> None:
    run(switch_request(profile=simulated_profile("left", tp=2), actor=actor_of(alice)))
    run(switch_request(profile=simulated_profile("right", tp=2), actor=actor_of(alice)))
    assert serving() == ["left", "right"]
    job = run(switch_request(profile=simulated_profile("alone", tp=2), actor=actor_of(alice), exclusive=True))
    assert job.state == JobState.SUCCEEDED
    assert serving() == ["alone"]


def test_an_engine_that_dies_is_noticed_and_its_route_closed(sim_rig: Any, alice: Any) -> None:
    profile = simulated_profile("coder")
    RestartPolicy.objects.create(profile=profile, restarts=0)
    run(switch_request(profile=profile, actor=actor_of(alice)))
    for pid in engine_pids():
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: not engine_pids(), "the engine is gone")
    reconcile()
    deployment = Deployment.objects.get()
    assert deployment.status == Status.FAILED
    assert "signal 9" in deployment.status_reason
    assert not Route.objects.exists()


def test_one_dead_replica_of_two_leaves_the_other_serving(sim_rig: Any, alice: Any) -> None:
    run(switch_request(profile=simulated_profile("coder", tp=2, replicas=2), actor=actor_of(alice)))
    replica = Deployment.objects.get().replicas.get(index=0)
    for pid in launching.observe(replica).pids:
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: not launching.observe(replica).pids, "replica 0 is gone")
    reconcile()
    assert Deployment.objects.get().status == Status.DEGRADED
    (entry,) = route_table().routes
    assert len(entry.targets) == 1


def loading(slug: str) -> bool:
    return Deployment.objects.filter(version__profile__slug=slug, status=Status.LOADING).exists()


def test_a_queued_successor_that_is_cancelled_still_brings_back_what_served(sim_rig: Any, alice: Any) -> None:
    thread = old_gives_way_to_slow(alice)
    later = switch_request(profile=simulated_profile("later"), actor=actor_of(alice))
    job_cancel(later, actor=actor_of(alice))
    thread.join(PATIENCE_SECONDS)
    later = run(later)
    assert later.state == JobState.CANCELLED
    assert "Brought back Old." in later.summary
    assert serving() == ["old"]
    assert [(r.served_name, r.state) for r in Route.objects.all()] == [("old", "open")]


def test_what_ran_before_the_cancelled_switch_had_its_turn_ends_the_wish_that_it_owes(sim_rig: Any, alice: Any) -> None:
    thread = old_gives_way_to_slow(alice)
    later = switch_request(profile=simulated_profile("later"), actor=actor_of(alice))
    job_cancel(later, actor=actor_of(alice))
    newer = switch_request(profile=simulated_profile("newer"), actor=actor_of(alice))
    thread.join(PATIENCE_SECONDS)
    assert run(newer).state == JobState.SUCCEEDED
    assert run(later).state == JobState.CANCELLED
    assert serving() == ["newer"]
    old = Deployment.objects.filter(version__profile__slug="old").latest("pk")
    assert (old.status, old.desired) == (Status.STOPPED, Desired.STOPPED)
    assert old.status_reason == "Newer was asked for since and runs in its place."


def old_gives_way_to_slow(alice: Any) -> threading.Thread:
    """``old`` has been stopped, and ``slow`` loads in its place, for longer than anybody waits."""
    run(switch_request(profile=simulated_profile("old"), actor=actor_of(alice)))
    thread = in_thread(switch_request(profile=simulated_profile("slow", load_seconds=30), actor=actor_of(alice)))
    eventually(lambda: loading("slow"), "slow loads")
    return thread


def test_of_three_clicks_the_last_one_owes_the_return_of_what_the_first_one_stopped(sim_rig: Any, alice: Any) -> None:
    thread = old_gives_way_to_slow(alice)
    second = switch_request(profile=simulated_profile("second"), actor=actor_of(alice))
    third = switch_request(profile=simulated_profile("third", fail_phase="weights"), actor=actor_of(alice))
    thread.join(PATIENCE_SECONDS)
    assert run(second).superseded_by_id == third.pk
    assert run(third).state == JobState.FAILED
    assert serving() == ["old"]
    assert [(r.served_name, r.state) for r in Route.objects.all()] == [("old", "open")]


def test_a_successor_that_cannot_even_be_planned_brings_back_what_served(sim_rig: Any, alice: Any) -> None:
    thread = old_gives_way_to_slow(alice)
    wide = switch_request(profile=simulated_profile("wide", tp=4, replicas=2), actor=actor_of(alice))
    thread.join(PATIENCE_SECONDS)
    assert run(wide).state == JobState.FAILED
    assert serving() == ["old"]
    assert [(r.served_name, r.state) for r in Route.objects.all()] == [("old", "open")]


def test_what_a_superseded_switch_stopped_returns_beside_a_successor_that_leaves_it_room(
    sim_rig: Any, alice: Any
) -> None:
    run(switch_request(profile=simulated_profile("left", tp=2), actor=actor_of(alice)))
    slow = switch_request(profile=simulated_profile("slow", load_seconds=30), actor=actor_of(alice))
    thread = in_thread(slow)
    eventually(lambda: loading("slow"), "slow loads")
    right = switch_request(profile=simulated_profile("right", tp=2), actor=actor_of(alice))
    thread.join(PATIENCE_SECONDS)
    right = run(right)
    assert right.state == JobState.SUCCEEDED
    assert "Brought back Left." in right.summary
    assert serving() == ["left", "right"]
    assert {(r.served_name, r.state) for r in Route.objects.all()} == {("left", "open"), ("right", "open")}


def test_when_the_old_model_does_not_return_either_requests_wait_while_it_is_to_be_restarted(
    sim_rig: Any, alice: Any
) -> None:
    old = simulated_profile("old")
    run(switch_request(profile=old, actor=actor_of(alice)))
    catalogue_model("old").__class__.objects.filter(slug="old").update(
        weights_bytes=900 * 2**30
    )  # its file was swapped
    job = run(switch_request(profile=simulated_profile("broken", fail_phase="weights"), actor=actor_of(alice)))
    assert job.state == JobState.FAILED
    assert "could not be brought back either" in job.summary
    assert [(r.served_name, r.state, r.held_by_job_id) for r in Route.objects.all()] == [("old", "held", None)]
    RestartPolicy.objects.create(profile=old, restarts=0)
    reconcile()
    assert not Route.objects.exists()
    assert engine_pids() == set()


def test_a_hold_whose_job_has_ended_is_swept_away(sim_rig: Any, alice: Any) -> None:
    job = run(switch_request(profile=simulated_profile("coder"), actor=actor_of(alice)))
    routes.hold(["coder", "gone"], job_id=job.pk, eta_at=None)
    reconcile()
    assert [(r.served_name, r.state) for r in Route.objects.all()] == [("coder", "open")]


def test_a_cancelled_stop_leaves_the_model_wanted(sim_rig: Any, alice: Any) -> None:
    run(switch_request(profile=simulated_profile("coder"), actor=actor_of(alice)))
    job_cancel(stop_request(deployment=Deployment.objects.get(), actor=actor_of(alice)), actor=actor_of(alice))
    assert Deployment.objects.get().desired == "serving"
    assert "already serving" in run(switch_request(profile=Profile.objects.get(), actor=actor_of(alice))).summary


def test_a_half_dead_model_stays_degraded_after_a_cancelled_stop(sim_rig: Any, alice: Any) -> None:
    run(switch_request(profile=simulated_profile("coder", tp=2, replicas=2), actor=actor_of(alice)))
    replica = Deployment.objects.get().replicas.get(index=0)
    for pid in launching.observe(replica).pids:
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: not launching.observe(replica).pids, "replica 0 is gone")
    reconcile()
    Deployment.objects.update(status=Status.READY)  # as a cancelled stop leaves it
    reconcile()
    assert Deployment.objects.get().status == Status.DEGRADED


def test_the_way_back_can_be_cancelled(sim_rig: Any, alice: Any) -> None:
    run(switch_request(profile=simulated_profile("old", load_seconds=4), actor=actor_of(alice)))
    job = switch_request(profile=simulated_profile("broken", fail_phase="weights"), actor=actor_of(alice))
    thread = in_thread(job)
    eventually(lambda: job.steps.filter(name="bring_back", state=StepState.RUNNING).exists(), "it is brought back")
    eventually(lambda: Deployment.objects.filter(served_name="old", status=Status.LOADING).exists(), "it loads")
    job_cancel(Job.objects.get(pk=job.pk), actor=actor_of(alice))
    thread.join(60)
    job.refresh_from_db()
    assert job.state == JobState.FAILED
    assert "cancelled by alice" in job.summary
    assert not Deployment.objects.filter(status__in=LIVE).exists()
    assert engine_pids() == set()
    assert not Route.objects.exists()
    reconcile()
    assert not Job.objects.filter(state=JobState.QUEUED).exists()  # nobody wants it back


def test_the_way_back_is_cancelled_for_good_also_before_the_engine_starts(
    sim_rig: Any, alice: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(switch_request(profile=simulated_profile("old"), actor=actor_of(alice)))
    job = switch_request(profile=simulated_profile("broken", fail_phase="weights"), actor=actor_of(alice))

    def wait(_: Any, pause: Callable[[float], None]) -> str:
        job_cancel(Job.objects.get(pk=job.pk), actor=actor_of(alice))
        pause(PATIENCE_SECONDS)
        return "not cancelled"

    monkeypatch.setattr(switch_back, "wait_for_memory", wait)
    assert "cancelled by alice" in run(job).summary
    for _ in range(2):
        reconcile()
    assert not Job.objects.filter(state=JobState.QUEUED).exists()
    assert not Deployment.objects.filter(status__in=LIVE).exists()


def test_a_later_switch_cuts_the_way_back_short_and_owes_the_return(sim_rig: Any, alice: Any) -> None:
    run(switch_request(profile=simulated_profile("old", tp=2, load_seconds=4), actor=actor_of(alice)))
    broken = switch_request(profile=simulated_profile("broken", tp=4, fail_phase="weights"), actor=actor_of(alice))
    thread = in_thread(broken)
    eventually(lambda: broken.steps.filter(name="bring_back", state=StepState.RUNNING).exists(), "it is brought back")
    later = switch_request(profile=simulated_profile("later", tp=2), actor=actor_of(alice))
    thread.join(60)
    broken.refresh_from_db()
    assert broken.superseded_by_id == later.pk
    assert run(later).state == JobState.SUCCEEDED
    assert serving() == ["later", "old"]


def restoring(alice: Any) -> tuple[Job, threading.Thread, Deployment]:
    """A switch to ``right`` that serves, and now loads ``left`` again, which the switch before it had stopped."""
    run(switch_request(profile=simulated_profile("left", tp=2, load_seconds=4), actor=actor_of(alice)))
    slow = switch_request(profile=simulated_profile("slow", load_seconds=60), actor=actor_of(alice))
    thread = in_thread(slow)
    eventually(lambda: loading("slow"), "slow loads")
    job = switch_request(profile=simulated_profile("right", tp=2), actor=actor_of(alice))
    thread.join(PATIENCE_SECONDS)
    thread = in_thread(job)
    eventually(lambda: loading("left"), "left comes back")
    return job, thread, Deployment.objects.get(version__profile__slug="left", status=Status.LOADING)


def test_what_is_brought_back_beside_the_new_model_can_be_stopped_while_it_loads(sim_rig: Any, alice: Any) -> None:
    job, thread, coming = restoring(alice)
    assert stop_request(deployment=coming, actor=actor_of(alice)) == job
    thread.join(PATIENCE_SECONDS)
    job.refresh_from_db()
    assert job.state == JobState.SUCCEEDED
    assert job.summary.endswith("Left was not brought back: cancelled by alice.")
    coming.refresh_from_db()
    assert (coming.status, coming.desired) == (Status.STOPPED, "stopped")
    assert serving() == ["right"]
    reconcile()
    assert not Job.objects.filter(state=JobState.QUEUED).exists()


def test_a_later_switch_does_not_wait_for_what_is_brought_back_and_leaves_it_its_wish(sim_rig: Any, alice: Any) -> None:
    job, thread, coming = restoring(alice)
    right = Profile.objects.get(slug="right")
    add_version(right, tp=2, replicas=1, model=catalogue_model("right"))
    later = switch_request(profile=right, actor=actor_of(alice))
    thread.join(PATIENCE_SECONDS)
    job.refresh_from_db()
    assert job.state == JobState.SUCCEEDED
    assert job.summary.endswith(f"Left was not brought back: superseded by job {later.pk}.")
    coming.refresh_from_db()
    assert (coming.status, coming.desired) == (Status.FAILED, "serving")
    assert coming.status_reason == f"Its return gave way to job {later.pk}."
    assert run(later).state == JobState.SUCCEEDED
    reconcile()
    assert run(Job.objects.get(state=JobState.QUEUED)).state == JobState.SUCCEEDED
    assert serving() == ["left", "right"]


def test_a_cancelled_switch_still_brings_the_old_model_back(sim_rig: Any, alice: Any) -> None:
    run(switch_request(profile=simulated_profile("old"), actor=actor_of(alice)))
    job = switch_request(profile=simulated_profile("slow", load_seconds=60), actor=actor_of(alice))
    thread = in_thread(job)
    eventually(lambda: loading("slow"), "it loads")
    job_cancel(Job.objects.get(pk=job.pk), actor=actor_of(alice))
    thread.join(60)
    job.refresh_from_db()
    assert job.state == JobState.CANCELLED
    assert serving() == ["old"]


def streaming_gateway(deployment: Deployment) -> None:
    routes.gateway_seen(process_key(), epoch=10**9, in_flight={deployment.pk: 2})


def test_a_members_switch_gives_up_rather_than_cut_somebodys_answer(sim_rig: Any, alice: Any, bob: Any) -> None:
    run(switch_request(profile=simulated_profile("old"), actor=actor_of(alice)))
    streaming_gateway(Deployment.objects.get())
    profile = simulated_profile("new", members_may_switch=True)
    job = switch_request(profile=profile, actor=actor_of(bob))
    Job.objects.filter(pk=job.pk).update(params={**job.params, "drain_seconds": 0.5})
    assert run(job).state == JobState.FAILED
    assert "only an operator may cut them" in job.summary
    assert serving() == ["old"]
    assert [(r.served_name, r.state) for r in Route.objects.all()] == [("old", "open")]


def test_an_operator_cuts_at_once_and_it_is_on_record(sim_rig: Any, alice: Any, bob: Any, olivia: Any) -> None:
    run(switch_request(profile=simulated_profile("old"), actor=actor_of(alice)))
    old = Deployment.objects.get()
    with pytest.raises(Conflict):
        cut_request(deployment=old, actor=actor_of(olivia))
    streaming_gateway(old)
    profile = simulated_profile("new", members_may_switch=True)
    job = switch_request(profile=profile, actor=actor_of(bob))
    thread = in_thread(job)
    eventually(lambda: Deployment.objects.filter(pk=old.pk, status=Status.DRAINING).exists(), "it drains")
    cut_request(deployment=old, actor=actor_of(olivia))
    thread.join(60)
    job.refresh_from_db()
    assert job.state == JobState.SUCCEEDED, job.result
    assert "cut by olivia" in job.steps.get(name="drain").detail
    assert serving() == ["new"]
