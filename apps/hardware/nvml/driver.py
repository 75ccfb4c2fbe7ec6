"""Real NVIDIA cards through NVML.

A value that is there is compared with ``None``, never by truth: P0, fan 0 % and an empty throttle
mask are all 0 and all meant. NVML calls take turns in the kernel driver, and some are slow (total
energy 3 ms on an H200, processes 4.5 ms on some cards). So each reading asks the fast ones, the
slow ones at most once a second and processes at most every two. PCIe throughput is never asked
(20 ms per call): the byte counters cost 0.15 ms.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from apps.hardware.host import HostMeter
from apps.hardware.nvml import calls
from apps.hardware.nvml.links import Lane, links_from_lanes
from apps.hardware.protocol import (
    GpuInfo,
    GpuProcess,
    GpuReading,
    HardwareError,
    HostReading,
    Inventory,
    Link,
    Reading,
    Refused,
)

# A little under 1 and 2 s, so that a sampler at 1 Hz never reuses a value because it came 1 ms early.
_SLOW_SECONDS = 0.9
_PROCESSES_SECONDS = 1.9

_LIVE_FIELDS = (
    calls.POWER_INSTANT,
    calls.POWER_AVERAGE,
    calls.MEMORY_TEMPERATURE,
    calls.PCIE_TX,
    calls.PCIE_RX,
)


@dataclass(slots=True)
class _Slow:
    """What is asked at most once a second."""

    power_limit_watts: float | None = None
    energy_joules: float | None = None
    fan_percent: float | None = None
    pcie_gen: int | None = None
    pcie_width: int | None = None
    pcie_replays: int | None = None
    lanes: tuple[bool, ...] = ()


@dataclass(slots=True)
class _Card:
    """What is remembered of a card between readings."""

    handle: calls.Handle
    info: GpuInfo | None = None
    slow: _Slow = field(default_factory=_Slow)
    slow_at: float = float("-inf")
    processes: tuple[GpuProcess, ...] | None = None
    processes_at: float = float("-inf")
    # by counter: its last raw value, and the bytes of the rounds before
    wrapping: dict[calls.Field, tuple[int, int]] = field(default_factory=dict)
    lane_peers: dict[int, str] = field(default_factory=dict)  # lane to PCI bus id
    switch_lanes: set[int] = field(default_factory=set)


class NvmlDriver:
    """Reads all cards of this machine; connects with the first call and again after the driver went away.

    A card that is already lost when the driver is reached has no handle and no UUID: it is absent
    from the inventory, whose indexes then have a gap. ``library`` is NVIDIA's binding or a stand-in
    for the vendor's library with the same functions.
    """

    source = "nvml"

    def __init__(
        self,
        *,
        library: Any = None,
        sysfs_root: str | Path = "/sys",
        now: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        host: Callable[[], HostReading] | None = None,
    ) -> None:
        self._nvml = calls.Nvml(monotonic) if library is None else calls.Nvml(monotonic, library)
        self._sysfs_root = Path(sysfs_root)
        self._now = now
        self._monotonic = monotonic
        self._host = host if host is not None else HostMeter()
        self._cards: list[_Card] | None = None

    def inventory(self) -> Inventory:
        cards = self._connected()
        try:
            gpus = tuple(self._info(card) for card in cards)
            links = self._links(cards, gpus)
            return Inventory(self.source, self._nvml.driver_version(), self._nvml.cuda_version(), gpus, links)
        except calls.DriverGoneError:
            self.close()
            raise HardwareError(calls.DRIVER_GONE_SENTENCE) from None

    def read(self) -> Reading:
        cards = self._connected()
        try:
            gpus = tuple(self._reading(card) for card in cards)
        except calls.DriverGoneError:
            self.close()
            raise HardwareError(calls.DRIVER_GONE_SENTENCE) from None
        return Reading(at=self._now(), gpus=gpus, host=self._host())

    def set_power_limit(self, gpu_uuid: str, watts: float) -> Refused | None:
        card = next((c for c in self._connected() if c.handle.uuid == gpu_uuid), None)
        if card is None:
            return Refused("This card does not answer.")
        try:
            error = card.handle.set_power_limit(round(watts * 1000))
        except calls.LostError:
            return Refused("This card fell off the bus.")
        except calls.DriverGoneError:
            self.close()
            raise HardwareError(calls.DRIVER_GONE_SENTENCE) from None
        return None if error is None else Refused(calls.power_limit_sentence(error))

    def close(self) -> None:
        if self._cards is not None:
            self._cards = None
            self._nvml.disconnect()

    def _connected(self) -> list[_Card]:
        if self._cards is None:
            self._cards = [_Card(handle) for handle in self._nvml.connect()]
        return self._cards

    # What does not change

    def _info(self, card: _Card) -> GpuInfo:
        try:
            card.info = self._fresh_info(card)
        except calls.LostError:
            if card.info is None:  # lost between opening and here
                card.info = GpuInfo(card.handle.index, card.handle.uuid, "NVIDIA GPU (lost)", *[None] * 12)
        return card.info

    def _fresh_info(self, card: _Card) -> GpuInfo:
        name = card.handle.ask("nvmlDeviceGetName")
        memory = self._memory(card)
        pci = card.handle.ask("nvmlDeviceGetPciInfo")
        bus_id = None if pci is None else str(pci.busId)
        limits = card.handle.ask("nvmlDeviceGetPowerManagementLimitConstraints")
        capability = card.handle.ask("nvmlDeviceGetCudaComputeCapability")
        persistence = card.handle.ask("nvmlDeviceGetPersistenceMode")
        return GpuInfo(
            index=card.handle.index,
            uuid=card.handle.uuid,
            name="NVIDIA GPU" if name is None else str(name),
            memory_total_bytes=None if memory is None else int(memory.total),
            pci_bus_id=bus_id,
            pcie_width_max=card.handle.ask("nvmlDeviceGetMaxPcieLinkWidth"),
            pcie_gen_max=card.handle.ask("nvmlDeviceGetMaxPcieLinkGeneration"),
            numa_node=None if bus_id is None else self._numa_node(bus_id),
            power_limit_default_watts=_thousandth(card.handle.ask("nvmlDeviceGetPowerManagementDefaultLimit")),
            power_limit_min_watts=None if limits is None else _thousandth(limits[0]),
            power_limit_max_watts=None if limits is None else _thousandth(limits[1]),
            temperature_slowdown_celsius=card.handle.ask("nvmlDeviceGetTemperatureThreshold", calls.THRESHOLD_SLOWDOWN),
            temperature_shutdown_celsius=card.handle.ask("nvmlDeviceGetTemperatureThreshold", calls.THRESHOLD_SHUTDOWN),
            compute_capability=None if capability is None else f"{capability[0]}.{capability[1]}",
            persistence_mode=None if persistence is None else persistence == calls.ENABLED,
            # Only the second form of the call tells it; the first counts it as used.
            memory_reserved_bytes=getattr(memory, "reserved", None),
        )

    def _numa_node(self, bus_id: str) -> int | None:
        """From sysfs: NVML's own call is refused on x86. The kernel says -1 where it does not know."""
        # NVML writes an eight-digit PCI domain, sysfs a four-digit one.
        domain, _, rest = bus_id.lower().partition(":")
        path = self._sysfs_root / "bus" / "pci" / "devices" / f"{domain[-4:]}:{rest}" / "numa_node"
        try:
            node = int(path.read_text())
        except (OSError, ValueError):
            return None
        return node if node >= 0 else None

    # NVLink

    def _lane_states(self, card: _Card) -> tuple[bool, ...]:
        """One entry per lane. An inactive lane is an answer; only a refusal ends the row (lane 4 on a 3090)."""
        states = []
        for lane in range(calls.NVLINK_LANES_MAX):
            state = card.handle.ask("nvmlDeviceGetNvLinkState", lane)
            if state is None:
                break
            states.append(state == calls.ENABLED)
        return tuple(states)

    def _links(self, cards: list[_Card], gpus: tuple[GpuInfo, ...]) -> tuple[Link, ...]:
        uuids = {_bus_key(gpu.pci_bus_id): gpu.uuid for gpu in gpus if gpu.pci_bus_id is not None}
        lanes: dict[str, list[Lane]] = {}
        for card in cards:
            try:
                lanes[card.handle.uuid] = self._lanes(card, uuids)
            except calls.LostError:
                continue  # the other end still tells about the bridge
        return links_from_lanes(lanes)

    def _lanes(self, card: _Card, uuids: dict[str, str]) -> list[Lane]:
        lanes = []
        for number, active in enumerate(self._lane_states(card)):
            remote = card.handle.ask("nvmlDeviceGetNvLinkRemotePciInfo", number) if active else None
            if remote is not None:
                card.lane_peers[number] = _bus_key(str(remote.busId))
            # An inactive lane does not name its far end, so the one it had before counts.
            peer = uuids.get(card.lane_peers.get(number, ""))
            if active and peer is None and self._ends_at_switch(card, number):
                card.switch_lanes.add(number)
            speed = self._lane_speed(card, number) if active else None
            lanes.append(Lane(active, peer, speed, to_switch=number in card.switch_lanes))
        return lanes

    def _ends_at_switch(self, card: _Card, lane: int) -> bool:
        return bool(card.handle.ask("nvmlDeviceGetNvLinkRemoteDeviceType", lane) == calls.NVLINK_SWITCH)

    def _lane_speed(self, card: _Card, lane: int) -> float | None:
        """GB/s, each way."""
        wanted = calls.nvlink_speeds(lane)
        answered = card.handle.fields(wanted)
        speeds = [answered[item] for item in wanted if answered.get(item, 0) > 0]
        return _thousandth(speeds[0]) if speeds else None

    # What changes

    def _reading(self, card: _Card) -> GpuReading:
        try:
            return self._live_reading(card)
        except calls.LostError:
            card.slow_at = card.processes_at = float("-inf")
            return GpuReading(uuid=card.handle.uuid, lost=True)

    def _live_reading(self, card: _Card) -> GpuReading:
        slow = self._slow(card)
        sent = [calls.nvlink_sent(lane) for lane in range(len(slow.lanes))]
        received = [calls.nvlink_received(lane) for lane in range(len(slow.lanes))]
        fields = card.handle.fields([*_LIVE_FIELDS, *sent, *received])
        utilization = card.handle.ask("nvmlDeviceGetUtilizationRates")
        memory = self._memory(card)
        temperature = card.handle.ask("nvmlDeviceGetTemperature", calls.TEMPERATURE_CORE)
        state = card.handle.ask("nvmlDeviceGetPerformanceState")
        return GpuReading(
            uuid=card.handle.uuid,
            utilization_percent=None if utilization is None else float(utilization.gpu),
            memory_used_bytes=None if memory is None else int(memory.used),
            power_watts=self._power(card, fields),
            power_limit_watts=slow.power_limit_watts,
            energy_joules=slow.energy_joules,
            temperature_celsius=None if temperature is None else float(temperature),
            # Some GeForce drivers answer 0 instead of refusing; no running memory is at 0 C.
            memory_temperature_celsius=float(fields[calls.MEMORY_TEMPERATURE])
            if fields.get(calls.MEMORY_TEMPERATURE)
            else None,
            hotspot_temperature_celsius=None,  # not in NVML
            fan_percent=slow.fan_percent,
            sm_clock_mhz=card.handle.ask("nvmlDeviceGetClockInfo", calls.CLOCK_SM),
            memory_clock_mhz=card.handle.ask("nvmlDeviceGetClockInfo", calls.CLOCK_MEMORY),
            performance_state=None if state == calls.PERFORMANCE_STATE_UNKNOWN else state,
            throttle_reasons=self._throttle_reasons(card),
            pcie_gen=slow.pcie_gen,
            pcie_width=slow.pcie_width,
            pcie_replays=slow.pcie_replays,
            pcie_tx_bytes=_unwrapped(card, calls.PCIE_TX, fields),
            pcie_rx_bytes=_unwrapped(card, calls.PCIE_RX, fields),
            nvlink_tx_bytes=_sum_of_kibibytes(fields, sent),
            nvlink_rx_bytes=_sum_of_kibibytes(fields, received),
            nvlink_active_lanes=sum(slow.lanes) if slow.lanes else None,
            processes=self._processes(card),
        )

    def _slow(self, card: _Card) -> _Slow:
        moment = self._monotonic()
        if moment - card.slow_at < _SLOW_SECONDS:
            return card.slow
        fan = card.handle.ask("nvmlDeviceGetFanSpeed")
        card.slow = _Slow(
            power_limit_watts=_thousandth(card.handle.ask("nvmlDeviceGetEnforcedPowerLimit")),
            energy_joules=_thousandth(card.handle.ask("nvmlDeviceGetTotalEnergyConsumption")),
            fan_percent=None if fan is None else float(fan),
            pcie_gen=card.handle.ask("nvmlDeviceGetCurrPcieLinkGeneration"),
            pcie_width=card.handle.ask("nvmlDeviceGetCurrPcieLinkWidth"),
            pcie_replays=card.handle.ask("nvmlDeviceGetPcieReplayCounter"),
            lanes=self._lane_states(card),
        )
        card.slow_at = moment
        return card.slow

    def _memory(self, card: _Card) -> Any:
        """Version 2, whose ``used`` leaves out the driver's reserve as nvidia-smi does; drivers before 510 lack it."""
        memory = card.handle.ask("nvmlDeviceGetMemoryInfo", calls.MEMORY_INFO_V2)
        return memory if memory is not None else card.handle.ask("nvmlDeviceGetMemoryInfo")

    def _power(self, card: _Card, fields: dict[calls.Field, int]) -> float | None:
        for item in (calls.POWER_INSTANT, calls.POWER_AVERAGE):
            if item in fields:
                return _thousandth(fields[item])
        return _thousandth(card.handle.ask("nvmlDeviceGetPowerUsage"))

    def _throttle_reasons(self, card: _Card) -> tuple[str, ...] | None:
        mask = card.handle.ask("nvmlDeviceGetCurrentClocksEventReasons")
        if mask is None:  # the name before driver 535
            mask = card.handle.ask("nvmlDeviceGetCurrentClocksThrottleReasons")
        if mask is None:
            return None
        return tuple(name for bit, name in calls.THROTTLE_BITS if mask & bit)

    def _processes(self, card: _Card) -> tuple[GpuProcess, ...] | None:
        moment = self._monotonic()
        if moment - card.processes_at < _PROCESSES_SECONDS:
            return card.processes
        compute = card.handle.ask("nvmlDeviceGetComputeRunningProcesses_v3")
        graphics = card.handle.ask("nvmlDeviceGetGraphicsRunningProcesses_v3")
        card.processes_at = moment
        if compute is None and graphics is None:
            card.processes = None
            return None
        # A process that computes and draws is in both lists, with the same memory in each.
        by_pid = {int(item.pid): item.usedGpuMemory for item in [*(graphics or ()), *(compute or ())]}
        card.processes = tuple(
            GpuProcess(pid, None if used is None else int(used), _process_name(pid))
            for pid, used in sorted(by_pid.items())
        )
        return card.processes


def _unwrapped(card: _Card, item: calls.Field, fields: dict[calls.Field, int]) -> int | None:
    """A counter that goes on where NVML's 32-bit one starts again at 0.

    Right only while less than 4 GiB pass between two readings; beyond that it counts too little.
    """
    value = fields.get(item)
    if value is None:
        return None
    last, earlier_rounds = card.wrapping.get(item, (0, 0))
    if value < last < 1 << 32:
        earlier_rounds += 1 << 32
    card.wrapping[item] = (value, earlier_rounds)
    return earlier_rounds + value


def _sum_of_kibibytes(fields: dict[calls.Field, int], lanes: list[calls.Field]) -> int | None:
    answered = [fields[lane] for lane in lanes if lane in fields]
    return sum(answered) * 1024 if answered else None


def _thousandth(value: int | None) -> float | None:
    """Milliwatts to watts, millijoules to joules, MB/s to GB/s."""
    return None if value is None else value / 1000


def _bus_key(bus_id: str) -> str:
    """NVML writes a PCI address with four or eight digits of domain and either case."""
    domain, _, rest = bus_id.lower().partition(":")
    return f"{int(domain, 16):x}:{rest}"


def _process_name(pid: int) -> str | None:
    try:
        return psutil.Process(pid).name()
    except psutil.Error:  # ended since, or of another container's pid namespace
        return None
