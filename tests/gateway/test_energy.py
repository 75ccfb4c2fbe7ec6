"""Energy is shared by the time that requests took of it; what nobody asked for is nobody's."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from apps.deployments.models import Deployment, GpuReservation, Replica
from apps.gateway.energy import Interval, attribute, shares
from apps.gateway.ledger import add_to_days
from apps.gateway.models import UsageDay, UsageRecord, UsageSpool
from apps.rigs.models import Gpu
from apps.telemetry.models import Sample
from tests.factories.profiles import simulated_profile

NOW = datetime(2027, 3, 4, 12, 0, tzinfo=UTC)
TWELVE = NOW.timestamp()


def test_a_request_that_fills_a_fifth_of_the_time_gets_a_fifth_and_twenty_get_a_twentieth_each() -> None:
    assert shares({0: 1000.0}, [Interval(1, 2, 4)]) == {1: 200.0}
    many = shares({0: 1000.0}, [Interval(n, 0, 10) for n in range(20)])
    assert set(many.values()) == {50.0}
    assert shares({0: 1000.0, 10: 500.0}, [Interval(1, 5, 15)]) == {1: 750.0}
    assert shares({0: 1000.0}, [Interval(1, 10, 20)]) == {}


INTERVALS = st.lists(st.tuples(st.floats(0, 100), st.floats(0, 60)), max_size=20)


@given(INTERVALS)
def test_nobody_is_charged_for_more_than_was_used(intervals: list[tuple[float, float]]) -> None:
    spans = dict.fromkeys(range(0, 200, 10), 100.0)
    got = shares(spans, [Interval(n, start, start + length) for n, (start, length) in enumerate(intervals)])
    assert sum(got.values()) <= sum(spans.values()) + 1e-6
    assert all(amount >= 0 for amount in got.values())


def deployment_on(rig: Any, cards: int) -> Deployment:
    deployment = Deployment.objects.create(
        rig=rig, version=simulated_profile("coder").current, served_name="coder", status="ready"
    )
    replica = Replica.objects.create(
        deployment=deployment, index=0, launch_id="x", host="h", port=1, base_url="http://h:1", engine_key="k"
    )
    for gpu in Gpu.objects.filter(rig=rig).order_by("index")[:cards]:
        GpuReservation.objects.create(rig=rig, gpu=gpu, replica=replica)
    return deployment


def asked(spool: UsageSpool, number: int, deployment: Deployment, user: Any, *, ago_s: float, seconds: float) -> None:
    record = UsageRecord.objects.create(
        spool=spool, number=number, at=NOW - timedelta(seconds=ago_s), user=user, model="coder", path="/v1/x",
        deployment_id=deployment.pk, duration_ms=round(seconds * 1000), outcome="ok", tokens_out=1,
    )  # fmt: skip
    add_to_days([record])


def test_requests_get_the_joules_of_their_deployments_cards_once(rig: Any, alice: Any, bob: Any) -> None:
    deployment = deployment_on(rig, 2)
    spool = UsageSpool.objects.create(name="x")
    start = TWELVE - 600
    for gpu in Gpu.objects.filter(rig=rig):
        for span in range(6):
            Sample.objects.create(
                rig=rig, gpu_uuid=gpu.uuid, seconds=10, energy_joules=1000.0,
                at=datetime.fromtimestamp(start + 10 * span, UTC),
            )  # fmt: skip
    asked(spool, 1, deployment, alice, ago_s=600, seconds=10)  # alone for a span: 2 cards × 1000 J
    asked(spool, 2, deployment, alice, ago_s=590, seconds=20)  # two spans, shared with bob's
    asked(spool, 3, deployment, bob, ago_s=590, seconds=20)
    asked(spool, 4, deployment, bob, ago_s=60, seconds=10)  # too young: its samples may still come
    assert attribute(NOW) == 3
    assert attribute(NOW) == 0
    energy = dict(UsageDay.objects.values_list("user__email", "energy_joules"))
    assert energy == {alice.email: 4000.0, bob.email: 2000.0}
    assert UsageRecord.objects.get(number=4).energy_joules is None


def test_what_runs_on_the_processor_is_not_measured(rig: Any, bob: Any) -> None:
    deployment = deployment_on(rig, 0)
    asked(UsageSpool.objects.create(name="x"), 1, deployment, bob, ago_s=600, seconds=10)
    assert attribute(NOW) == 0
    assert UsageRecord.objects.get().energy_joules is None
