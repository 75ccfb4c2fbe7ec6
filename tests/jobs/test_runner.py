"""The job engine with handlers of the test's own."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import pytest
import time_machine
from django.db import OperationalError
from django.utils import timezone

from apps.audit.models import AuditEntry
from apps.common.actors import PANEL, actor_of
from apps.common.errors import Conflict
from apps.common.identity import is_known_alive, is_known_dead, process_key
from apps.jobs import handlers, leases
from apps.jobs.handlers import JobFailed, Step
from apps.jobs.leases import lease_is_over
from apps.jobs.models import Job, JobState, JobStep, StepState
from apps.jobs.runner import JobContext, job_claim
from apps.jobs.services import LOG_LINES_MAX, job_cancel, job_create, job_log
from apps.jobs.tasks import resend_waiting_jobs
from apps.runners import shim

pytestmark = pytest.mark.django_db(transaction=True)


class Script:
    """A job kind whose steps are the test's functions."""

    kind = "script"

    def __init__(
        self, *steps: Callable[[JobContext], str | None], undo: Callable[[JobContext], str | None] | None = None
    ) -> None:
        self.forward, self.undo = steps, undo

    def steps(self, job: Job) -> Sequence[Step]:
        return [Step(f.__name__, f.__name__, f) for f in self.forward]

    def compensation(self, job: Job) -> Sequence[Step]:
        return [Step("undo", "Undo", self.undo)] if self.undo else []

    def summary(self, job: Job) -> dict[str, Any]:
        return {"summary": "It worked."}


@pytest.fixture(autouse=True)
def _handlers_as_before() -> Iterator[None]:
    before = dict(handlers._handlers)
    yield
    handlers._handlers.clear()
    handlers._handlers.update(before)


def script(*steps: Callable[[JobContext], str | None], undo: Callable[[JobContext], str | None] | None = None) -> None:
    handlers.register("script", Script(*steps, undo=undo))


def new_job(**values: Any) -> Job:
    defaults: dict[str, Any] = {
        "kind": "script",
        "title": "Script",
        "rig_name": "bench-01",
        "queue": "q",
        "actor": PANEL,
    }
    return job_create(**(defaults | values))


def run(job: Job) -> Job:
    context = job_claim(job.pk)
    assert context is not None
    context.run()
    job.refresh_from_db()
    return job


def test_steps_run_in_order_and_hand_values_on() -> None:
    def first(ctx: JobContext) -> str:
        ctx.save_data(count=1)
        return "one"

    def second(ctx: JobContext) -> str:
        return f"after {ctx.job.data['count']}"

    script(first, second)
    job = run(new_job())
    assert job.state == JobState.SUCCEEDED
    assert job.summary == "It worked."
    assert [(s.name, s.state, s.detail) for s in job.steps.all()] == [
        ("first", "done", "one"),
        ("second", "done", "after 1"),
    ]
    assert job.progress == 1.0


def test_the_bar_goes_by_what_the_job_has_turned_out_to_be() -> None:
    """It wakes a model: what a cold start took says nothing of how far it is."""
    bars: list[float] = []

    def look(ctx: JobContext) -> None:
        ctx.save_data(wake=True)

    def load(ctx: JobContext) -> None:
        ctx.progress(0.5)
        bars.append(ctx.job.progress)

    for wake, seconds in ((False, {"look": 1, "load": 99}), (True, {"look": 1, "load": 1})):
        earlier = new_job(data={"wake": wake})
        Job.objects.filter(pk=earlier.pk).update(state=JobState.SUCCEEDED)
        for index, (name, took) in enumerate(seconds.items()):
            at = timezone.now()
            times = {"started_at": at, "finished_at": at + timedelta(seconds=took)}
            JobStep.objects.create(job=earlier, index=index, name=name, title=name, state=StepState.DONE, **times)
    script(look, load)
    run(new_job())
    assert bars == [0.75]


def test_a_step_that_says_no_fails_the_job_and_undoes() -> None:
    undone = []

    def refuse(ctx: JobContext) -> str:
        raise JobFailed("The rig said no.", exit_code=3)

    def never(ctx: JobContext) -> str:
        undone.append("never")
        return ""

    script(refuse, never, undo=lambda ctx: undone.append("undo"))
    job = run(new_job())
    assert job.state == JobState.FAILED
    assert job.result == {"summary": "The rig said no.", "exit_code": 3}
    assert undone == ["undo"]
    assert [s.state for s in job.steps.all()] == [StepState.FAILED, StepState.SKIPPED, StepState.DONE]


def test_a_bug_of_ours_is_errored_not_failed() -> None:
    def broken(ctx: JobContext) -> str:
        raise KeyError("oops")

    script(broken)
    job = run(new_job())
    assert job.state == JobState.ERRORED
    assert any("KeyError" in line.text for line in job.log_lines.all())


def test_a_job_whose_worker_is_gone_goes_on_after_its_last_finished_step() -> None:
    ran: list[str] = []

    def first(ctx: JobContext) -> None:
        ran.append("first")

    def second(ctx: JobContext) -> None:
        ran.append("second")
        if len(ran) == 2:
            raise SystemExit  # as if the process were killed here

    script(first, second)
    job = new_job()
    context = job_claim(job.pk)
    assert context is not None
    with pytest.raises(SystemExit):
        context.run()
    assert job_claim(job.pk) is not None  # this process knows that no thread of it works under that lease
    Job.objects.filter(pk=job.pk).update(lease_owner="elsewhere:1:tboot-1:x")
    assert job_claim(job.pk) is None  # nobody here can tell, and the lease has not run out
    Job.objects.filter(pk=job.pk).update(lease_until=timezone.now() - timedelta(seconds=1))
    assert run(job).state == JobState.SUCCEEDED
    assert ran == ["first", "second", "second"]


def test_a_job_killed_while_undoing_goes_on_with_the_undoing() -> None:
    ran: list[str] = []

    def refuse(ctx: JobContext) -> None:
        ran.append("refuse")
        raise JobFailed("No.")

    def undo(ctx: JobContext) -> None:
        ran.append("undo")
        if ran.count("undo") == 1:
            raise SystemExit

    script(refuse, undo=undo)
    job = new_job()
    context = job_claim(job.pk)
    assert context is not None
    with pytest.raises(SystemExit):
        context.run()
    Job.objects.filter(pk=job.pk).update(lease_until=timezone.now() - timedelta(seconds=1))
    assert run(job).state == JobState.FAILED
    assert ran == ["refuse", "undo", "undo"]


def test_a_full_disk_for_a_moment_is_no_fault_of_the_job() -> None:
    ran: list[str] = []

    def full(ctx: JobContext) -> None:
        ran.append("full")
        if len(ran) < 3:
            raise OperationalError("database or disk is full")

    script(full)
    job = new_job()
    assert run(job).state == JobState.RUNNING
    assert run(job).state == JobState.RUNNING  # nobody works on it: it may be taken at once
    assert run(job).state == JobState.SUCCEEDED


def test_a_database_that_never_takes_it_ends_the_job() -> None:
    def full(ctx: JobContext) -> None:
        raise OperationalError("database or disk is full")

    script(full)
    job = new_job()
    Job.objects.filter(pk=job.pk).update(attempts=30)
    assert run(job).state == JobState.ERRORED


def test_of_jobs_with_one_exclusion_only_one_runs() -> None:
    script(lambda ctx: None)
    first, second = new_job(exclusion="engines:bench-01"), new_job(exclusion="engines:bench-01")
    assert job_claim(first.pk) is not None
    assert job_claim(second.pk) is None


def test_a_queued_job_is_cancelled_at_once_and_an_ended_one_not_at_all(alice: Any) -> None:
    script(lambda ctx: None)
    job = job_cancel(new_job(), actor=actor_of(alice))
    job.refresh_from_db()
    assert job.state == JobState.CANCELLED
    assert "alice" in job.summary
    with pytest.raises(Conflict):
        job_cancel(job, actor=actor_of(alice))


def test_the_log_is_bounded_and_the_panels_own_words_find_room() -> None:
    job = new_job()
    job_log(job, "\n".join(f"line {i}" for i in range(LOG_LINES_MAX + 500)), "engine")
    job_log(job, "more noise", "engine")
    job_log(job, "The panel has the last word.")
    assert job.log_lines.count() <= LOG_LINES_MAX + 1
    assert job.log_lines.last().text == "The panel has the last word."


def test_every_job_and_its_end_are_in_the_audit() -> None:
    script(lambda ctx: None)
    run(new_job())
    assert list(AuditEntry.objects.order_by("sequence").values_list("action", flat=True)) == [
        "job.script",
        "job.succeeded",
    ]


def test_a_worker_of_another_host_is_never_taken_for_dead() -> None:
    assert not is_known_dead("elsewhere:1:1.0:abcd")
    assert not is_known_alive("elsewhere:1:1.0:abcd")


def test_who_a_process_is_does_not_move_with_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    key = process_key()
    born = shim.create_time(os.getpid())
    assert born is not None
    monkeypatch.setattr(shim, "create_time", lambda pid: born + 3600)  # what a step of the clock does to birth times
    assert process_key() == key
    assert is_known_alive(f"{key}:abcd")
    assert is_known_dead(f"{key}0:abcd")  # the same number, born at another tick


def test_keys_of_earlier_versions_are_still_understood() -> None:
    host, pid, born = socket.gethostname(), os.getpid(), shim.create_time(os.getpid())
    assert born is not None
    assert is_known_alive(f"{host}:{pid}:{born:.2f}:abcd")
    assert is_known_dead(f"{host}:{pid}:{born - 100:.2f}:abcd")


@pytest.mark.parametrize("step", [timedelta(days=1), timedelta(days=-1)])
def test_a_stepped_clock_takes_no_job_from_a_living_worker(step: timedelta) -> None:
    script(lambda ctx: None)
    job = new_job()
    context = job_claim(job.pk)
    assert context is not None
    with time_machine.travel(timezone.now() + step, tick=True):
        assert job_claim(job.pk) is None
        assert resend_waiting_jobs() == 0
    context.run()
    job.refresh_from_db()
    assert job.state == JobState.SUCCEEDED


def test_a_lease_that_nobody_renews_is_over_whatever_its_time_of_day_says(monkeypatch: pytest.MonkeyPatch) -> None:
    job = new_job()
    owner, until = f"{process_key()}:abcd", timezone.now() + timedelta(days=1)
    Job.objects.filter(pk=job.pk).update(state=JobState.RUNNING, lease_owner=owner, lease_until=until)
    job.refresh_from_db()
    monkeypatch.setattr(leases, "held_here", {owner})
    now = time.monotonic()
    for second in range(0, 16, 2):
        monkeypatch.setattr(leases.time, "monotonic", lambda second=second: now + second)
        assert not lease_is_over(job)
    monkeypatch.setattr(leases.time, "monotonic", lambda: now + 17)
    assert lease_is_over(job)
