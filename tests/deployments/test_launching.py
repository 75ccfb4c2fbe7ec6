"""Starting and stopping engines of a deployment, where both happen at once."""

from __future__ import annotations

from typing import Any

import pytest

from apps.deployments import launching
from apps.deployments.models import Deployment
from apps.deployments.plan import plan
from apps.jobs.handlers import JobFailed
from tests.deployments.test_switch import engine_pids
from tests.factories.profiles import simulated_profile


def test_what_was_stopped_before_it_began_begins_no_more(sim_rig: Any) -> None:
    """Its cards are given away then; a worker that was frozen over its start wakes later."""
    version = simulated_profile("coder", tp=2, replicas=2).current
    deployment = Deployment.objects.create(rig=sim_rig, version=version, served_name="coder")
    the_plan = plan(version, sim_rig)
    launching.reserve(deployment, the_plan)
    assert launching.stop_processes(deployment) == "nothing ran"
    with pytest.raises(JobFailed, match="given up before it began"):
        launching.launch(deployment, the_plan)
    assert engine_pids() == set()
