"""Rest after idling and the calendar's switch, with real processes of the simulated engine."""

from __future__ import annotations

from datetime import time
from typing import Any

import pytest
from django.utils import timezone

from apps.common.actors import PANEL, actor_of
from apps.deployments.models import Deployment, Status
from apps.deployments.policies import services, ticking
from apps.deployments.policies.decide import Asker
from apps.deployments.services import stop_request, switch_request
from apps.jobs.models import Job, JobState
from tests.deployments.test_sleeping import sleeper
from tests.deployments.test_switch import run
from tests.factories.profiles import simulated_profile


def rest(profile_slug: str) -> Job:
    deployment = Deployment.objects.get(version__profile__slug=profile_slug)
    services.rig_policy_set(rig=deployment.rig, actor=PANEL, minimum_residency_seconds=0)
    return run(stop_request(deployment=deployment, actor=PANEL, reason="idle for 30 min", asker=Asker.CLOCK, rest=True))


def test_what_can_sleep_rests_asleep_and_wakes_with_the_next_switch(sim_rig: Any, alice: Any) -> None:
    day = sleeper("day")
    run(switch_request(profile=day, actor=actor_of(alice)))
    job = rest("day")
    assert (job.state, job.summary) == (JobState.SUCCEEDED, "Day sleeps.")
    assert Deployment.objects.get().status == Status.SLEEPING
    woken = run(switch_request(profile=day, actor=actor_of(alice)))
    assert woken.state == JobState.SUCCEEDED, woken.result
    assert (Deployment.objects.count(), Deployment.objects.get().status) == (1, Status.READY)


def test_what_cannot_sleep_is_unloaded(sim_rig: Any, alice: Any) -> None:
    run(switch_request(profile=simulated_profile("plain"), actor=actor_of(alice)))
    job = rest("plain")
    assert (job.state, job.summary) == (JobState.SUCCEEDED, "Plain was stopped.")
    assert Deployment.objects.get().status == Status.STOPPED


def test_the_calendars_switch_comes_up_in_the_panels_name(
    sim_rig: Any, alice: Any, live_store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ticking, "_refused_at", {})
    actor = actor_of(alice)
    run(switch_request(profile=simulated_profile("day"), actor=actor))
    services.rig_policy_set(rig=sim_rig, actor=actor, minimum_residency_seconds=0)
    services.slot_create(
        rig=sim_rig,
        profile=simulated_profile("night"),
        actor=actor,
        days=[timezone.now().weekday()],
        begin=time(0),
        end=time(0),
    )
    ticking.tick(sim_rig.slug)
    job = run(Job.objects.get(state=JobState.QUEUED))
    assert (job.state, job.user_name) == (JobState.SUCCEEDED, "panel"), job.result
    serving = Deployment.objects.get(status=Status.READY)
    assert serving.version.profile.slug == "night"
    ticking.tick(sim_rig.slug)
    assert not Job.objects.filter(state=JobState.QUEUED).exists()
