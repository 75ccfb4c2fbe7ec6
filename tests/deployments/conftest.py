"""A rig whose cards and engines are simulated, but whose processes, sockets and rows are real."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.conf import settings

from tests.telemetry.conftest import live_store, valkey_server

PLANNED = "It was planned, and nothing forbade it."
Begun = Callable[[Any], Any]
__all__ = ["live_store", "valkey_server"]


@pytest.fixture
def sim_rig(transactional_db: None) -> Iterator[Any]:
    """``bench-01`` with the simulated cards served on the sampler's socket; ends all engines afterwards."""
    from apps.deployments import launching
    from apps.deployments.models import Deployment
    from apps.hardware.server import HardwareServer
    from apps.hardware.simulated import SimulatedDriver, SimulatedRig
    from apps.rigs.models import Gpu, Link, Rig

    driver = SimulatedDriver(SimulatedRig(seed=7))
    server = HardwareServer(driver, settings.SAMPLER_SOCKET)
    server.start()
    inventory = driver.inventory()
    rig = Rig.objects.create(slug=settings.RIG_NAME, hardware_source="simulated")
    gpus = {
        g.uuid: Gpu.objects.create(
            rig=rig, index=g.index, uuid=g.uuid, name=g.name, memory_total_bytes=g.memory_total_bytes, pcie_width_max=16
        )
        for g in inventory.gpus
    }
    seen = set()
    for link in inventory.links:
        pair = frozenset((link.gpu_uuid, link.peer_uuid or ""))
        if link.peer_uuid in gpus and pair not in seen:
            seen.add(pair)
            Link.objects.create(
                rig=rig,
                first=gpus[link.gpu_uuid],
                second=gpus[link.peer_uuid],
                active_lanes=link.active_lanes,
                total_lanes=link.total_lanes,
                gigabytes_per_second_per_lane=link.gigabytes_per_second_per_lane,
            )
    yield rig
    for deployment in Deployment.objects.all():
        launching.stop_processes(deployment)
    server.stop()


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> Begun:
    """Begins a switch and ends it where it would touch engines: rows made by hand have none, and no cards to start one
    on."""
    from apps.deployments import switch_forward
    from apps.jobs.handlers import JobFailed
    from tests.deployments.test_switch import run

    def hold_step(_: Any) -> str:
        raise JobFailed(PLANNED)

    monkeypatch.setattr(switch_forward, "hold_step", hold_step)
    return run
