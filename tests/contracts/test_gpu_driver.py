"""What every GpuDriver owes the panel, asked of each of them.

Needs pytest, psutil and nvidia-ml-py but no Django, so that it also runs alone on a foreign machine:
``python3 -m pytest --noconftest -p no:django -c /dev/null --rootdir . tests/contracts/test_gpu_driver.py``.
Recordings in ``apps/hardware/samples`` are asked the same as live cards.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from apps.hardware.client import HardwareClient
from apps.hardware.codec import inventory_from_dict, reading_from_dict, to_dict
from apps.hardware.nvml import NvmlDriver
from apps.hardware.protocol import THROTTLE_REASONS, GpuDriver, GpuReading, HardwareError
from apps.hardware.replay import ReplayDriver
from apps.hardware.server import HardwareServer
from apps.hardware.simulated import SimulatedDriver, SimulatedRig

SAMPLES = sorted((Path(__file__).parents[2] / "apps" / "hardware" / "samples").glob("*.jsonl"))
DRIVERS = ["simulated", "client", "nvml", *(f"replay:{path.name}" for path in SAMPLES)]


@pytest.fixture(params=DRIVERS)
def driver(request: pytest.FixtureRequest) -> Iterator[GpuDriver]:
    kind = request.param
    if kind == "client":
        with _served(SimulatedDriver(SimulatedRig())) as client:
            yield client
        return
    made: GpuDriver
    if kind == "simulated":
        made = SimulatedDriver(SimulatedRig())
    elif kind == "nvml":
        made = NvmlDriver()
        try:
            made.inventory()
        except HardwareError as error:
            pytest.skip(f"needs an NVIDIA GPU: {error}")
    else:
        made = ReplayDriver(next(path for path in SAMPLES if path.name == kind.removeprefix("replay:")))
    yield made
    made.close()


@pytest.fixture(params=["simulated", "client"])
def breakable(request: pytest.FixtureRequest) -> Iterator[tuple[GpuDriver, SimulatedRig]]:
    """A driver, and the rig behind it in which a card can be made to fall off the bus."""
    rig = SimulatedRig()
    if request.param == "simulated":
        yield SimulatedDriver(rig), rig
    else:
        with _served(SimulatedDriver(rig)) as client:
            yield client, rig


class _served:
    """A client of ``driver`` over a real socket. The folder is short: socket paths end at 107 bytes."""

    def __init__(self, driver: GpuDriver) -> None:
        self._folder = tempfile.mkdtemp(dir="/tmp")
        self._server = HardwareServer(driver, f"{self._folder}/hw.sock")

    def __enter__(self) -> HardwareClient:
        self._server.start()
        self._client = HardwareClient(f"{self._folder}/hw.sock")
        return self._client

    def __exit__(self, *_: object) -> None:
        self._client.close()
        self._server.close()
        shutil.rmtree(self._folder)


def _between(value: float | None, low: float, high: float) -> bool:
    return value is None or low <= value <= high


def test_it_has_the_methods_of_a_gpu_driver(driver: GpuDriver) -> None:
    assert isinstance(driver, GpuDriver)
    assert driver.source


def test_the_inventory_names_where_it_comes_from(driver: GpuDriver) -> None:
    assert driver.inventory().source in ("nvml", "simulated", "replay")


def test_the_inventory_is_the_same_each_time(driver: GpuDriver) -> None:
    first = driver.inventory()
    driver.read()
    assert driver.inventory() == first


def test_every_card_has_its_own_index_and_uuid(driver: GpuDriver) -> None:
    gpus = driver.inventory().gpus
    assert gpus
    assert len({gpu.uuid for gpu in gpus}) == len(gpus)
    assert [gpu.index for gpu in gpus] == sorted({gpu.index for gpu in gpus})
    assert all(gpu.uuid.startswith("GPU-") for gpu in gpus)
    assert all(gpu.name for gpu in gpus)


def test_static_facts_are_plausible_or_unknown(driver: GpuDriver) -> None:
    for gpu in driver.inventory().gpus:
        assert _between(gpu.memory_total_bytes, 1 << 28, 1 << 40)
        assert gpu.pcie_width_max in (None, 1, 2, 4, 8, 16)
        assert _between(gpu.pcie_gen_max, 1, 7)
        assert gpu.numa_node is None or gpu.numa_node >= 0
        for watts in (gpu.power_limit_default_watts, gpu.power_limit_min_watts, gpu.power_limit_max_watts):
            assert _between(watts, 10, 3000), "watts, not milliwatts"
        for celsius in (gpu.temperature_slowdown_celsius, gpu.temperature_shutdown_celsius):
            assert _between(celsius, 50, 130)
        if gpu.compute_capability is not None:
            major, minor = gpu.compute_capability.split(".")
            assert int(major) >= 3
            assert int(minor) >= 0


def test_links_join_cards_of_this_rig(driver: GpuDriver) -> None:
    inventory = driver.inventory()
    uuids = {gpu.uuid for gpu in inventory.gpus}
    bridges = [frozenset((link.gpu_uuid, link.peer_uuid)) for link in inventory.links if link.peer_uuid is not None]
    assert len(bridges) == len(set(bridges)), "a bridge is one link, not one per end"
    for link in inventory.links:
        assert link.gpu_uuid in uuids
        assert link.peer_uuid is None or link.peer_uuid in uuids - {link.gpu_uuid}
        assert 0 <= link.active_lanes <= link.total_lanes
        assert _between(link.gigabytes_per_second_per_lane, 1, 200)


def test_a_reading_has_one_entry_per_card_in_the_order_of_the_inventory(driver: GpuDriver) -> None:
    expected = [gpu.uuid for gpu in driver.inventory().gpus]
    for _ in range(2):
        assert [gpu.uuid for gpu in driver.read().gpus] == expected


def test_a_reading_is_of_now(driver: GpuDriver) -> None:
    before = time.time()
    first, second = driver.read(), driver.read()
    after = time.time()
    # one second of tolerance: a shared reading may be a moment old, and clocks are stepped
    assert before - 1 <= first.at <= second.at <= after + 1


def test_values_are_in_their_units(driver: GpuDriver) -> None:
    infos = {gpu.uuid: gpu for gpu in driver.inventory().gpus}
    for gpu in driver.read().gpus:
        total = infos[gpu.uuid].memory_total_bytes
        assert _between(gpu.utilization_percent, 0, 100)
        assert _between(gpu.memory_used_bytes, 0, total if total is not None else 1 << 40)
        assert _between(gpu.power_watts, 0, 3000)
        assert _between(gpu.power_limit_watts, 10, 3000)
        assert _between(gpu.energy_joules, 0, 1e13)
        assert _between(gpu.temperature_celsius, -20, 130)
        assert _between(gpu.hotspot_temperature_celsius, -20, 150)
        assert _between(gpu.fan_percent, 0, 120)
        assert _between(gpu.sm_clock_mhz, 0, 5000)
        assert _between(gpu.memory_clock_mhz, 0, 20000)
        assert _between(gpu.performance_state, 0, 15)
        assert _between(gpu.pcie_gen, 1, 7)
        assert gpu.pcie_width in (None, 1, 2, 4, 8, 16)
        assert _between(gpu.pcie_replays, 0, 1 << 64)
        assert _between(gpu.nvlink_active_lanes, 0, 36)
        for process in gpu.processes or ():
            assert process.pid > 0
            assert _between(process.memory_used_bytes, 0, 1 << 40)


def test_a_healthy_card_tells_the_basics(driver: GpuDriver) -> None:
    for gpu in driver.read().gpus:
        if not gpu.lost:
            assert gpu.memory_used_bytes is not None
            assert gpu.temperature_celsius is not None
            assert gpu.utilization_percent is not None


def test_what_a_card_refuses_is_none_and_not_zero(driver: GpuDriver) -> None:
    for gpu in driver.read().gpus:
        assert gpu.memory_temperature_celsius is None or gpu.memory_temperature_celsius > 0
        assert gpu.hotspot_temperature_celsius is None or gpu.hotspot_temperature_celsius > 0
        assert gpu.power_limit_watts is None or gpu.power_limit_watts > 0
        if gpu.nvlink_active_lanes is None:
            assert gpu.nvlink_tx_bytes is None
            assert gpu.nvlink_rx_bytes is None


def test_throttle_reasons_are_known_words(driver: GpuDriver) -> None:
    for gpu in driver.read().gpus:
        assert set(gpu.throttle_reasons or ()) <= set(THROTTLE_REASONS)


def test_the_host_is_read_too(driver: GpuDriver) -> None:
    driver.read()
    host = driver.read().host
    assert _between(host.cpu_percent, 0, 100)
    assert host.memory_total_bytes is not None
    assert host.memory_used_bytes is not None
    assert 0 < host.memory_used_bytes <= host.memory_total_bytes


def test_counters_do_not_run_backwards(driver: GpuDriver) -> None:
    first = driver.read()
    time.sleep(0.15)
    for before, after in zip(first.gpus, driver.read().gpus, strict=True):
        for name in (
            "energy_joules",
            "pcie_replays",
            "pcie_tx_bytes",
            "pcie_rx_bytes",
            "nvlink_tx_bytes",
            "nvlink_rx_bytes",
        ):
            earlier, later = getattr(before, name), getattr(after, name)
            assert earlier is None or later is None or later >= earlier, name


def test_what_it_says_survives_json(driver: GpuDriver) -> None:
    inventory, reading = driver.inventory(), driver.read()
    assert inventory_from_dict(json.loads(json.dumps(to_dict(inventory)))) == inventory
    assert reading_from_dict(json.loads(json.dumps(to_dict(reading)))) == reading


def test_its_answers_cannot_be_changed(driver: GpuDriver) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        driver.read().at = 0.0  # type: ignore[misc]


def test_closing_twice_does_no_harm(driver: GpuDriver) -> None:
    driver.read()
    driver.close()
    driver.close()


def test_closing_before_the_first_reading_does_no_harm(driver: GpuDriver) -> None:
    driver.close()


def test_a_lost_card_is_a_reading_in_which_nothing_else_is_known(
    breakable: tuple[GpuDriver, SimulatedRig],
) -> None:
    driver, rig = breakable
    rig.fault("lost", 1)
    uuids = [gpu.uuid for gpu in driver.inventory().gpus]
    reading = driver.read()
    assert [gpu.lost for gpu in reading.gpus] == [False, True, False, False]
    assert reading.gpus[1] == GpuReading(uuid=uuids[1], lost=True)


def test_a_lost_card_stays_in_the_inventory(breakable: tuple[GpuDriver, SimulatedRig]) -> None:
    driver, rig = breakable
    before = driver.inventory().gpus
    rig.fault("lost", 3)
    assert driver.inventory().gpus == before
