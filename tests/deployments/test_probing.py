"""What test requests found out about an engine counts for that engine's time of serving alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from apps.deployments import probing, replica_restart
from apps.deployments.models import Replica, RestartPolicy, Status
from apps.deployments.switch_forward import open_traffic
from tests.deployments.test_routes import deployment_on, replica_of

pytestmark = pytest.mark.django_db


def failures(replica: Replica) -> int:
    """Test requests in a row that got no answer, as the rig's tick learns it; none is due now."""
    return probing.probe(replica, "coder", None, RestartPolicy(probe_every_seconds=3600))  # type: ignore[arg-type]


def hung(replica: Replica) -> None:
    assert failures(replica) == 0
    probing._known[probing._key(replica)].failed = 3
    assert failures(replica) == 3


def test_an_engine_does_not_inherit_that_an_earlier_launch_with_its_key_and_port_hung(rig: Any) -> None:
    deployment = deployment_on(rig, status=Status.LOADING)
    replica = replica_of(deployment, 28100)
    hung(replica)
    open_traffic(deployment)
    assert failures(replica) == 0


def test_a_replica_that_loaded_for_long_is_not_taken_for_one_that_hangs(rig: Any) -> None:
    deployment = deployment_on(rig, status=Status.DEGRADED)
    replica = replica_of(deployment, 28101)
    hung(replica)
    job = SimpleNamespace(pk=1, params={"deployment_id": deployment.pk, "replica": replica.index}, profile_name="x")
    replica_restart._route(SimpleNamespace(job=job, sleep=lambda _: None))  # type: ignore[arg-type]
    assert failures(replica) == 0
