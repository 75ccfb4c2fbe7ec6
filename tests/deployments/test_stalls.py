"""An engine that gets nowhere is noticed soon; a slow one is left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from apps.common.actors import actor_of
from apps.deployments import launching, smoke, stalls
from apps.deployments.models import Deployment, Status
from apps.deployments.services import switch_request
from apps.deployments.stalls import QUIET_SECONDS, STOPPED_SECONDS, Stall
from apps.jobs.models import Job, JobState
from apps.jobs.services import job_cancel
from apps.runners.processes import Activity, activity
from tests.deployments.test_switch import engine_pids, eventually, in_thread, run, serving
from tests.factories.profiles import simulated_profile

AT_WORK = Activity(pids=(7, 8), stopped=(), cpu_seconds=10.0, read_bytes=1 << 30, memory_rss_bytes=1 << 30)
STOPPED = replace(AT_WORK, stopped=(8,))


def told(
    looks: Callable[[float], tuple[Activity, int]], *, seconds: float, every: float = 1.0, disk: bool = False
) -> str:
    """What is said first in so many seconds of looking."""
    stall, now = Stall(now=0.0), 0.0
    while now < seconds:
        now += every
        if said := stall.judge(*looks(now), now, disk=lambda: disk):
            return said
    return ""


def test_a_process_that_is_stopped_by_a_signal_is_told_with_its_pid() -> None:
    assert told(lambda now: (STOPPED, int(now)), seconds=STOPPED_SECONDS - 1) == ""
    assert "process 8 is in state T" in told(lambda now: (STOPPED, int(now)), seconds=STOPPED_SECONDS + 1)


def test_one_that_goes_on_in_between_begins_anew() -> None:
    assert told(lambda now: (AT_WORK if now % 15 == 0 else STOPPED, int(now)), seconds=200) == ""


def test_time_in_which_nobody_looked_does_not_count() -> None:
    """A worker that was frozen itself, or a machine that slept: it may have gone on for all that we know."""
    assert told(lambda now: (STOPPED, 0), seconds=90, every=30) == ""


@pytest.mark.parametrize(
    ("work", "disk"),
    [
        (lambda now: (AT_WORK, int(now / 100)), False),
        (lambda now: (replace(AT_WORK, cpu_seconds=now / 100), 0), False),
        (lambda now: (replace(AT_WORK, read_bytes=int(now) << 20), 0), False),
        (lambda now: (replace(AT_WORK, memory_rss_bytes=int(now) << 20), 0), False),
        (lambda now: (replace(AT_WORK, pids=(7, int(now / 100))), 0), False),
        (lambda now: (AT_WORK, 0), True),
    ],
    ids=["says something", "computes", "reads", "grows", "starts processes", "waits for a disk"],
)
def test_a_slow_start_is_left_alone(work: Callable[[float], tuple[Activity, int]], disk: bool) -> None:
    assert told(work, seconds=4 * QUIET_SECONDS, disk=disk) == ""


def test_a_start_that_does_nothing_at_all_is_told() -> None:
    ticking = told(lambda now: (replace(AT_WORK, cpu_seconds=now * 0.001), 0), seconds=QUIET_SECONDS + 2)
    assert "it did nothing for 5 min" in ticking


def test_what_is_read_of_processes_is_what_they_do() -> None:
    ours = activity([os.getpid()])
    assert ours.cpu_seconds > 0
    assert ours.read_bytes > 0
    assert ours.memory_rss_bytes is not None
    assert ours.stopped == ()
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        sleeper.send_signal(signal.SIGSTOP)
        eventually(lambda: activity([sleeper.pid]).stopped == (sleeper.pid,), "it is seen to be stopped")
    finally:
        sleeper.kill()
        sleeper.wait()
    assert activity([sleeper.pid]).pids == ()


def _stop_the_new_engine(old: set[int]) -> None:
    (pid,) = eventually(lambda: engine_pids() - old, "the new engine runs")
    os.kill(pid, signal.SIGSTOP)


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stalls, "STOPPED_SECONDS", 2.0)


def test_an_engine_that_is_frozen_while_it_loads_fails_soon_and_the_old_one_returns(
    sim_rig: Any, alice: Any, soon: None
) -> None:
    run(switch_request(profile=simulated_profile("old"), actor=actor_of(alice)))
    old = engine_pids()
    job = switch_request(profile=simulated_profile("new", load_seconds=5), actor=actor_of(alice))
    thread = in_thread(job)
    _stop_the_new_engine(old)
    thread.join(60)
    job.refresh_from_db()
    assert job.state == JobState.FAILED
    assert "was stopped by a signal" in job.summary
    assert "Brought back Old." in job.summary
    assert serving() == ["old"]


def test_a_load_without_any_sign_of_work_fails_before_its_time_is_up(
    sim_rig: Any, alice: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stalls, "QUIET_SECONDS", 3.0)
    job = run(switch_request(profile=simulated_profile("new", hang_phase="compile"), actor=actor_of(alice)))
    assert job.state == JobState.FAILED
    assert "it did nothing" in job.summary
    assert "compile" in job.summary


def _frozen_at_its_test_request(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = smoke.one_token

    def freeze_first(replica: Any, *args: Any, **kwargs: Any) -> Any:
        for pid in launching.observe(replica).pids:
            os.kill(pid, signal.SIGSTOP)
        return honest(replica, *args, **kwargs)

    monkeypatch.setattr(smoke, "one_token", freeze_first)


def test_an_engine_that_is_frozen_at_its_test_request_fails_soon(
    sim_rig: Any, alice: Any, soon: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    _frozen_at_its_test_request(monkeypatch)
    job = run(switch_request(profile=simulated_profile("new"), actor=actor_of(alice)))
    assert job.state == JobState.FAILED
    assert "did not answer a test request: it was stopped by a signal" in job.summary
    assert Deployment.objects.get().status == Status.FAILED


def test_a_switch_can_be_cancelled_while_its_engine_does_not_answer_the_test_request(
    sim_rig: Any, alice: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _frozen_at_its_test_request(monkeypatch)
    job = switch_request(profile=simulated_profile("new"), actor=actor_of(alice))
    thread = in_thread(job)
    eventually(lambda: Job.objects.get(pk=job.pk).steps.filter(name="smoke", state="running").exists(), "it is asked")
    job_cancel(job, actor=actor_of(alice))
    thread.join(60)
    job.refresh_from_db()
    assert job.state == JobState.CANCELLED
    assert Deployment.objects.get().status == Status.STOPPED
