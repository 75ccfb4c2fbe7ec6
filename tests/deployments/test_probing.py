"""What test requests found out about an engine counts for that engine's time of serving alone."""

from __future__ import annotations

from typing import Any

import pytest

from apps.audit.models import AuditEntry
from apps.deployments import probing
from apps.deployments.models import Replica, RestartPolicy, Status
from apps.deployments.reconcile import reconcile
from apps.deployments.switch_forward import open_traffic
from apps.jobs.models import JobState
from tests.deployments.test_replica_restarts import deployment, noticed, replica, serve_twins
from tests.deployments.test_routes import deployment_on, replica_of
from tests.deployments.test_switch import eventually, in_thread

pytestmark = pytest.mark.django_db


def failures(replica: Replica) -> int:
    """Test requests in a row that got no answer, as the rig's tick learns it; none is due now."""
    return probing.probe(replica, "coder", None, RestartPolicy(probe_every_seconds=3600))  # type: ignore[arg-type]


def hung(replica: Replica) -> None:
    assert failures(replica) == 0
    probing._known[probing._key(replica)].failed = 3
    assert failures(replica) == 3


def test_an_engine_does_not_inherit_that_an_earlier_launch_with_its_key_and_port_hung(rig: Any) -> None:
    loading = deployment_on(rig, status=Status.LOADING)
    one = replica_of(loading, 28100)
    hung(one)
    open_traffic(loading)
    assert failures(one) == 0


def test_a_replica_that_loaded_for_long_is_not_taken_for_one_that_hangs(
    sim_rig: Any, alice: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for it while it loads, but the rig's tick asks it all the same."""
    monkeypatch.setattr(probing, "AGAIN_SECONDS", 0.1)
    serve_twins(alice, load_seconds=3.0)
    RestartPolicy.objects.update(probe_every_seconds=0.1)
    job = noticed()
    thread = in_thread(job)
    enough = RestartPolicy.objects.get().probe_failures

    def counts_as_hanging() -> bool:
        reconcile()
        return unanswered_by(replica(1)) >= enough

    eventually(counts_as_hanging, "it is asked while it loads")
    thread.join(60)  # no further tick before it serves
    job.refresh_from_db()
    assert job.state == JobState.SUCCEEDED, job.result
    for _ in range(3):
        reconcile()
        assert deployment().status == Status.READY
    assert AuditEntry.objects.filter(action="deployment.degraded").count() == 1


def unanswered_by(one: Replica) -> int:
    known = probing._known.get(probing._key(one))
    return known.failed if known is not None else 0
