"""One slot of the simulated rig: a card's counters, faults and traffic beside its physics."""

from __future__ import annotations

import random
from dataclasses import dataclass

from apps.hardware import physics

MIB = 1 << 20
MEMORY_TOTAL_BYTES = 24576 * MIB  # what NVML reports for a 3090
MEMORY_FOR_PROCESSES_BYTES = 24115 * MIB  # what CUDA sees, 23.55 GiB; the driver keeps the rest
MEMORY_IDLE_BYTES = 7 * MIB

LANES = 4
LANE_GIGABYTES_PER_SECOND = 14.062  # one GA102 NVLink lane, each direction, as NVML reports it
NVLINK_IDLE_BYTES_PER_SECOND = 1.2 * MIB  # keep-alive traffic seen on idle 3090 bridges
PCIE_X16_BYTES_PER_SECOND = 25e9  # PCIe 4.0 x16, measured host to device
PCIE_IDLE_BYTES_PER_SECOND = 450e3
PCIE_LOAD_BYTES_PER_SECOND = 20e6
WEIGHTS_BYTES_PER_SECOND = 12e9  # how fast a process's memory is filled over PCIe
JOB_TRAFFIC_BYTES_PER_SECOND = 2.5e9  # between the cards of one busy engine, each direction

POWER_LIMIT_DEFAULT_WATTS = 350.0
POWER_LIMIT_MIN_WATTS = 100.0
POWER_LIMIT_MAX_WATTS = 385.0

_UTILIZATION_WINDOW_SECONDS = 1 / 6  # NVML's shortest sample period


@dataclass(frozen=True, slots=True)
class Share:
    """What one process holds on one card."""

    memory_used_bytes: int
    utilization: float  # 0..1


@dataclass(frozen=True, slots=True)
class Hold:
    pid: int
    name: str
    shares: dict[int, Share]  # by card index


@dataclass(slots=True)
class Slot:
    """One card in its slot: physics, counters and faults."""

    rng: random.Random
    card: physics.Card
    lost: bool = False
    pcie_width: int = 16
    inactive_lanes: int = 0
    pcie_tx: float = 0.0
    pcie_rx: float = 0.0
    nvlink_tx: float = 0.0
    nvlink_rx: float = 0.0
    weights_to_load: float = 0.0
    utilization_percent: float = 0.0
    utilization_window: int = -1

    def count_traffic(self, seconds: float, load: float, lanes: int) -> None:
        """What a card moves by itself: commands and results, weights being loaded, idle bridge traffic."""
        pcie = (PCIE_IDLE_BYTES_PER_SECOND + PCIE_LOAD_BYTES_PER_SECOND * load) * seconds
        weights = min(self.weights_to_load, WEIGHTS_BYTES_PER_SECOND * self.pcie_width / 16 * seconds)
        self.weights_to_load -= weights
        self.pcie_tx += pcie
        self.pcie_rx += pcie + weights
        if lanes > 0:
            self.nvlink_tx += NVLINK_IDLE_BYTES_PER_SECOND * seconds
            self.nvlink_rx += NVLINK_IDLE_BYTES_PER_SECOND * seconds

    def sample_utilization(self, load: float, now: float) -> None:
        """The share of the last sample period with a kernel running; changes once per period, as NVML's does."""
        window = int(now / _UTILIZATION_WINDOW_SECONDS)
        if window == self.utilization_window:
            return
        self.utilization_window = window
        jitter = self.rng.uniform(-2.0, 2.0)
        # Idle is exactly 0 and a spinning collective exactly 100 on real cards.
        percent = 100 * load + jitter if 0 < load < 1 else 100 * load
        self.utilization_percent = float(round(max(0.0, min(100.0, percent))))


def exchange(first: Slot, second: Slot, bytes_per_second: float, lanes: int, seconds: float) -> None:
    """Traffic between two cards of one engine: over ``lanes`` of their bridge, or over PCIe where there are none."""
    if lanes > 0:
        moved = min(bytes_per_second, lanes * LANE_GIGABYTES_PER_SECOND * 1e9) * seconds
        for end in (first, second):
            end.nvlink_tx += moved
            end.nvlink_rx += moved
    else:
        width = min(first.pcie_width, second.pcie_width)
        moved = min(bytes_per_second, PCIE_X16_BYTES_PER_SECOND * width / 16) * seconds
        for end in (first, second):
            end.pcie_tx += moved
            end.pcie_rx += moved
