"""Predicted against actual: a launch keeps both, the model's page shows the error, the next plan learns."""

from __future__ import annotations

from typing import Any

import pytest
from django.test import Client

from apps.common.actors import actor_of
from apps.deployments.boots import compared, fingerprint
from apps.deployments.models import Boot, Deployment
from apps.deployments.plan import plan
from apps.deployments.services import switch_request
from apps.jobs.models import JobState
from apps.jobs.runner import job_claim
from apps.profiles.fit import prediction_of
from apps.profiles.models import Profile
from apps.profiles.selectors import profile_get
from apps.profiles.services import load_shipped, profile_update

GIB = 2**30
SLUG = "qwen25-coder-32b-2xtp2"


def boot(rig: Any, profile: Profile, **factors: float) -> Boot:
    """A launch that came up with so many times the middle of what was said."""
    version = profile.current
    deployment = Deployment.objects.create(
        rig=rig, version=version, served_name="x", status="stopped", engine_version="simulated 1"
    )
    said = prediction_of(plan(version, rig).uncorrected.estimate)
    assert said is not None
    actual = {name: int(getattr(said, name).middle * factor) for name, factor in factors.items()}
    return Boot.objects.create(
        deployment=deployment,
        rig=rig,
        model=version.model,
        engine_version="simulated 1",
        layout=version.layout,
        fingerprint=fingerprint(version, "simulated 1"),
        predicted=said.to_dict(),
        uncorrected=said.to_dict(),
        actual={**actual, "compiled": said.compiles},
    )


@pytest.fixture
def coder(rig: Any) -> Profile:
    load_shipped()
    return profile_get(SLUG)


def test_the_next_plan_expects_what_this_rig_showed_and_a_compile_cache(coder: Profile, rig: Any, olivia: Any) -> None:
    before = plan(coder.current, rig).forecast
    assert before.estimate.next_boot_compiles
    boot(rig, coder, weights=1.0, non_torch=1.3)
    after = plan(coder.current, rig)
    assert not after.forecast.estimate.next_boot_compiles
    assert after.forecast.corrected_by == 1
    assert after.forecast.estimate.gpus[0].non_torch.middle > before.estimate.gpus[0].non_torch.middle * 1.25
    assert after.uncorrected.estimate.gpus[0].non_torch == before.estimate.gpus[0].non_torch
    # Another utilisation finds the same kernels; another length compiles afresh, and is corrected all the same.
    options = coder.current.options
    profile_update(coder, actor=actor_of(olivia), options={**options, "gpu_memory_utilization": 0.88})
    assert not plan(coder.current, rig).forecast.estimate.next_boot_compiles
    profile_update(coder, actor=actor_of(olivia), options={**options, "max_model_len": 16384})
    found = plan(coder.current, rig).forecast
    assert found.estimate.next_boot_compiles
    assert found.corrected_by == 1


def test_what_another_model_weighed_more_is_not_expected_here(coder: Profile, rig: Any) -> None:
    other = profile_get("mixtral-8x22b-tp4")
    before = plan(other.current, rig).forecast.estimate.gpus[0]
    boot(rig, coder, weights=1.02, non_torch=1.3)
    after = plan(other.current, rig).forecast.estimate.gpus[0]
    assert after.weights == before.weights
    assert after.non_torch.middle > before.non_torch.middle


def test_a_correction_does_not_feed_on_itself(coder: Profile, rig: Any) -> None:
    for _ in range(4):
        boot(rig, coder, non_torch=1.3)
    factor = plan(coder.current, rig).forecast.estimate.gpus[0].non_torch.middle
    boot(rig, coder, non_torch=1.3)
    assert plan(coder.current, rig).forecast.estimate.gpus[0].non_torch.middle == pytest.approx(factor, rel=1e-6)


def test_the_models_page_shows_the_error(client: Client, coder: Profile, rig: Any, charlie: Any) -> None:
    client.force_login(charlie)
    address = f"/models/{coder.current.model.slug}/"
    assert "Predicted and actual" not in client.get(address).content.decode()
    row = boot(rig, coder, weights=0.98, activation=1.0, non_torch=1.1)
    page = client.get(address).content.decode()
    assert "Predicted and actual" in page
    assert "+2.0 %" in page
    told = client.get(f"/api/v1/deployments/{row.deployment_id}").json()["boot"]
    assert told["actual"]["compiled"] is True
    assert told["predicted"]["weights"]["low"] > 8 * GIB


def test_a_number_is_in_range_within_the_decimals_of_a_log() -> None:
    said = {"weights": {"low": 10 * GIB, "high": 11 * GIB}}
    assert [c.within for c in compared(said, {"weights": int(9.996 * GIB)})] == [True]
    assert [c.within for c in compared(said, {"weights": int(9.95 * GIB)})] == [False]
    assert compared(said, {}) == ()


def test_a_real_switch_stores_both(sim_rig: Any, alice: Any) -> None:
    load_shipped()
    profile = profile_get(SLUG)
    context = job_claim(switch_request(profile=profile, actor=actor_of(alice)).pk)
    assert context is not None
    context.run()
    assert context.job.state == JobState.SUCCEEDED, context.job.result
    row = Boot.objects.get(deployment_id=context.job.deployment_id)
    assert row.actual is not None
    assert row.actual["compiled"] is True
    found = compared(row.predicted, row.actual)
    assert {c.name for c in found} >= {"Weights", "KV cache tokens", "Activation peak", "CUDA graphs", "Other"}
    assert all(c.within for c in found), found
    assert plan(profile.current, sim_rig).forecast.estimate.next_boot_compiles is False


def test_a_cache_that_does_not_carry_over_is_noticed(coder: Profile, rig: Any) -> None:
    first = boot(rig, coder, weights=1.0)
    assert not plan(coder.current, rig).forecast.estimate.next_boot_compiles
    again = boot(rig, coder, weights=1.0)
    for row in (first, again):
        Boot.objects.filter(pk=row.pk).update(actual={**(row.actual or {}), "compiled": True})
    assert plan(coder.current, rig).forecast.estimate.next_boot_compiles
