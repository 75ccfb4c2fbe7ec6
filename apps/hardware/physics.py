"""How one simulated RTX 3090 behaves: load makes power, power makes heat, heat and limits slow it.

The shape and the published limits come from NVML dumps of real 3090s (idle 210 MHz and 26-35 W at
P8, fan stopped, 83 C target, 95 C slowdown, 98 C shutdown, 350 W default limit) and from reports
of quad-3090 rigs (middle cards 4-8 C hotter, GDDR6X at 90-105 C under load, throttling near
110 C). The thermal resistances and time constants are fitted to those, not measured.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

AIR_CELSIUS = 27.0
IDLE_WATTS = 26.0
ACTIVE_WATTS = 85.0  # clocks up and memory at full speed, but no kernel running
FULL_LOAD_WATTS = 300.0  # on top of ACTIVE_WATTS, at the boost clock: more than the 350 W limit allows
POWER_EXPONENT = 2.4  # power against clock: frequency times voltage squared, voltage rising with clock

IDLE_CLOCK_MHZ = 210
BOOST_CLOCK_MHZ = 1905
CLOCK_STEP_MHZ = 15  # NVIDIA's clock bins
IDLE_MEMORY_CLOCK_MHZ = 405
ACTIVE_MEMORY_CLOCK_MHZ = 9501  # compute runs at P2 on GeForce, a step below P0's 9751

CORE_TARGET_CELSIUS = 83.0
CORE_SLOWDOWN_CELSIUS = 95.0
CORE_SHUTDOWN_CELSIUS = 98.0
VRAM_THROTTLE_CELSIUS = 110.0

CORE_TIME_CONSTANT_SECONDS = 30.0
VRAM_TIME_CONSTANT_SECONDS = 90.0
FAN_PERCENT_PER_SECOND = 8.0
SECONDS_TO_IDLE = 3.0  # clocks and link stay up this long after the last kernel


@dataclass(slots=True)
class Card:
    """The hidden state of one card, moved forward by ``step``."""

    air_offset_celsius: float = 0.0  # a middle card breathes its neighbour's exhaust
    power_limit_watts: float = 350.0
    core_celsius: float = AIR_CELSIUS + 6.0
    vram_celsius: float = AIR_CELSIUS + 8.0
    fan_percent: float = 0.0
    sm_clock_mhz: int = IDLE_CLOCK_MHZ
    watts: float = IDLE_WATTS
    energy_joules: float = 0.0
    throttle_reasons: tuple[str, ...] = ("gpu_idle",)
    seconds_since_load: float = math.inf
    shut_down: bool = False
    # scripted faults
    fan_stuck_percent: float | None = None
    vram_offset_celsius: float = 0.0
    _energy_trail: deque[tuple[float, float]] = field(default_factory=lambda: deque([(0.0, 0.0)]))
    _age_seconds: float = 0.0

    @property
    def active(self) -> bool:
        """Clocks and PCIe link are up: a kernel runs, or ran a moment ago."""
        return self.seconds_since_load < SECONDS_TO_IDLE

    @property
    def hotspot_celsius(self) -> float:
        """8 C above the core at idle, 15 C at full power."""
        return self.core_celsius + 8.0 + 7.0 * min(1.0, self.watts / 350.0)

    @property
    def average_watts(self) -> float:
        """Mean of the last second, which is what NVML calls power on this generation."""
        since, energy = self._energy_trail[0]
        if self._age_seconds <= since:
            return self.watts
        return (self.energy_joules - energy) / (self._age_seconds - since)

    def step(self, seconds: float, load: float, noise: float = 0.0) -> None:
        """Advance by ``seconds`` at ``load`` 0..1; ``noise`` is a relative error on the load's power."""
        self.seconds_since_load = 0.0 if load > 0 else self.seconds_since_load + seconds
        self._set_clock(load)
        if not self.active:
            self.watts = IDLE_WATTS * (1.0 + noise)
        else:
            wanted = ACTIVE_WATTS + _load_watts(load, self.sm_clock_mhz) * (1.0 + noise)
            # The governor follows the mean; single samples stray a percent above the limit.
            self.watts = min(wanted, self.power_limit_watts * 1.01)
        self._heat(seconds, load)
        self._spin_fan(seconds)
        self.count_energy(seconds)
        if self.core_celsius >= CORE_SHUTDOWN_CELSIUS:
            self.shut_down = True

    def _set_clock(self, load: float) -> None:
        """Pick the highest clock that heat and the power limit allow, and say what held it back."""
        if not self.active:
            self.sm_clock_mhz = IDLE_CLOCK_MHZ
            self.throttle_reasons = ("gpu_idle",)
            return
        reasons = set()
        ceiling = float(BOOST_CLOCK_MHZ)
        if self.core_celsius > CORE_TARGET_CELSIUS:
            # 60 MHz per degree over the target: a gentle sag, as air-cooled 3090s show it
            ceiling = min(ceiling, BOOST_CLOCK_MHZ - 60.0 * (self.core_celsius - CORE_TARGET_CELSIUS))
            reasons.add("sw_thermal")
        if self.vram_celsius >= VRAM_THROTTLE_CELSIUS:
            ceiling = min(ceiling, BOOST_CLOCK_MHZ - 100.0 * (self.vram_celsius - VRAM_THROTTLE_CELSIUS + 2.0))
            reasons.add("hw_thermal")
        if self.core_celsius >= CORE_SLOWDOWN_CELSIUS:
            ceiling = min(ceiling, BOOST_CLOCK_MHZ / 2)
            reasons |= {"hw_slowdown", "hw_thermal"}
        power_clock = _clock_within(self.power_limit_watts, load)
        if power_clock < ceiling:  # below what heat allows: now power is what holds the card back
            ceiling = power_clock
            reasons = {"sw_power_cap"}
        bins = int(max(ceiling, IDLE_CLOCK_MHZ) // CLOCK_STEP_MHZ)
        self.sm_clock_mhz = bins * CLOCK_STEP_MHZ
        self.throttle_reasons = tuple(sorted(reasons))

    def _heat(self, seconds: float, load: float) -> None:
        air = AIR_CELSIUS + self.air_offset_celsius
        still = 1.0 - self.fan_percent / 100.0
        celsius_per_watt = 0.13 + 0.10 * still * still
        core_target = air + self.watts * celsius_per_watt
        memory_traffic = load * self.sm_clock_mhz / BOOST_CLOCK_MHZ
        vram_target = air + 3.0 + 0.45 * (self.core_celsius - air) + 42.0 * memory_traffic + self.vram_offset_celsius
        self.core_celsius = _approach(self.core_celsius, core_target, seconds, CORE_TIME_CONSTANT_SECONDS)
        self.vram_celsius = _approach(self.vram_celsius, vram_target, seconds, VRAM_TIME_CONSTANT_SECONDS)

    def _spin_fan(self, seconds: float) -> None:
        if self.fan_stuck_percent is not None:
            self.fan_percent = self.fan_stuck_percent
            return
        # Fan stop below 50 C; once it turns, it turns until 48 C so that it does not stutter.
        starts_at = 48.0 if self.fan_percent > 0 else 50.0
        target = 0.0
        if self.core_celsius >= starts_at:
            target = min(100.0, max(30.0, 30.0 + 70.0 * (self.core_celsius - 55.0) / 33.0))
        change = FAN_PERCENT_PER_SECOND * seconds
        self.fan_percent += max(-change, min(change, target - self.fan_percent))

    def count_energy(self, seconds: float) -> None:
        """Time passes at the present power; part of ``step``."""
        self.energy_joules += self.watts * seconds
        self._age_seconds += seconds
        self._energy_trail.append((self._age_seconds, self.energy_joules))
        # Keep the youngest point that is at least one second old.
        while len(self._energy_trail) > 2 and self._energy_trail[1][0] <= self._age_seconds - 1.0:
            self._energy_trail.popleft()


def _load_watts(load: float, clock_mhz: float) -> float:
    return FULL_LOAD_WATTS * load * math.pow(clock_mhz / BOOST_CLOCK_MHZ, POWER_EXPONENT)


def _clock_within(limit_watts: float, load: float) -> float:
    """The highest clock at which this load draws no more than the limit; may exceed the boost clock."""
    if load <= 0:
        return math.inf
    share = max(0.0, limit_watts - ACTIVE_WATTS) / (FULL_LOAD_WATTS * load)
    return BOOST_CLOCK_MHZ * math.pow(share, 1.0 / POWER_EXPONENT)


def _approach(value: float, target: float, seconds: float, time_constant: float) -> float:
    """First order: exact for any step, so a rig that nobody read for an hour stays stable."""
    return target + (value - target) * math.exp(-seconds / time_constant)
