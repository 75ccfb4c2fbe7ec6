"""One replica of several dies: it alone is started again, within a budget, while the others serve on."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from apps.audit.models import AuditEntry
from apps.common.actors import actor_of
from apps.deployments import launching, replica_restart, services, switch_forward
from apps.deployments.models import Deployment, Replica, RestartPolicy, Route, Status
from apps.deployments.reconcile import reconcile
from apps.deployments.routes import route_table
from apps.deployments.services import stop_request, switch_request
from apps.jobs.handlers import JobFailed
from apps.jobs.models import LIVE_STATES, Job, JobState
from apps.jobs.runner import JobContext, job_claim
from apps.jobs.services import job_cancel, job_finish
from apps.profiles.models import Profile
from apps.rigs.models import Rig
from apps.rigs.services import hardware_failed
from apps.runners.protocol import ProcessState
from tests.deployments.test_switch import PATIENCE_SECONDS, engine_pids, eventually, run, serving
from tests.factories.profiles import simulated_profile


@pytest.fixture
def twins(sim_rig: Any, alice: Any) -> Profile:
    return serve_twins(alice)


def serve_twins(alice: Any, **options: Any) -> Profile:
    """A profile that serves with two replicas."""
    profile = simulated_profile("twins", tp=2, replicas=2, **options)
    RestartPolicy.objects.create(profile=profile, restarts=2, backoff_seconds=0.0, probe_every_seconds=0.0)
    job = run(switch_request(profile=profile, actor=actor_of(alice)))
    assert job.state == JobState.SUCCEEDED, job.result
    return profile


def replica(index: int) -> Replica:
    return Replica.objects.get(deployment=deployment(), index=index)


def deployment() -> Deployment:
    return Deployment.objects.get(version__profile__slug="twins")


def kill(index: int) -> None:
    pids = set(launching.observe(replica(index)).pids)
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: launching.observe(replica(index)).state == ProcessState.EXITED, "the engine is gone")


def noticed(index: int = 1) -> Job:
    """One replica dies and is missed; the job that starts it again."""
    kill(index)
    reconcile()  # it gets no more requests
    assert deployment().status == Status.DEGRADED
    reconcile()
    return Job.objects.get(state__in=LIVE_STATES)


def targets() -> int:
    (entry,) = route_table().routes
    return len(entry.targets)


def test_it_alone_is_started_again_while_the_other_serves_on(twins: Profile) -> None:
    other, key = set(launching.observe(replica(0)).pids), replica(1).engine_key
    job = noticed()
    assert (job.kind, job.title, job.user_name) == ("restart", "Restart replica 1 of Twins", "panel")
    assert "restart 1 of 2" in job.reason
    assert "signal 9" in job.reason
    assert targets() == 1
    reconcile()  # again, while it waits: nothing more happens
    assert Job.objects.filter(state__in=LIVE_STATES).count() == 1
    assert run(job).state == JobState.SUCCEEDED, job.result
    assert deployment().status == Status.READY
    assert targets() == 2
    assert other < engine_pids()
    assert set(launching.observe(replica(0)).pids) == other
    assert replica(1).engine_key != key  # what remembers the old engine is refused by the new one
    acts = [e.action for e in AuditEntry.objects.order_by("pk") if e.action.startswith("deployment.")]
    assert acts == ["deployment.degraded", "deployment.recovered"]
    told = [line.text for line in job.log_lines.order_by("pk")]
    assert told.index("The end of its log:") + 1 < len(told)


def test_it_lies_on_its_own_cards_though_others_are_free(sim_rig: Any, alice: Any) -> None:
    """The first pair was taken when it came; by now it is free, and a plan made anew would lie there."""
    first, pair = simulated_profile("first", tp=2), simulated_profile("pair", tp=1, replicas=2)
    RestartPolicy.objects.create(profile=pair, probe_every_seconds=0.0)
    run(switch_request(profile=first, actor=actor_of(alice)))
    run(switch_request(profile=pair, actor=actor_of(alice)))
    run(stop_request(deployment=Deployment.objects.get(version__profile=first), actor=actor_of(alice)))
    mine = Replica.objects.get(deployment__version__profile=pair, index=1)
    before = set(mine.reservations.values_list("gpu__uuid", flat=True))
    for pid in launching.observe(mine).pids:
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: launching.observe(mine).state == ProcessState.EXITED, "the engine is gone")
    reconcile()
    reconcile()
    assert run(Job.objects.get(state__in=LIVE_STATES)).state == JobState.SUCCEEDED
    mine.refresh_from_db()
    assert mine.argv is not None
    assert mine.argv[mine.argv.index("--gpu-uuids") + 1] in before


def test_after_its_budget_it_waits_and_the_deployment_says_so(twins: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise JobFailed("It did not start: no.", cause="unknown")

    monkeypatch.setattr(replica_restart, "follow_start", refuse)
    job = noticed()
    for _ in range(2):
        assert run(job).state == JobState.FAILED
        assert "The others serve on." in job.summary
        assert launching.observe(replica(1)).state != ProcessState.RUNNING
        reconcile()
        job = Job.objects.filter(state__in=LIVE_STATES).first() or job
    assert not Job.objects.filter(state__in=LIVE_STATES).exists()
    assert deployment().status == Status.DEGRADED
    assert "restarted 2 times within 10 min" in deployment().status_reason
    assert "the next try is at " in deployment().status_reason
    reconcile()
    assert AuditEntry.objects.filter(action="deployment.given_up").count() == 1
    assert targets() == 1


def test_while_the_cards_cannot_be_read_it_waits_without_using_up_its_tries(twins: Profile) -> None:
    hardware_failed(deployment().rig, "", "The driver does not answer.")
    kill(1)
    for _ in range(5):
        reconcile()
    assert deployment().status == Status.DEGRADED
    assert not Job.objects.filter(kind="restart").exists()
    Rig.objects.update(hardware_error="")
    reconcile()
    assert run(Job.objects.get(kind="restart")).state == JobState.SUCCEEDED


def test_restarts_that_are_off_leave_it_degraded(twins: Profile) -> None:
    RestartPolicy.objects.update(restarts=0)
    kill(1)
    reconcile()
    reconcile()
    assert deployment().status == Status.DEGRADED
    assert not Job.objects.filter(state__in=LIVE_STATES).exists()


def test_a_switch_that_a_person_asks_for_does_not_wait_for_it(twins: Profile, alice: Any) -> None:
    waiting = noticed()
    job = run(switch_request(profile=simulated_profile("wide"), actor=actor_of(alice)))
    waiting.refresh_from_db()
    assert (waiting.state, waiting.superseded_by) == (JobState.CANCELLED, job)
    assert job.state == JobState.SUCCEEDED, job.result
    assert serving() == ["wide"]


def test_a_switch_to_just_this_one_leaves_it_alone(twins: Profile, alice: Any) -> None:
    job = noticed()
    assert switch_request(profile=twins, actor=actor_of(alice)) == job
    job.refresh_from_db()
    assert job.cancel_requested_at is None
    assert run(job).state == JobState.SUCCEEDED
    assert deployment().status == Status.READY


def test_a_stop_does_not_wait_for_it_either(twins: Profile, alice: Any) -> None:
    waiting = noticed()
    job = run(stop_request(deployment=deployment(), actor=actor_of(alice)))
    waiting.refresh_from_db()
    assert waiting.state == JobState.CANCELLED
    assert job.state == JobState.SUCCEEDED
    assert not engine_pids()


@pytest.fixture
def ends_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs when somebody clicks ends between the look at it and the cancel, as it may on PostgreSQL."""

    def ended(job: Job, **more: Any) -> Job:
        job_finish(Job.objects.get(pk=job.pk), JobState.SUCCEEDED, {"summary": "Done."})
        return job_cancel(job, **more)

    monkeypatch.setattr(services, "job_cancel", ended)


def running(job: Job) -> Job:
    Job.objects.filter(pk=job.pk).update(state=JobState.RUNNING)
    return job


@pytest.mark.usefixtures("ends_meanwhile")
def test_what_ends_in_the_moment_of_a_click_is_no_reason_to_refuse_it(twins: Profile, alice: Any) -> None:
    waiting = running(noticed())
    job = switch_request(profile=simulated_profile("wide"), actor=actor_of(alice))
    waiting.refresh_from_db()
    assert (waiting.state, waiting.superseded_by) == (JobState.SUCCEEDED, None)
    assert run(job).state == JobState.SUCCEEDED
    assert serving() == ["wide"]


@pytest.mark.usefixtures("ends_meanwhile")
def test_nor_to_refuse_a_stop(twins: Profile, alice: Any) -> None:
    running(noticed())
    assert run(stop_request(deployment=deployment(), actor=actor_of(alice))).state == JobState.SUCCEEDED
    assert not engine_pids()


@pytest.mark.usefixtures("ends_meanwhile")
def test_what_came_up_in_the_moment_of_a_stop_is_stopped(twins: Profile, alice: Any) -> None:
    starting = Job.objects.get()
    Job.objects.update(state=JobState.RUNNING)
    Deployment.objects.update(status=Status.LOADING)
    job = stop_request(deployment=deployment(), actor=actor_of(alice), reason="enough")
    assert (job.kind, starting.log_lines.filter(text__contains="enough").exists()) == ("stop", False)
    Deployment.objects.update(status=Status.READY)
    assert run(job).state == JobState.SUCCEEDED
    assert not engine_pids()


def test_whoever_cancels_it_is_not_asked_again_at_once(twins: Profile, alice: Any) -> None:
    job_cancel(noticed(), actor=actor_of(alice))
    reconcile()
    assert not Job.objects.filter(state__in=LIVE_STATES).exists()
    assert "cancelled by alice" in deployment().status_reason.lower()


def test_one_that_a_broken_restart_left_behind_is_stopped_and_started_again(
    twins: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its job ended without putting things right: its process runs, and nobody sends requests there."""
    job = noticed()

    def breaks(*_: Any, **__: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(replica_restart, "smoke", breaks)
    monkeypatch.setattr(replica_restart.ReplicaRestartHandler, "compensation", lambda *_: ())
    assert run(job).state == JobState.ERRORED
    left = set(launching.observe(replica(1)).pids)
    assert left
    assert targets() == 1
    monkeypatch.undo()
    reconcile()
    assert run(Job.objects.get(state__in=LIVE_STATES)).state == JobState.SUCCEEDED
    assert not left & engine_pids()
    assert deployment().status == Status.READY


def test_a_switch_that_is_given_up_does_not_forget_who_was_away(twins: Profile, alice: Any) -> None:
    """It was taken out of the traffic as hanging and answers by now; draining and serving on do not know of it."""
    RestartPolicy.objects.update(restarts=0)
    Replica.objects.filter(index=1).update(healthy=False)
    Deployment.objects.update(status=Status.DEGRADED)
    job = switch_request(profile=simulated_profile("wide"), actor=actor_of(alice))
    context = job_claim(job.pk)
    assert context is not None

    def drain(ctx: JobContext, *_: Any) -> str:
        job_cancel(job, actor=actor_of(alice))
        ctx.sleep(PATIENCE_SECONDS)  # until it sees that it was cancelled
        return ""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(switch_forward, "drain", drain)
        context.run()
    assert Job.objects.get(pk=job.pk).state == JobState.CANCELLED
    assert deployment().status == Status.READY
    reconcile()
    assert deployment().status == Status.DEGRADED
    RestartPolicy.objects.update(restarts=2)
    reconcile()
    assert run(Job.objects.get(state__in=LIVE_STATES)).state == JobState.SUCCEEDED
    assert (deployment().status, targets()) == (Status.READY, 2)


def test_when_the_last_one_that_serves_dies_too_the_restart_goes_on_and_the_other_follows(twins: Profile) -> None:
    job = noticed()
    context = job_claim(job.pk)
    assert context is not None
    kill(0)
    reconcile()
    assert deployment().status == Status.DEGRADED
    assert targets() == 0
    context.run()
    job.refresh_from_db()
    assert job.state == JobState.SUCCEEDED
    assert deployment().status == Status.DEGRADED
    assert targets() == 1
    reconcile()
    assert run(Job.objects.get(state__in=LIVE_STATES)).state == JobState.SUCCEEDED
    assert deployment().status == Status.READY


def test_with_nobody_left_and_no_restart_under_way_the_whole_is_started_again(
    twins: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    RestartPolicy.objects.update(restarts=0)
    kill(1)
    reconcile()
    RestartPolicy.objects.update(restarts=2)
    kill(0)
    reconcile()
    assert deployment().status == Status.FAILED
    job = Job.objects.get(state__in=LIVE_STATES)
    assert job.kind == "switch"
    assert [(r.served_name, r.held_by_job_id) for r in Route.objects.all()] == [("twins", job.pk)]
