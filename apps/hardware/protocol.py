"""What the panel asks of GPU hardware: one protocol, frozen dataclasses, units in the names.

Missing is ``None``, never 0: a card that does not report its memory temperature must not look
cool. A driver answers ``None`` for every call that the card refuses; it raises only when the
hardware as a whole cannot be read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable


class HardwareError(Exception):
    """The hardware cannot be read at all; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Refused:
    """A card does not take a setting; ``reason`` is a sentence that says why and what would help."""

    reason: str


@dataclass(frozen=True, slots=True)
class Link:
    """One NVLink connection between two cards, lanes counted together.

    ``peer_uuid`` is ``None`` when the far end is not one of this machine's GPUs or was not
    reported. ``active_lanes`` of ``total_lanes`` carry traffic; a dead bridge shows 0.
    """

    gpu_uuid: str
    peer_uuid: str | None
    active_lanes: int
    total_lanes: int
    gigabytes_per_second_per_lane: float | None


@dataclass(frozen=True, slots=True)
class GpuInfo:
    """What does not change while a card stays in its slot."""

    index: int
    uuid: str
    name: str
    memory_total_bytes: int | None
    pci_bus_id: str | None
    pcie_width_max: int | None
    pcie_gen_max: int | None
    numa_node: int | None
    power_limit_default_watts: float | None
    power_limit_min_watts: float | None
    power_limit_max_watts: float | None
    temperature_slowdown_celsius: int | None
    temperature_shutdown_celsius: int | None
    compute_capability: str | None
    persistence_mode: bool | None
    memory_reserved_bytes: int | None = None  # kept by the driver: CUDA sees the total without it


@dataclass(frozen=True, slots=True)
class Inventory:
    """The cards of a rig in slot order and the bridges between them."""

    source: str  # "nvml", "simulated" or "replay"
    driver_version: str | None
    cuda_version: str | None
    gpus: tuple[GpuInfo, ...]
    links: tuple[Link, ...]


@dataclass(frozen=True, slots=True)
class GpuProcess:
    """A process that holds memory on a card."""

    pid: int
    memory_used_bytes: int | None
    name: str | None


@dataclass(frozen=True, slots=True)
class GpuReading:
    """One card at one moment. ``lost`` means it fell off the bus: every other field is ``None``."""

    uuid: str
    lost: bool = False
    utilization_percent: float | None = None
    memory_used_bytes: int | None = None
    power_watts: float | None = None
    power_limit_watts: float | None = None
    energy_joules: float | None = None
    temperature_celsius: float | None = None
    memory_temperature_celsius: float | None = None
    hotspot_temperature_celsius: float | None = None
    fan_percent: float | None = None
    sm_clock_mhz: int | None = None
    memory_clock_mhz: int | None = None
    performance_state: int | None = None
    throttle_reasons: tuple[str, ...] | None = None  # of THROTTLE_REASONS
    pcie_gen: int | None = None
    pcie_width: int | None = None
    pcie_replays: int | None = None
    pcie_tx_bytes: int | None = None  # counters since the driver loaded
    pcie_rx_bytes: int | None = None
    nvlink_tx_bytes: int | None = None
    nvlink_rx_bytes: int | None = None
    nvlink_active_lanes: int | None = None
    processes: tuple[GpuProcess, ...] | None = None


@dataclass(frozen=True, slots=True)
class HostReading:
    """The machine around the cards."""

    cpu_percent: float | None
    memory_used_bytes: int | None
    memory_total_bytes: int | None


@dataclass(frozen=True, slots=True)
class Reading:
    """All cards at one moment; ``at`` is UTC seconds since the epoch."""

    at: float
    gpus: tuple[GpuReading, ...]
    host: HostReading


THROTTLE_REASONS = (
    "gpu_idle",
    "applications_clocks",
    "sw_power_cap",
    "hw_slowdown",
    "sync_boost",
    "sw_thermal",
    "hw_thermal",
    "hw_power_brake",
    "display_clocks",
)


@runtime_checkable
class GpuDriver(Protocol):
    """Implemented by ``nvml``, ``simulated``, ``replay`` and the sampler's socket client."""

    source: str

    def inventory(self) -> Inventory:
        """Read the static facts; raises HardwareError when the driver cannot be reached."""

    def read(self) -> Reading:
        """Read all cards once; a lost card is a reading with ``lost``, not an exception."""

    def set_power_limit(self, gpu_uuid: str, watts: float) -> Refused | None:
        """Cap what a card may draw until it is set again or the driver is loaded anew; None when it is in force."""

    def close(self) -> None:
        """Release the driver; safe to call twice."""
