from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import Any

import pytest
from django.db import IntegrityError, transaction
from django.utils import timezone

from apps.common.identity import process_key
from apps.common.models import Epoch
from apps.deployments import routes
from apps.deployments.models import Deployment, GatewayProcess, GpuReservation, Replica, Route, Status
from apps.deployments.status import deployment_transition
from tests.factories.profiles import simulated_profile

LIVE_KEY = process_key()


def deployment_on(rig: Any, slug: str = "coder", status: str = Status.READY) -> Deployment:
    version = simulated_profile(slug).current
    return Deployment.objects.create(rig=rig, version=version, served_name=version.served_name, status=status)


def replica_of(deployment: Deployment, port: int, **values: Any) -> Replica:
    return Replica.objects.create(
        deployment=deployment,
        index=deployment.replicas.count(),
        launch_id=f"d{deployment.pk}-{port}",
        host="127.0.0.1",
        port=port,
        base_url=f"http://127.0.0.1:{port}",
        engine_key="re-x",
        **values,
    )


def test_a_route_leads_to_the_healthy_replicas_of_what_serves(rig: Any) -> None:
    deployment = deployment_on(rig)
    replica_of(deployment, 28100, healthy=True)
    replica_of(deployment, 28101, healthy=False)
    routes.open_to(deployment)
    (entry,) = routes.route_table().routes
    assert [t.base_url for t in entry.targets] == ["http://127.0.0.1:28100"]


def test_a_held_route_has_no_targets_and_release_opens_what_still_serves(rig: Any) -> None:
    deployment = deployment_on(rig)
    replica_of(deployment, 28100, healthy=True)
    routes.open_to(deployment)
    routes.hold(["coder", "newcomer"], job_id=1, eta_at=None)
    assert {(e.served_name, e.state, e.targets) for e in routes.route_table().routes} == {
        ("coder", "held", ()),
        ("newcomer", "held", ()),
    }
    routes.release(1)
    assert [(r.served_name, r.state) for r in Route.objects.all()] == [("coder", "open")]


def test_every_change_of_a_route_raises_the_epoch(rig: Any) -> None:
    deployment = deployment_on(rig)
    seen = [routes.open_to(deployment), routes.hold(["coder"], job_id=1, eta_at=None), routes.release(1)]
    seen.append(routes.close(deployment))
    assert seen == sorted(set(seen))
    assert Epoch.current(routes.ROUTES_EPOCH) == seen[-1]


@pytest.mark.django_db
def test_an_epoch_counts_as_acknowledged_when_every_living_gateway_has_it() -> None:
    routes.gateway_seen(LIVE_KEY, epoch=3, in_flight={7: 2, 8: 0})
    routes.gateway_seen(f"elsewhere:{os.getpid()}:1.0", epoch=4, in_flight={7: 1})
    assert routes.all_acknowledged(3)
    assert not routes.all_acknowledged(4)
    assert routes.in_flight([7]) == 3
    assert routes.in_flight([8]) == 0


@pytest.mark.django_db
def test_a_gateway_known_to_be_dead_is_not_waited_for() -> None:
    routes.gateway_seen(f"{socket.gethostname()}:{os.getpid()}:1.00", epoch=1, in_flight={7: 5})  # another birth time
    routes.gateway_seen("elsewhere:1:1.0", epoch=1, in_flight={})
    GatewayProcess.objects.filter(key="elsewhere:1:1.0").update(seen_at=timezone.now() - timedelta(minutes=1))
    assert routes.live_gateways() == []
    assert routes.all_acknowledged(99)
    assert routes.in_flight([7]) == 0


def test_a_second_layout_cannot_take_a_reserved_gpu(rig: Any) -> None:
    gpu = rig.gpus.first()
    first = replica_of(deployment_on(rig, "first"), 28100)
    second = replica_of(deployment_on(rig, "second"), 28101)
    GpuReservation.objects.create(rig=rig, gpu=gpu, replica=first)
    with pytest.raises(IntegrityError), transaction.atomic():
        GpuReservation.objects.create(rig=rig, gpu=gpu, replica=second)


def test_a_second_model_cannot_take_the_cpu_slot(rig: Any) -> None:
    first = replica_of(deployment_on(rig, "first"), 28100)
    second = replica_of(deployment_on(rig, "second"), 28101)
    GpuReservation.objects.create(rig=rig, gpu=None, slot="cpu", replica=first)
    with pytest.raises(IntegrityError), transaction.atomic():
        GpuReservation.objects.create(rig=rig, gpu=None, slot="cpu", replica=second)


def test_a_second_live_replica_cannot_have_the_same_port(rig: Any) -> None:
    replica_of(deployment_on(rig, "first"), 28100)
    with pytest.raises(IntegrityError), transaction.atomic():
        replica_of(deployment_on(rig, "second"), 28100)


def test_the_end_of_a_deployment_frees_its_cards_and_ports(rig: Any) -> None:
    deployment = deployment_on(rig, status=Status.STOPPING)
    replica = replica_of(deployment, 28100)
    GpuReservation.objects.create(rig=rig, gpu=rig.gpus.first(), replica=replica)
    assert deployment_transition(deployment, Status.STOPPED, "asked to")
    assert not GpuReservation.objects.filter(released_at=None).exists()
    assert not Replica.objects.filter(released_at=None).exists()
    assert deployment.events.get().to_status == Status.STOPPED


def test_of_two_who_move_a_deployment_only_one_wins(rig: Any) -> None:
    deployment = deployment_on(rig)
    other = Deployment.objects.get(pk=deployment.pk)
    assert deployment_transition(deployment, Status.DRAINING)
    assert not deployment_transition(other, Status.FAILED, "too late")
    assert other.status == Status.DRAINING
    assert deployment.events.count() == 1
