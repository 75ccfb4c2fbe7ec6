"""Which key a launch gets: its own, or its profile version's where the engine would compile anew for each."""

from __future__ import annotations

from typing import Any

import pytest

from apps.deployments.launching import reserve
from apps.deployments.models import Deployment
from apps.deployments.plan import plan
from apps.deployments.status import deployment_transition
from apps.installs.models import EngineInstall
from apps.profiles.models import Profile, ProfileVersion
from apps.profiles.selectors import profile_get
from apps.profiles.services import load_shipped


@pytest.fixture
def coder(rig: Any) -> Profile:
    """A rig with cards of its own and vLLM found on it."""
    rig.hardware_source = "nvml"
    rig.save()
    load_shipped()
    return profile_get("qwen25-coder-32b-2xtp2")


def vllm(version: str) -> None:
    EngineInstall.objects.all().delete()
    EngineInstall.objects.create(
        rig_name="bench-01", engine="vllm", name="vllm", version=version, state="ready", command=["/opt/vllm", "serve"]
    )


def keys_of_a_launch(rig: Any, version: ProfileVersion) -> set[str]:
    deployment = Deployment.objects.create(rig=rig, version=version, served_name=version.served_name)
    keys = {r.engine_key for r in reserve(deployment, plan(version, rig))}
    deployment_transition(deployment, "stopping", reason="the test has seen enough")
    deployment_transition(deployment, "stopped", reason="the test has seen enough")
    return keys


def test_a_vllm_that_compiles_per_key_keeps_its_key_from_launch_to_launch(rig: Any, coder: Profile) -> None:
    vllm("0.26.0")
    first, second = (keys_of_a_launch(rig, coder.current) for _ in range(2))
    assert first == second
    assert len(first) == 1  # both replicas compile the same


def test_no_other_profile_version_has_that_key(rig: Any, coder: Profile) -> None:
    vllm("0.26.0")
    other = profile_get("qwen25-coder-32b-tp4").current
    assert keys_of_a_launch(rig, coder.current).isdisjoint(keys_of_a_launch(rig, other))


def test_every_launch_of_a_newer_vllm_has_keys_of_its_own(rig: Any, coder: Profile) -> None:
    vllm("0.33.0")
    first, second = (keys_of_a_launch(rig, coder.current) for _ in range(2))
    assert len(first) == 2
    assert first.isdisjoint(second)
