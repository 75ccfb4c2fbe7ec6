"""One launch with several replicas behind one address, as Ray Serve's: a real process stands in for its launcher."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings

from apps.audit.models import AuditEntry
from apps.common.actors import actor_of
from apps.deployments import launching
from apps.deployments.api import DeploymentOut
from apps.deployments.models import Deployment, Status
from apps.deployments.reconcile import reconcile
from apps.deployments.routes import route_table
from apps.deployments.services import stop_request, switch_request
from apps.installs.models import EngineInstall
from apps.jobs.models import Job, JobState
from apps.jobs.runner import job_claim
from apps.profiles.models import Profile, ProfileVersion
from apps.runners.protocol import ProcessState
from tests.factories.profiles import catalogue_model

FAKE = Path(__file__).with_name("fake_ray_launcher.py")


class Replicas:
    """What the stand-in says of its two replicas."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.say("RUNNING", "RUNNING")

    def say(self, *states: str) -> None:
        self.file.write_text(json.dumps(states))


@pytest.fixture
def replicas(tmp_path: Path) -> Replicas:
    return Replicas(tmp_path / "states.json")


@pytest.fixture
def profile(sim_rig: Any, replicas: Replicas, tmp_path: Path) -> Profile:
    EngineInstall.objects.create(
        rig_name=settings.RIG_NAME,
        engine="ray_serve",
        name="ray (stand-in)",
        version="2.60.0",
        command=[sys.executable, str(FAKE)],
        env={"STATES": str(replicas.file)},
    )
    weights = tmp_path / "weights"
    weights.mkdir()
    made = Profile.objects.create(slug="pair", name="Pair")
    ProfileVersion.objects.create(
        profile=made,
        number=1,
        model=catalogue_model("tiny", checkpoint=str(weights), hf_repo=""),
        engine="ray_serve",
        device="cpu",
        replicas=2,
        tensor_parallel_size=1,
        served_name="tiny",
        options={},
    )
    return made


def run(job: Job) -> Job:
    context = job_claim(job.pk)
    assert context is not None
    context.run()
    job.refresh_from_db()
    return job


@pytest.fixture
def deployment(profile: Profile, alice: Any) -> Deployment:
    job = run(switch_request(profile=profile, actor=actor_of(alice)))
    assert job.state == JobState.SUCCEEDED, job.result
    return Deployment.objects.get(pk=job.deployment_id)


def looked_at(deployment: Deployment) -> Deployment:
    reconcile()
    deployment.refresh_from_db()
    return deployment


def test_both_replicas_are_one_process_behind_one_address(deployment: Deployment) -> None:
    first, second = deployment.replicas.all()
    assert (first.base_url, first.engine_key, first.handle) == (second.base_url, second.engine_key, second.handle)
    assert first.port != second.port
    assert first.healthy
    assert second.healthy
    (entry,) = route_table().routes
    (target,) = entry.targets
    assert (target.base_url, target.engine_key) == (first.base_url, first.engine_key)


def test_one_replica_away_is_degraded_and_still_routed_and_its_return_is_seen(
    deployment: Deployment, replicas: Replicas
) -> None:
    replicas.say("RUNNING", "STARTING")
    epoch = route_table().epoch
    assert looked_at(deployment).status == Status.DEGRADED
    assert deployment.status_reason == "Replica 1 is starting; Ray Serve starts it again, and the others serve on."
    assert [r.healthy for r in deployment.replicas.all()] == [True, False]
    assert len(route_table().routes[0].targets) == 1
    assert route_table().epoch > epoch

    replicas.say("RUNNING", "RUNNING")
    assert looked_at(deployment).status == Status.READY
    assert all(r.healthy for r in deployment.replicas.all())
    acts = [entry.action for entry in AuditEntry.objects.order_by("pk")]
    assert [a for a in acts if a in ("deployment.degraded", "deployment.recovered")] == [
        "deployment.degraded",
        "deployment.recovered",
    ]


def test_with_no_replica_left_nothing_is_routed_to_it(deployment: Deployment, replicas: Replicas) -> None:
    replicas.say("GONE", "STARTING")
    assert looked_at(deployment).status == Status.DEGRADED
    assert "None of its 2 replicas serves" in deployment.status_reason
    assert route_table().routes[0].targets == ()


def test_looking_twice_changes_nothing_more(deployment: Deployment, replicas: Replicas) -> None:
    replicas.say("GONE", "RUNNING")
    looked_at(deployment)
    epoch, events = route_table().epoch, deployment.events.count()
    looked_at(deployment)
    assert (route_table().epoch, deployment.events.count()) == (epoch, events)


def test_condition_and_warnings_are_in_the_api_and_on_the_page(
    deployment: Deployment, replicas: Replicas, client: Any, olivia: Any
) -> None:
    replicas.say("RUNNING", "STARTING")
    shown = DeploymentOut.from_orm(looked_at(deployment))
    assert [(r.index, r.healthy, r.condition) for r in shown.replicas] == [
        (0, True, "running"),
        (1, False, "starting"),
    ]
    assert shown.replicas[0].warnings == ["It listens wide."]
    client.force_login(olivia)
    page = client.get(f"/deployments/{deployment.pk}/").content.decode()
    assert "not healthy (starting)" in page
    assert "It listens wide." in page


def test_a_launcher_that_ended_is_a_failed_deployment(deployment: Deployment) -> None:
    handle = launching.handle_of(deployment.replicas.get(index=0))
    assert handle is not None
    launching.runner().stop(handle)
    assert looked_at(deployment).status == Status.FAILED
    assert all(not route.targets for route in route_table().routes)


def test_stopping_stops_the_one_process(deployment: Deployment, alice: Any) -> None:
    job = run(stop_request(deployment=deployment, actor=actor_of(alice)))
    assert job.state == JobState.SUCCEEDED
    assert any("1 engine process stopped" in (s.detail or "") for s in job.steps.all())
    assert all(launching.observe(r).state == ProcessState.EXITED for r in deployment.replicas.all())
