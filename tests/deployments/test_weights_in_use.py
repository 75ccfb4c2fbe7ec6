"""Weights are not deleted under what waits to load them: queued switches, restarts, and what a switch owes a return."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from django.test import Client

from apps.catalog.models import Weights
from apps.catalog.services import weights_register
from apps.catalog.weights.disk import disk_report
from apps.common.actors import COMMAND_LINE, actor_of
from apps.deployments.models import Deployment, Desired, Status
from apps.deployments.services import switch_request
from apps.jobs.models import Job, JobState
from apps.profiles.models import Profile
from tests.catalog.test_weights import finish, put
from tests.factories.profiles import llama_cpp_profile

pytestmark = pytest.mark.django_db


@pytest.fixture
def models(settings: Any, rig: Any, tmp_path: Path) -> Path:
    settings.RIG_NAME, settings.MODELS_DIR = rig.slug, tmp_path / "models"
    put(settings.MODELS_DIR / "tiny" / "abc", {"q4.gguf": b"GGUF4", "q8.gguf": b"GGUF8"})
    return tmp_path / "models" / "tiny" / "abc"


def on_cpu(slug: str, file: Path) -> Profile:
    profile = llama_cpp_profile(slug)
    weights_register(profile.current.model, rig_name="bench-01", path=str(file), size_bytes=5, actor=COMMAND_LINE)
    return profile


def refusal(client: Client) -> str:
    answer = client.post("/api/v1/weights/delete", {"place": "tiny/abc"}, content_type="application/json")
    return str(answer.json()["error"]["message"]) if answer.status_code == 409 else ""


def test_a_queued_switch_needs_its_weights(client: Client, rig: Any, models: Path, olivia: Any) -> None:
    client.force_login(olivia)
    job = switch_request(profile=on_cpu("tiny", models / "q4.gguf"), actor=actor_of(olivia), rig=rig)
    assert refusal(client) == "tiny/abc is in use by Tiny (Switch to Tiny). Stop or cancel that first."
    assert f"/jobs/{job.pk}/" in client.get("/models/disk/").content.decode()
    Job.objects.update(state=JobState.CANCELLED)
    assert refusal(client) == ""


def test_what_is_started_again_after_a_failure_needs_them_too(
    client: Client, rig: Any, models: Path, olivia: Any
) -> None:
    client.force_login(olivia)
    version = on_cpu("tiny", models / "q4.gguf").current
    Deployment.objects.create(rig=rig, version=version, served_name="tiny", status=Status.FAILED)
    assert refusal(client) == "tiny/abc is in use by Tiny (is started again). Stop or cancel that first."
    Deployment.objects.update(desired=Desired.STOPPED)
    assert refusal(client) == ""


def test_what_a_switch_would_bring_back_needs_them_too(client: Client, rig: Any, models: Path, olivia: Any) -> None:
    client.force_login(olivia)
    old = on_cpu("tiny", models / "q4.gguf").current
    job = switch_request(profile=on_cpu("other", Path("/elsewhere/x.gguf")), actor=actor_of(olivia), rig=rig)
    assert refusal(client) == ""
    Job.objects.filter(pk=job.pk).update(data={"fallback": [old.pk], "stopped_old": True})
    Job.objects.filter(kind="remove_weights").delete()
    assert refusal(client) == "tiny/abc is in use by Tiny (Switch to Other). Stop or cancel that first."


@pytest.mark.django_db(transaction=True)
def test_two_quantizations_in_one_folder_are_both_known_and_both_forgotten(
    client: Client, rig: Any, models: Path, olivia: Any
) -> None:
    on_cpu("small", models / "q4.gguf")
    large = on_cpu("large", models / "q8.gguf")
    (place,) = disk_report().places
    assert [w.model.slug for w in place.weights] == ["small", "large"]
    assert {u.label for u in place.profiles} == {"Small", "Large"}
    assert disk_report().elsewhere == []
    client.force_login(olivia)
    assert client.get("/api/v1/weights").json()["places"][0]["models"] == ["small", "large"]
    Deployment.objects.create(rig=rig, version=large.current, served_name="large", status=Status.READY)
    assert "in use by Large (Ready)" in refusal(client)
    Deployment.objects.update(status=Status.STOPPED)
    assert refusal(client) == ""
    assert finish(Job.objects.get(kind="remove_weights")).state == JobState.SUCCEEDED
    assert not Weights.objects.exists()
