"""A simulated rig: four RTX 3090s with coupled physics, so the panel is useful without a GPU.

The state moves when it is read, by the time that passed since the last reading, and is the same
for the same seed, clock and calls. Engines attach with ``hold``: their memory and load appear on
the cards like those of a real process. Faults are scripted with ``fault``.
"""

from __future__ import annotations

import random
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence

from apps.hardware import physics
from apps.hardware.host import HostMeter
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
from apps.hardware.simulated_slots import (
    JOB_TRAFFIC_BYTES_PER_SECOND,
    LANE_GIGABYTES_PER_SECOND,
    LANES,
    MEMORY_FOR_PROCESSES_BYTES,
    MEMORY_IDLE_BYTES,
    MEMORY_TOTAL_BYTES,
    POWER_LIMIT_DEFAULT_WATTS,
    POWER_LIMIT_MAX_WATTS,
    POWER_LIMIT_MIN_WATTS,
    Hold,
    Share,
    Slot,
    exchange,
)

_STEP_SECONDS = 0.25
# A rig that slept for hours (a laptop's lid) catches up at bounded cost: at most so many steps, none
# longer than the fan can follow. After those 10 minutes all is settled, and the rest is only counted.
_MOST_STEPS = 240
_LONGEST_STEP_SECONDS = 2.5


class SimulatedRig:
    """The cards, what runs on them and what is broken. Safe to use from several threads.

    ``name`` makes the cards' UUIDs (two simulated rigs must not share cards), ``pairs`` the NVLink
    bridges, ``dead_bridges`` those of the pairs that carry nothing. ``now`` gives UTC seconds.
    """

    def __init__(
        self,
        *,
        name: str = "simulated",
        seed: int = 0,
        now: Callable[[], float] = time.time,
        host: Callable[[], HostReading] | None = None,
        gpu_count: int = 4,
        pairs: Sequence[tuple[int, int]] = ((0, 1), (2, 3)),
        dead_bridges: Sequence[tuple[int, int]] = (),
    ) -> None:
        ends = [index for pair in pairs for index in pair]
        if len(set(ends)) != len(ends) or any(not 0 <= index < gpu_count for index in ends):
            raise HardwareError(f"The NVLink pairs {list(pairs)} do not fit {gpu_count} cards: each has one bridge.")
        self._now = now
        self._host = host if host is not None else HostMeter()
        self._lock = threading.RLock()
        self._peers = dict(pairs) | {b: a for a, b in pairs}
        self._uuids = [
            f"GPU-{uuid.uuid5(uuid.NAMESPACE_DNS, f'{name}.card{index}.rigpanel.simulated')}"
            for index in range(gpu_count)
        ]
        self._slots = [Slot(_generator(seed, index), self._new_card(index)) for index in range(gpu_count)]
        for a, b in dead_bridges:
            if self._peers.get(a) != b:
                raise HardwareError(f"There is no bridge between cards {a} and {b} that could be dead.")
            self._slots[a].inactive_lanes = self._slots[b].inactive_lanes = LANES
        self._holds: dict[str, Hold] = {}
        self._stepped_at = now()
        self._hang_until = 0.0  # of time.monotonic
        self._hang_over = threading.Event()

    # What runs on the cards

    def hold(self, owner: str, pid: object, name: str, gpus: Sequence[Mapping[str, object]]) -> None:
        """Put a process on cards, in place of what ``owner`` held before.

        Each of ``gpus`` has ``uuid`` or ``index``, ``memory_used_bytes`` and ``utilization`` 0..1.
        Raises HardwareError, and changes nothing, when a card is unknown or lost or has too little memory.
        """
        if isinstance(pid, bool) or not isinstance(pid, int) or pid <= 0:
            raise HardwareError("A hold needs the process's pid, a whole number above 0.")
        with self._lock:
            self._step()
            shares: dict[int, Share] = {}
            for wanted in gpus:
                index, share = self._share(wanted)
                if index in shares:
                    raise HardwareError(f"GPU {index} is named twice in one hold.")
                self._check_room(owner, index, share.memory_used_bytes)
                shares[index] = share
            before = self._holds.get(owner)
            for index, share in shares.items():
                had = before.shares[index].memory_used_bytes if before and index in before.shares else 0
                self._slots[index].weights_to_load += max(0, share.memory_used_bytes - had)
            self._holds[owner] = Hold(pid, str(name)[:200], shares)

    def release(self, owner: str) -> None:
        """Free what ``owner`` held; nothing happens if it held nothing."""
        with self._lock:
            self._step()
            self._holds.pop(owner, None)

    # What is broken

    def fault(
        self,
        kind: str,
        gpu: int | None = None,
        *,
        width: int = 8,
        lanes: int = 1,
        percent: float = 0.0,
        offset_celsius: float = 40.0,
        watts: float = POWER_LIMIT_DEFAULT_WATTS,
        seconds: float = 30.0,
    ) -> None:
        """Break something, or mend it with ``clear`` (one card, or all where ``gpu`` is None).

        ``lost``: the card falls off the bus (Xid 79). ``width``: its PCIe link trains at ``width``.
        ``nvlink``: ``lanes`` of its bridge are inactive, at both ends. ``fan``: stuck at ``percent``.
        ``vram``: the memory runs ``offset_celsius`` hotter. ``power_limit``: set to ``watts``.
        ``hang``: readings of the whole rig block for ``seconds``. Raises HardwareError otherwise.
        """
        with self._lock:
            self._step()
            if kind == "clear":
                self._clear(range(len(self._slots)) if gpu is None else [self._checked_index(gpu)])
                return
            if kind == "hang":
                self._hang_over.clear()
                self._hang_until = time.monotonic() + _within("seconds", seconds, 0, 600)
                return
            slot = self._slots[self._checked_index(gpu)]
            if kind == "lost":
                slot.lost = True
            elif kind == "width":
                if width not in (1, 2, 4, 8, 16):
                    raise HardwareError("A PCIe link has a width of 1, 2, 4, 8 or 16 lanes.")
                slot.pcie_width = width
            elif kind == "nvlink":
                peer = self._peers.get(self._checked_index(gpu))
                if peer is None:
                    raise HardwareError(f"GPU {gpu} has no NVLink bridge that could fail.")
                inactive = int(_within("lanes", lanes, 0, LANES))
                slot.inactive_lanes = self._slots[peer].inactive_lanes = inactive
            elif kind == "fan":
                slot.card.fan_stuck_percent = _within("percent", percent, 0, 100)
            elif kind == "vram":
                slot.card.vram_offset_celsius = _within("offset_celsius", offset_celsius, 0, 100)
            elif kind == "power_limit":
                limit = _within("watts", watts, POWER_LIMIT_MIN_WATTS, POWER_LIMIT_MAX_WATTS)
                slot.card.power_limit_watts = limit
            else:
                raise HardwareError(
                    f"{kind!r:.40} is no fault; use lost, width, nvlink, fan, vram, power_limit, hang or clear."
                )

    def _clear(self, indexes: Sequence[int]) -> None:
        self._hang_until = 0.0
        self._hang_over.set()
        for index in indexes:
            slot = self._slots[index]
            if slot.lost:  # it takes a power cycle to come back, so it comes back cold and counting from 0
                self._slots[index] = slot = Slot(slot.rng, self._new_card(index))
            slot.lost = False
            slot.pcie_width = 16
            slot.inactive_lanes = 0
            if index in self._peers:
                self._slots[self._peers[index]].inactive_lanes = 0
            slot.card.fan_stuck_percent = None
            slot.card.vram_offset_celsius = 0.0
            slot.card.power_limit_watts = POWER_LIMIT_DEFAULT_WATTS

    # What a driver reads

    def inventory(self) -> Inventory:
        with self._lock:
            self._step()
            gpus = tuple(self._info(index) for index in range(len(self._slots)))
            links = tuple(
                Link(self._uuids[a], self._uuids[b], self._lanes(a), LANES, LANE_GIGABYTES_PER_SECOND)
                for a, b in sorted(self._peers.items())
                if a < b
            )
            return Inventory("simulated", "590.48.01", "13.1", gpus, links)

    def read(self) -> Reading:
        self._wait_out_hang()
        with self._lock:
            at = self._step()
            gpus = tuple(self._reading(index) for index in range(len(self._slots)))
            return Reading(at=at, gpus=gpus, host=self._host())

    def set_power_limit(self, gpu_uuid: str, watts: float) -> Refused | None:
        """As the driver does it: within the card's own bounds, and not on a card that is lost."""
        with self._lock:
            if gpu_uuid not in self._uuids:
                return Refused("This card does not answer.")
            slot = self._slots[self._uuids.index(gpu_uuid)]
            if slot.lost:
                return Refused("This card fell off the bus.")
            if not POWER_LIMIT_MIN_WATTS <= watts <= POWER_LIMIT_MAX_WATTS:
                return Refused("The driver does not accept this power limit.")
            slot.card.power_limit_watts = float(watts)
            return None

    def stop_waiting(self) -> None:
        """Let a reading that hangs return now."""
        self._hang_over.set()

    def _wait_out_hang(self) -> None:
        # Real time, not ``now``: it is a real thread that blocks. Outside the lock, so that an
        # engine that ends meanwhile can still let go of its memory.
        remaining = self._hang_until - time.monotonic()
        if remaining > 0:
            self._hang_over.wait(remaining)

    def _info(self, index: int) -> GpuInfo:
        return GpuInfo(
            index=index,
            uuid=self._uuids[index],
            name="NVIDIA GeForce RTX 3090",
            memory_total_bytes=MEMORY_TOTAL_BYTES,
            pci_bus_id=f"00000000:{0x21 + 0x20 * index:02X}:00.0",
            pcie_width_max=16,
            pcie_gen_max=4,
            numa_node=0,
            power_limit_default_watts=POWER_LIMIT_DEFAULT_WATTS,
            power_limit_min_watts=POWER_LIMIT_MIN_WATTS,
            power_limit_max_watts=POWER_LIMIT_MAX_WATTS,
            temperature_slowdown_celsius=int(physics.CORE_SLOWDOWN_CELSIUS),
            temperature_shutdown_celsius=int(physics.CORE_SHUTDOWN_CELSIUS),
            compute_capability="8.6",
            persistence_mode=True,
            memory_reserved_bytes=MEMORY_TOTAL_BYTES - MEMORY_FOR_PROCESSES_BYTES,
        )

    def _reading(self, index: int) -> GpuReading:
        slot, card = self._slots[index], self._slots[index].card
        if slot.lost:
            return GpuReading(uuid=self._uuids[index], lost=True)
        holds = [(hold, hold.shares[index]) for hold in self._holds.values() if index in hold.shares]
        bridged = index in self._peers
        return GpuReading(
            uuid=self._uuids[index],
            utilization_percent=slot.utilization_percent,
            memory_used_bytes=MEMORY_IDLE_BYTES + sum(share.memory_used_bytes for _, share in holds),
            power_watts=round(card.average_watts, 3),
            power_limit_watts=card.power_limit_watts,
            energy_joules=round(card.energy_joules, 3),
            temperature_celsius=float(int(card.core_celsius)),
            memory_temperature_celsius=float(int(card.vram_celsius)),
            hotspot_temperature_celsius=float(int(card.hotspot_celsius)),
            fan_percent=float(int(card.fan_percent)),
            sm_clock_mhz=card.sm_clock_mhz,
            memory_clock_mhz=physics.ACTIVE_MEMORY_CLOCK_MHZ if card.active else physics.IDLE_MEMORY_CLOCK_MHZ,
            performance_state=2 if card.active else 8,
            throttle_reasons=card.throttle_reasons,
            pcie_gen=4 if card.active or slot.weights_to_load > 0 else 1,
            pcie_width=slot.pcie_width,
            pcie_replays=0,
            pcie_tx_bytes=int(slot.pcie_tx),
            pcie_rx_bytes=int(slot.pcie_rx),
            # NVML counts NVLink traffic in KiB
            nvlink_tx_bytes=int(slot.nvlink_tx) // 1024 * 1024 if bridged else None,
            nvlink_rx_bytes=int(slot.nvlink_rx) // 1024 * 1024 if bridged else None,
            nvlink_active_lanes=self._lanes(index) if bridged else None,
            processes=tuple(
                GpuProcess(hold.pid, share.memory_used_bytes, hold.name)
                for hold, share in sorted(holds, key=lambda item: item[0].pid)
            ),
        )

    # Time

    def _step(self) -> float:
        """Move the physics to now and return it; a clock that went back changes nothing."""
        now = self._now()
        elapsed = max(0.0, now - self._stepped_at)
        self._stepped_at = now
        steps = min(_MOST_STEPS, int(elapsed / _STEP_SECONDS) + 1)
        if elapsed > 0:
            loads = [self._load(index) for index in range(len(self._slots))]
            seconds = min(elapsed / steps, _LONGEST_STEP_SECONDS)
            for _ in range(steps):
                self._advance(seconds, loads)
            self._advance(elapsed - steps * seconds, loads, settled=True)
            for slot, load in zip(self._slots, loads, strict=True):
                slot.sample_utilization(load, now)
        return now

    def _advance(self, seconds: float, loads: list[float], *, settled: bool = False) -> None:
        if seconds <= 0:
            return
        for slot, load in zip(self._slots, loads, strict=True):
            if slot.lost:
                continue
            if settled:
                slot.card.count_energy(seconds)
            else:
                slot.card.step(seconds, load, noise=slot.rng.uniform(-0.02, 0.02))
            if slot.card.shut_down:
                slot.lost = True  # a card that cut its own power is gone from the bus
        for index, slot in enumerate(self._slots):
            if not slot.lost:
                slot.count_traffic(seconds, loads[index], self._lanes(index))
        for hold in self._holds.values():
            self._exchange(hold, seconds)

    def _exchange(self, hold: Hold, seconds: float) -> None:
        """Traffic between the cards of one engine: over the bridge where there is one, else over PCIe."""
        cards = [index for index in sorted(hold.shares) if not self._slots[index].lost]
        for position, a in enumerate(cards):
            for b in cards[position + 1 :]:
                # A collective waits for its slowest member.
                busy = min(hold.shares[a].utilization, hold.shares[b].utilization)
                rate = JOB_TRAFFIC_BYTES_PER_SECOND * busy / (len(cards) - 1)
                lanes = self._lanes(a) if self._peers.get(a) == b else 0
                exchange(self._slots[a], self._slots[b], rate, lanes, seconds)

    # Small things

    def _new_card(self, index: int) -> physics.Card:
        last = len(self._uuids) - 1
        middle = 0 < index < last
        return physics.Card(air_offset_celsius=5.0 + index % 2 if middle else 0.0)

    def _load(self, index: int) -> float:
        total = sum(hold.shares[index].utilization for hold in self._holds.values() if index in hold.shares)
        return min(1.0, total)

    def _lanes(self, index: int) -> int:
        peer = self._peers.get(index)
        if peer is None or self._slots[index].lost or self._slots[peer].lost:
            return 0
        return LANES - self._slots[index].inactive_lanes

    def _checked_index(self, gpu: object) -> int:
        if isinstance(gpu, bool) or not isinstance(gpu, int) or not 0 <= gpu < len(self._slots):
            raise HardwareError(f"There is no GPU {gpu!r:.40}; this rig has GPUs 0 to {len(self._slots) - 1}.")
        return gpu

    def _share(self, wanted: Mapping[str, object]) -> tuple[int, Share]:
        if not isinstance(wanted, Mapping):
            raise HardwareError("Each card of a hold is an object with uuid or index.")
        if "uuid" in wanted:
            if wanted["uuid"] not in self._uuids:
                raise HardwareError(f"This rig has no card {wanted['uuid']!r:.60}.")
            index = self._uuids.index(str(wanted["uuid"]))
        else:
            index = self._checked_index(wanted.get("index"))
        memory = int(_within("memory_used_bytes", wanted.get("memory_used_bytes", 0), 0, 1 << 50))
        return index, Share(memory, _within("utilization", wanted.get("utilization", 0.0), 0, 1))

    def _check_room(self, owner: str, index: int, wanted: int) -> None:
        if self._slots[index].lost:
            raise HardwareError(f"GPU {index} has fallen off the bus; nothing can run on it.")
        others = sum(
            hold.shares[index].memory_used_bytes
            for holder, hold in self._holds.items()
            if holder != owner and index in hold.shares
        )
        free = MEMORY_FOR_PROCESSES_BYTES - others
        if wanted > free:
            raise HardwareError(
                f"Out of memory on GPU {index}: {wanted / (1 << 30):.1f} GiB wanted, "
                f"{free / (1 << 30):.1f} GiB of {MEMORY_FOR_PROCESSES_BYTES / (1 << 30):.1f} GiB free."
            )


class SimulatedDriver:
    """The GpuDriver of a SimulatedRig, which it makes itself if none is given."""

    source = "simulated"

    def __init__(self, rig: SimulatedRig | None = None) -> None:
        self.rig = rig if rig is not None else SimulatedRig()

    def inventory(self) -> Inventory:
        return self.rig.inventory()

    def read(self) -> Reading:
        return self.rig.read()

    def set_power_limit(self, gpu_uuid: str, watts: float) -> Refused | None:
        return self.rig.set_power_limit(gpu_uuid, watts)

    def close(self) -> None:
        self.rig.stop_waiting()


def _generator(seed: int, index: int) -> random.Random:
    return random.Random(f"{seed}:{index}")  # noqa: S311 - noise of a simulation, not a secret


def _within(what: str, value: object, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise HardwareError(f"{what} is {value!r:.40}; it must be a number from {low:g} to {high:g}.")
    return value
