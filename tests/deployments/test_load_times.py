"""How long a load still takes: known from earlier loads here, phase by phase, and not known without them."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import pytest
from django.utils import timezone

from apps.common.actors import actor_of
from apps.deployments import switch_forward
from apps.deployments.models import Deployment, Route
from apps.deployments.services import stop_request, switch_request
from apps.jobs.estimates import earlier_runs
from apps.jobs.models import Job, JobState
from apps.profiles.models import Profile
from tests.deployments.test_sleeping import sleeper
from tests.deployments.test_switch import run
from tests.factories.profiles import simulated_profile


def switched(profile: Profile, user: Any) -> Job:
    job = run(switch_request(profile=profile, actor=actor_of(user)))
    assert job.state == JobState.SUCCEEDED, job.result
    return job


def stopped(user: Any) -> None:
    run(stop_request(deployment=Deployment.objects.latest("pk"), actor=actor_of(user)))


Told = list[tuple[str, datetime | None, datetime | None]]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    """While a load goes on: its phase, when the job is said to be done, and what those who wait for it are told."""
    seen: Told = []
    progress = switch_forward.LoadClock.tell

    def tell(clock: Any, fraction: float, text: str) -> None:
        progress(clock, fraction, text)
        job = Job.objects.get(pk=clock.ctx.job.pk)
        seen.append((text.partition(" ")[0], job.eta_at, Route.objects.get(held_by_job_id=job.pk).eta_at))

    monkeypatch.setattr(switch_forward.LoadClock, "tell", tell)
    return seen


def test_the_first_load_of_a_profile_promises_no_time(sim_rig: Any, alice: Any, told: Told) -> None:
    switched(simulated_profile("coder"), alice)
    assert told
    assert {eta for _, eta, _ in told} == {None}


def test_every_phase_tells_what_was_left_from_there_before(sim_rig: Any, alice: Any, told: Told) -> None:
    profile = simulated_profile("coder", load_seconds=2.0)
    first = switched(profile, alice)
    phases = first.data["phases"]
    begun = [phases[name] for name in ("weights", "compile", "graphs", "ready")]
    assert begun == sorted(begun)
    stopped(alice)
    # As if the earlier load had taken an hour, nearly all of it after its weights were there.
    slow = {"process": 0.0, "weights": 1.0, "compile": 60.0, "graphs": 3000.0, "server": 3590.0, "ready": 3600.0}
    Job.objects.filter(pk=first.pk).update(data={**first.data, "phases": slow})
    told.clear()
    switched(profile, alice)
    lefts = {"process": 3600, "weights": 3599, "compile": 3540, "graphs": 600, "server": 10}
    for phase, at in {name: eta for name, eta, _ in told if name in ("compile", "graphs")}.items():
        assert at is not None
        left = (at - timezone.now()).total_seconds()
        assert min(lefts, key=lambda name, left=left: abs(lefts[name] - left)) == phase  # type: ignore[misc]
    assert {"compile", "graphs"} <= {name for name, _, _ in told}
    assert all(waiting == eta for _, eta, waiting in told)


def test_a_wake_says_nothing_of_how_long_a_cold_start_takes(sim_rig: Any, alice: Any) -> None:
    day, night = sleeper("day"), sleeper("night")
    cold = switched(day, alice)
    switched(night, alice)
    woken = switched(day, alice)
    assert woken.data["wake"]
    assert "phases" not in woken.data
    like = Job(kind="switch", profile_slug="day", rig_name=sim_rig.slug)
    assert [job.pk for job in earlier_runs(like)] == [cold.pk]
    like.data = {"wake": True}
    assert [job.pk for job in earlier_runs(like)] == [woken.pk]


def test_what_takes_longer_than_before_says_so() -> None:
    job = Job(state=JobState.RUNNING, eta_at=timezone.now() - timedelta(seconds=5))
    assert job.eta_words == "takes longer than before"
    job.eta_at = timezone.now() + timedelta(seconds=61)
    assert job.eta_words.startswith("about 1 min")
    job.eta_at = None
    assert job.eta_words == ""
