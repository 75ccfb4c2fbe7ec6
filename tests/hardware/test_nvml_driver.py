"""The NVML driver against a stand-in for NVIDIA's library that answers and refuses as real cards do.

The answers of the GeForce are those of real 3090 dumps, those of the H200 were measured on one.
The driver on a real card is asked by ``tests/contracts/test_gpu_driver.py``.
"""

from __future__ import annotations

import collections
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from apps.hardware.nvml import NvmlDriver
from apps.hardware.nvml.links import Lane, links_from_lanes
from apps.hardware.protocol import GpuReading, HardwareError, HostReading, Link

NOT_SUPPORTED = pynvml.NVML_ERROR_NOT_SUPPORTED
INVALID = pynvml.NVML_ERROR_INVALID_ARGUMENT
UNKNOWN = pynvml.NVML_ERROR_UNKNOWN
LOST = pynvml.NVML_ERROR_GPU_IS_LOST


class Refuse:
    def __init__(self, error: int) -> None:
        self.error = error


class VendorLibrary:
    """Functions of NVML over scripted cards; what is not scripted is refused as not supported."""

    def __init__(self, *cards: dict[Any, Any], init_error: int | None = None) -> None:
        self.cards = list(cards)
        self.init_error = init_error
        self.initialised = 0
        self.calls: collections.Counter[str] = collections.Counter()

    def nvmlInit(self) -> None:
        if self.init_error is not None:
            raise pynvml.NVMLError(self.init_error)
        self.initialised += 1

    def nvmlShutdown(self) -> None:
        self.initialised -= 1

    def nvmlDeviceGetCount(self) -> int:
        return len(self.cards)

    def nvmlSystemGetDriverVersion(self) -> str:
        return "590.44.01"

    def nvmlSystemGetCudaDriverVersion(self) -> int:
        return 13010

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if self.cards[index].get("lost"):
            raise pynvml.NVMLError(LOST)
        return index

    def nvmlDeviceGetFieldValues(self, device: int, wanted: list[tuple[int, int]]) -> list[Any]:
        self.calls["nvmlDeviceGetFieldValues"] += 1
        values = []
        for item in wanted:
            self.calls[f"field {item[0]}"] += 1
            answer = LOST if self.cards[device].get("lost") else self.cards[device]["fields"].get(item, NOT_SUPPORTED)
            # A field is answered as (value type, value), refused as an error number.
            kind, value = answer if isinstance(answer, tuple) else (0, 0)
            union = pynvml.c_nvmlValue_t()
            setattr(union, ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")[kind], value)
            refused = 0 if isinstance(answer, tuple) else answer
            values.append(SimpleNamespace(nvmlReturn=refused, valueType=kind, value=union))
        return values

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(device: int, *arguments: Any) -> Any:
            self.calls[name] += 1
            card = self.cards[device]
            answer = LOST if card.get("lost") else card.get((name, *arguments), card.get(name, Refuse(NOT_SUPPORTED)))
            if card.get("lost"):
                answer = Refuse(LOST)
            if isinstance(answer, Refuse):
                raise pynvml.NVMLError(answer.error)
            return answer

        return call


def uint(value: int) -> tuple[int, int]:
    return (pynvml.NVML_VALUE_TYPE_UNSIGNED_INT, value)


def ulonglong(value: int) -> tuple[int, int]:
    return (pynvml.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG, value)


def geforce(number: int, peer: int | None, **changes: Any) -> dict[Any, Any]:
    """An idle 3090; ``peer`` is the card at the other end of its bridge."""
    card: dict[Any, Any] = {
        "nvmlDeviceGetUUID": f"GPU-{number}",
        "nvmlDeviceGetName": "NVIDIA GeForce RTX 3090",
        "nvmlDeviceGetPciInfo": SimpleNamespace(busId=f"00000000:{number + 9:02X}:00.0"),
        ("nvmlDeviceGetMemoryInfo", pynvml.nvmlMemory_v2): SimpleNamespace(total=24576 << 20, used=7 << 20),
        "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=24576 << 20, used=457 << 20),
        "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=0, memory=1),
        "nvmlDeviceGetTemperature": 32,
        "nvmlDeviceGetFanSpeed": 0,
        "nvmlDeviceGetPerformanceState": 8,
        ("nvmlDeviceGetClockInfo", pynvml.NVML_CLOCK_SM): 210,
        ("nvmlDeviceGetClockInfo", pynvml.NVML_CLOCK_MEM): 405,
        "nvmlDeviceGetCurrentClocksEventReasons": 0x4,
        "nvmlDeviceGetPowerUsage": 35060,
        "nvmlDeviceGetEnforcedPowerLimit": 350000,
        "nvmlDeviceGetPowerManagementDefaultLimit": 350000,
        "nvmlDeviceGetPowerManagementLimitConstraints": [100000, 480000],
        "nvmlDeviceGetTotalEnergyConsumption": 31002947,
        ("nvmlDeviceGetTemperatureThreshold", 0): 98,
        ("nvmlDeviceGetTemperatureThreshold", 1): 95,
        "nvmlDeviceGetCurrPcieLinkGeneration": 1,
        "nvmlDeviceGetCurrPcieLinkWidth": 16,
        "nvmlDeviceGetMaxPcieLinkGeneration": 4,
        "nvmlDeviceGetMaxPcieLinkWidth": 16,
        "nvmlDeviceGetPcieReplayCounter": 0,
        "nvmlDeviceGetCudaComputeCapability": (8, 6),
        "nvmlDeviceGetPersistenceMode": 1,
        "nvmlDeviceGetComputeRunningProcesses_v3": [],
        "nvmlDeviceGetGraphicsRunningProcesses_v3": [],
        "fields": {(186, 0): uint(35150), (185, 0): uint(35060), (197, 0): uint(1000), (198, 0): uint(2000)},
    }
    for lane in range(4 if peer is not None else 0):
        card[("nvmlDeviceGetNvLinkState", lane)] = 1
        card[("nvmlDeviceGetNvLinkRemotePciInfo", lane)] = SimpleNamespace(busId=f"0000:{(peer or 0) + 9:02x}:00.0")
        card["fields"][(84 + lane, 0)] = uint(14062)
        card["fields"][(138, lane)] = ulonglong(10 + lane)
        card["fields"][(139, lane)] = ulonglong(20 + lane)
    if peer is not None:
        card[("nvmlDeviceGetNvLinkState", 4)] = Refuse(INVALID)
    return card | changes


class Bench:
    """A driver over a stand-in library, with a clock that the test turns."""

    def __init__(self, *cards: dict[Any, Any], sysfs_root: str | Path = "/nonexistent", **options: Any) -> None:
        self.time = 100.0
        self.library = VendorLibrary(*cards, **options)
        self.driver = NvmlDriver(
            library=self.library,
            sysfs_root=sysfs_root,
            now=lambda: self.time,
            monotonic=lambda: self.time,
            host=lambda: HostReading(None, None, None),
        )

    def card(self) -> GpuReading:
        return self.driver.read().gpus[0]


def test_a_3090_is_read_in_the_units_of_the_protocol() -> None:
    card = Bench(geforce(0, 1), geforce(1, 0)).card()
    assert card.power_watts == 35.15
    assert card.power_limit_watts == 350
    assert card.energy_joules == 31002.947
    assert card.memory_used_bytes == 7 << 20, "as nvidia-smi shows it, without the driver's reserve"
    assert card.nvlink_tx_bytes == (10 + 11 + 12 + 13) * 1024
    assert card.nvlink_rx_bytes == (20 + 21 + 22 + 23) * 1024
    assert (card.pcie_tx_bytes, card.pcie_rx_bytes) == (1000, 2000)
    assert card.throttle_reasons == ("sw_power_cap",)


def test_a_zero_that_is_meant_is_kept() -> None:
    card = Bench(geforce(0, None, nvmlDeviceGetPerformanceState=0, nvmlDeviceGetCurrentClocksEventReasons=0)).card()
    assert card.performance_state == 0
    assert card.fan_percent == 0
    assert card.utilization_percent == 0
    assert card.throttle_reasons == ()
    assert card.pcie_replays == 0


def test_what_a_geforce_refuses_is_none() -> None:
    card = Bench(geforce(0, None)).card()
    assert card.memory_temperature_celsius is None
    assert card.hotspot_temperature_celsius is None
    assert card.nvlink_active_lanes is None
    assert card.nvlink_tx_bytes is None


def test_a_memory_temperature_of_zero_is_a_refusal() -> None:
    card = geforce(0, None)
    card["fields"][(82, 0)] = uint(0)
    assert Bench(card).card().memory_temperature_celsius is None


def test_a_passively_cooled_card_has_no_fan_speed() -> None:
    card = geforce(0, None, nvmlDeviceGetFanSpeed=Refuse(INVALID))
    card["fields"][(82, 0)] = uint(50)
    reading = Bench(card).card()
    assert reading.fan_percent is None
    assert reading.memory_temperature_celsius == 50


def test_an_unknown_performance_state_is_none() -> None:
    assert Bench(geforce(0, None, nvmlDeviceGetPerformanceState=32)).card().performance_state is None


def test_a_card_that_refuses_everything_is_unknown_and_not_lost() -> None:
    reading = Bench({"nvmlDeviceGetUUID": "GPU-0", "fields": {}}).card()
    assert reading == GpuReading(uuid="GPU-0")


def test_older_drivers_are_asked_by_the_older_names() -> None:
    card = geforce(
        0,
        None,
        nvmlDeviceGetCurrentClocksEventReasons=Refuse(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND),
        nvmlDeviceGetCurrentClocksThrottleReasons=0x20,
        fields={},
    )
    card["nvmlDeviceGetMemoryInfo", pynvml.nvmlMemory_v2] = Refuse(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
    reading = Bench(card).card()
    assert reading.throttle_reasons == ("sw_thermal",)
    assert reading.memory_used_bytes == 457 << 20
    assert reading.power_watts == 35.06


def test_a_refused_call_rests_for_a_minute_and_is_then_asked_again() -> None:
    bench = Bench(geforce(0, None, nvmlDeviceGetFanSpeed=Refuse(NOT_SUPPORTED)))
    for _ in range(30):
        bench.driver.read()
        bench.time += 1
    assert bench.library.calls["nvmlDeviceGetFanSpeed"] == 1
    assert bench.library.calls["field 82"] == 1
    bench.time += 60
    bench.library.cards[0]["nvmlDeviceGetFanSpeed"] = 30
    assert bench.card().fan_percent == 30


def test_an_unknown_error_is_asked_again_at_once() -> None:
    bench = Bench(geforce(0, None, nvmlDeviceGetTemperature=Refuse(UNKNOWN)))
    assert bench.card().temperature_celsius is None
    bench.library.cards[0]["nvmlDeviceGetTemperature"] = 40
    assert bench.card().temperature_celsius == 40


def test_slow_calls_are_made_once_a_second_and_processes_every_two() -> None:
    bench = Bench(geforce(0, None))
    for _ in range(50):
        bench.driver.read()
        bench.time += 0.2
    calls = bench.library.calls
    assert calls["nvmlDeviceGetUtilizationRates"] == 50
    assert 9 <= calls["nvmlDeviceGetTotalEnergyConsumption"] <= 10
    assert 4 <= calls["nvmlDeviceGetComputeRunningProcesses_v3"] <= 5
    assert calls["nvmlDeviceGetFieldValues"] == 50, "all fields in one call per reading"
    assert calls["nvmlDeviceGetPcieThroughput"] == 0


def test_a_byte_counter_that_wraps_goes_on() -> None:
    bench = Bench(geforce(0, None))
    fields = bench.library.cards[0]["fields"]
    seen = []
    for raw in ((1 << 32) - 100, 50, 60, 10):
        fields[(197, 0)] = uint(raw)
        seen.append(bench.card().pcie_tx_bytes)
    assert seen == [(1 << 32) - 100, (1 << 32) + 50, (1 << 32) + 60, (2 << 32) + 10]


def test_processes_of_both_lists_are_merged_and_named() -> None:
    me = os.getpid()
    card = geforce(
        0,
        None,
        nvmlDeviceGetComputeRunningProcesses_v3=[SimpleNamespace(pid=me, usedGpuMemory=5 << 30)],
        nvmlDeviceGetGraphicsRunningProcesses_v3=[
            SimpleNamespace(pid=me, usedGpuMemory=5 << 30),
            SimpleNamespace(pid=2**22 + 1, usedGpuMemory=None),
        ],
    )
    processes = Bench(card).card().processes
    assert processes is not None
    assert [(item.pid, item.memory_used_bytes) for item in processes] == [(me, 5 << 30), (2**22 + 1, None)]
    assert processes[0].name == Path(f"/proc/{me}/comm").read_text().strip()
    assert processes[1].name is None


def test_a_lost_card_is_lost_and_its_neighbours_go_on() -> None:
    bench = Bench(geforce(0, 1), geforce(1, 0))
    before = bench.driver.inventory()
    bench.library.cards[0]["lost"] = True
    first, second = bench.driver.read().gpus
    assert first == GpuReading(uuid="GPU-0", lost=True)
    assert not second.lost
    assert bench.driver.inventory().gpus == before.gpus


def test_a_card_that_was_lost_before_we_came_leaves_a_gap() -> None:
    bench = Bench(geforce(0, 1), geforce(1, 0) | {"lost": True}, geforce(2, None))
    assert [(gpu.index, gpu.uuid) for gpu in bench.driver.inventory().gpus] == [(0, "GPU-0"), (2, "GPU-2")]


def test_when_every_card_is_lost_it_is_an_error() -> None:
    with pytest.raises(HardwareError, match="power cycle"):
        Bench({"lost": True}).driver.inventory()


def test_the_bridge_of_two_cards_is_one_link() -> None:
    links = Bench(geforce(0, 1), geforce(1, 0)).driver.inventory().links
    assert links == (Link("GPU-0", "GPU-1", 4, 4, 14.062),)


def test_an_inactive_first_lane_does_not_hide_the_others() -> None:
    card = geforce(0, 1)
    card["nvmlDeviceGetNvLinkState", 0] = 0
    card["nvmlDeviceGetNvLinkRemotePciInfo", 0] = Refuse(INVALID)
    bench = Bench(card, geforce(1, 0))
    assert bench.driver.inventory().links == (Link("GPU-0", "GPU-1", 3, 4, 14.062),)
    assert bench.card().nvlink_active_lanes == 3


def test_a_bridge_that_dies_later_still_names_its_far_end() -> None:
    bench = Bench(geforce(0, 1), geforce(1, 0))
    bench.driver.inventory()
    for card in bench.library.cards:
        for lane in range(4):
            card["nvmlDeviceGetNvLinkState", lane] = 0
    bench.time += 1
    assert bench.driver.inventory().links == (Link("GPU-0", "GPU-1", 0, 4, None),)
    assert bench.card().nvlink_active_lanes == 0


def test_a_bridge_that_was_always_dead_leads_nowhere() -> None:
    lanes = [Lane(False, None, None)] * 4
    assert links_from_lanes({"GPU-0": lanes}) == (Link("GPU-0", None, 0, 4, None),)


def test_a_bridge_with_one_lost_card_is_told_by_the_other() -> None:
    lanes = [Lane(False, "GPU-0", None)] * 4
    assert links_from_lanes({"GPU-1": lanes}) == (Link("GPU-1", "GPU-0", 0, 4, None),)


def switched(number: int, lanes: int = 18) -> dict[Any, Any]:
    """A card whose lanes end at an NVSwitch, as two H200s in a virtual machine told under driver 580."""
    card = geforce(number, None)
    for lane in range(lanes):
        card[("nvmlDeviceGetNvLinkState", lane)] = 1
        card[("nvmlDeviceGetNvLinkRemotePciInfo", lane)] = SimpleNamespace(busId="FFFFFFFF:FF:FF.0")
        card[("nvmlDeviceGetNvLinkRemoteDeviceType", lane)] = 2
        card["fields"][(pynvml.NVML_FI_DEV_NVLINK_GET_SPEED, lane)] = uint(26562)
    card[("nvmlDeviceGetNvLinkState", lanes)] = Refuse(INVALID)
    return card


def test_a_switch_connects_each_card_with_each_other() -> None:
    bench = Bench(switched(0), switched(1), switched(2, lanes=16), geforce(3, None))
    assert bench.driver.inventory().links == (
        Link("GPU-0", "GPU-1", 18, 18, 26.562),
        Link("GPU-0", "GPU-2", 16, 16, 26.562),
        Link("GPU-1", "GPU-2", 16, 16, 26.562),
    )
    for lane in range(18):
        bench.library.cards[0]["nvmlDeviceGetNvLinkState", lane] = 0
    assert bench.driver.inventory().links[0] == Link("GPU-0", "GPU-1", 0, 18, None)


def test_a_single_card_at_a_switch_leads_nowhere() -> None:
    assert Bench(switched(0)).driver.inventory().links == (Link("GPU-0", None, 18, 18, 26.562),)


def test_the_numa_node_comes_from_the_kernel_and_minus_one_is_unknown(tmp_path: Path) -> None:
    for address, node in (("0000:09:00.0", "1"), ("0000:0a:00.0", "-1")):
        device = tmp_path / "bus" / "pci" / "devices" / address
        device.mkdir(parents=True)
        (device / "numa_node").write_text(f"{node}\n")
    inventory = Bench(geforce(0, None), geforce(1, None), geforce(2, None), sysfs_root=tmp_path).driver.inventory()
    assert [gpu.numa_node for gpu in inventory.gpus] == [1, None, None]


def test_static_facts_of_a_3090() -> None:
    inventory = Bench(geforce(0, None)).driver.inventory()
    gpu = inventory.gpus[0]
    assert (inventory.driver_version, inventory.cuda_version) == ("590.44.01", "13.1")
    assert (gpu.power_limit_min_watts, gpu.power_limit_max_watts) == (100, 480)
    assert (gpu.temperature_slowdown_celsius, gpu.temperature_shutdown_celsius) == (95, 98)
    assert (gpu.compute_capability, gpu.persistence_mode) == ("8.6", True)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, "Install the NVIDIA driver"),
        (pynvml.NVML_ERROR_DRIVER_NOT_LOADED, "modprobe nvidia"),
        (pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, "Reboot the rig"),
        (pynvml.NVML_ERROR_NO_PERMISSION, "/dev/nvidiactl"),
        (pynvml.NVML_ERROR_UNKNOWN, "error 999"),
    ],
)
def test_an_unreachable_driver_says_what_to_do(error: int, words: str) -> None:
    bench = Bench(init_error=error)
    with pytest.raises(HardwareError, match=words):
        bench.driver.inventory()
    with pytest.raises(HardwareError, match=words):
        bench.driver.read()


def test_a_driver_that_comes_late_is_found_by_the_next_call() -> None:
    bench = Bench(geforce(0, None), init_error=pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
    with pytest.raises(HardwareError):
        bench.driver.read()
    bench.library.init_error = None
    assert bench.card().uuid == "GPU-0"


def test_a_driver_that_is_unloaded_under_us_is_an_error_and_then_found_again() -> None:
    bench = Bench(geforce(0, None))
    bench.driver.read()
    bench.library.cards[0]["nvmlDeviceGetUtilizationRates"] = Refuse(pynvml.NVML_ERROR_UNINITIALIZED)
    with pytest.raises(HardwareError, match="not loaded"):
        bench.driver.read()
    bench.library.cards[0] = geforce(0, None)
    assert bench.card().utilization_percent == 0
    bench.driver.close()
    assert bench.library.initialised == 0


def test_the_library_is_let_go_once() -> None:
    bench = Bench(geforce(0, None))
    bench.driver.close()
    bench.driver.read()
    bench.driver.close()
    bench.driver.close()
    assert bench.library.initialised == 0


def test_a_power_limit_is_set_in_milliwatts_or_refused_with_the_reason() -> None:
    limit = ("nvmlDeviceSetPowerManagementLimit", 280000)
    bench = Bench(geforce(0, None) | {limit: None}, geforce(1, None))
    assert bench.driver.set_power_limit("GPU-0", 280.0) is None
    assert bench.library.calls["nvmlDeviceSetPowerManagementLimit"] == 1
    for error, words in (
        (pynvml.NVML_ERROR_NO_PERMISSION, "only root"),
        (NOT_SUPPORTED, "cannot be set"),
        (pynvml.NVML_ERROR_INVALID_ARGUMENT, "does not accept"),
        (LOST, "fell off the bus"),
        (pynvml.NVML_ERROR_UNKNOWN, "NVML error"),
    ):
        bench.library.cards[0][limit] = Refuse(error)
        refused = bench.driver.set_power_limit("GPU-0", 280.0)
        assert refused is not None
        assert words in refused.reason
    gone = bench.driver.set_power_limit("GPU-9", 280.0)
    assert gone is not None
    assert "does not answer" in gone.reason
