"""A switch right after an engine's end is not refused for memory that this one is about to let go of."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from django.utils import timezone

from apps.common.actors import actor_of
from apps.deployments import rig_state, settled
from apps.deployments.models import Status
from apps.deployments.services import switch_request
from apps.deployments.status import deployment_transition
from apps.jobs.models import Job
from tests.deployments.conftest import PLANNED, Begun
from tests.deployments.test_plan import frame, running
from tests.factories.profiles import simulated_profile

pytestmark = pytest.mark.django_db
FULL = 22.0
Switched = Callable[[float], Job]


@pytest.fixture
def readings(rig: Any, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """GiB in use on every card, reading by reading; the last one stays."""
    told: list[float] = []

    def latest(_: object) -> Any:
        return frame(rig, dict.fromkeys(range(4), told.pop(0) if len(told) > 1 else told[0]))

    monkeypatch.setattr(rig_state, "latest", latest)
    monkeypatch.setattr(settled, "SETTLE_SECONDS", 1.0)
    monkeypatch.setattr(settled, "AGAIN_SECONDS", 0.01)
    return told


@pytest.fixture
def switched(rig: Any, olivia: Any, begun: Begun) -> Switched:
    """A switch begins so many seconds after what served on all cards has ended."""

    def after(seconds: float) -> Job:
        ended = running(rig, simulated_profile("old"), (0, 1, 2, 3))
        deployment_transition(ended, Status.STOPPING, "superseded")
        deployment_transition(ended, Status.STOPPED, "superseded")
        for replica in ended.replicas.all():
            replica.reservations.update(released_at=timezone.now() - timedelta(seconds=seconds))
        return begun(switch_request(profile=simulated_profile("new", tp=4), actor=actor_of(olivia), rig=rig))

    return after


def test_a_reading_from_before_the_end_refuses_nothing(readings: list[float], switched: Switched) -> None:
    readings += [FULL, FULL, FULL, 0.3]
    assert PLANNED in switched(0).summary


def test_what_others_keep_is_refused_once_it_has_settled(readings: list[float], switched: Switched) -> None:
    """Several readings said so."""
    readings += [FULL] * 4
    job = switched(0)
    assert len(readings) == 1
    assert job.state == "failed"
    assert "cannot start on" in job.summary


def test_nothing_is_waited_for_where_nothing_has_ended_lately(
    readings: list[float], switched: Switched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settled, "SETTLE_SECONDS", 60.0)
    readings += [FULL, FULL, FULL, 0.3]
    assert "cannot start on" in switched(3600).summary
