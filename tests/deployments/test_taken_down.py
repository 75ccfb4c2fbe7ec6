"""``make down``: every engine of the rig whose name it is given, and a word about the others."""

from __future__ import annotations

from typing import Any

from apps.common.actors import COMMAND_LINE, actor_of
from apps.deployments.services import running_under_other_names, stop_everything, switch_request
from apps.jobs.models import JobState
from tests.deployments.test_switch import engine_pids, run
from tests.factories.profiles import simulated_profile


def test_engines_started_under_another_name_are_left_and_told(sim_rig: Any, alice: Any, settings: Any) -> None:
    job = run(switch_request(profile=simulated_profile("coder", tp=2), actor=actor_of(alice)))
    assert job.state == JobState.SUCCEEDED, job.result
    assert not running_under_other_names()
    settings.RIG_NAME = "renamed"
    assert stop_everything(COMMAND_LINE) == []
    assert running_under_other_names() == {sim_rig.slug: 1}
    assert engine_pids()
    settings.RIG_NAME = sim_rig.slug
    (told,) = stop_everything(COMMAND_LINE)
    assert told.startswith("Coder: ")
    assert not engine_pids()
    settings.RIG_NAME = "renamed"
    assert not running_under_other_names()
