"""The simulated cards behave as one: load, power, clock, heat and limits pull on each other."""

from __future__ import annotations

import pytest

from apps.hardware import physics
from apps.hardware.protocol import GpuReading, HostReading, Reading
from apps.hardware.simulated import SimulatedRig

GIB = 1 << 30


class Lab:
    """A simulated rig whose clock the test turns."""

    def __init__(self, **options: object) -> None:
        self.time = 1_800_000_000.0
        self.rig = SimulatedRig(now=lambda: self.time, host=lambda: HostReading(None, None, None), **options)  # type: ignore[arg-type]

    def wait(self, seconds: float, every: float = 1.0) -> list[Reading]:
        readings = []
        for _ in range(round(seconds / every)):
            self.time += every
            readings.append(self.rig.read())
        return readings

    def card(self, index: int) -> GpuReading:
        return self.rig.read().gpus[index]

    def load(self, *indexes: int, utilization: float = 1.0, memory: int = 20 * GIB, owner: str = "job") -> None:
        self.rig.hold(
            owner,
            4242,
            "engine",
            [{"index": i, "memory_used_bytes": memory, "utilization": utilization} for i in indexes],
        )


def value(number: float | None) -> float:
    assert number is not None
    return number


def test_an_idle_card_is_cool_quiet_and_slow() -> None:
    lab = Lab()
    card = lab.wait(300)[-1].gpus[0]
    assert 20 <= value(card.power_watts) <= 38
    assert value(card.temperature_celsius) < 40
    assert card.fan_percent == 0
    assert (card.sm_clock_mhz, card.memory_clock_mhz, card.performance_state) == (210, 405, 8)
    assert card.throttle_reasons == ("gpu_idle",)
    assert card.utilization_percent == 0


def test_load_raises_power_at_once_and_temperature_after_it() -> None:
    lab = Lab()
    idle = lab.wait(10)[-1].gpus[0]
    lab.load(0)
    early = lab.wait(3)[-1].gpus[0]
    late = lab.wait(120)[-1].gpus[0]
    assert value(early.power_watts) > value(idle.power_watts) + 200
    assert value(early.temperature_celsius) < value(late.temperature_celsius) - 20
    assert value(late.fan_percent) >= 30


def test_more_load_draws_more_power() -> None:
    watts = []
    for utilization in (0.2, 0.5, 0.8):
        lab = Lab()
        lab.load(0, utilization=utilization)
        watts.append(value(lab.wait(10)[-1].gpus[0].power_watts))
    assert watts == sorted(watts)
    assert watts[0] < watts[1] < watts[2]


def test_full_load_runs_into_the_power_limit_and_lowers_the_clock() -> None:
    lab = Lab()
    lab.load(0)
    at_350 = lab.wait(10)[-1].gpus[0]
    lab.rig.fault("power_limit", 0, watts=250)
    at_250 = lab.wait(10)[-1].gpus[0]
    assert at_350.throttle_reasons == at_250.throttle_reasons == ("sw_power_cap",)
    assert value(at_350.power_watts) <= 350 * 1.02
    assert value(at_250.power_watts) <= 250 * 1.02
    assert value(at_250.sm_clock_mhz) < value(at_350.sm_clock_mhz) < physics.BOOST_CLOCK_MHZ
    assert value(at_250.sm_clock_mhz) % 15 == 0
    assert at_250.power_limit_watts == 250


def test_a_light_load_reaches_the_boost_clock_without_a_reason_to_throttle() -> None:
    lab = Lab()
    lab.load(0, utilization=0.3)
    card = lab.wait(10)[-1].gpus[0]
    assert card.sm_clock_mhz == physics.BOOST_CLOCK_MHZ
    assert card.throttle_reasons == ()


def test_a_stuck_fan_makes_a_loaded_card_throttle_on_its_temperature() -> None:
    lab = Lab()
    lab.load(0, 3)
    lab.rig.fault("fan", 0, percent=0)
    last = lab.wait(600)[-1]
    stuck, cooled = last.gpus[0], last.gpus[3]
    assert stuck.fan_percent == 0
    assert "sw_thermal" in value_of(stuck.throttle_reasons)
    assert "sw_thermal" not in value_of(cooled.throttle_reasons)
    assert value(stuck.temperature_celsius) > physics.CORE_TARGET_CELSIUS
    assert value(stuck.sm_clock_mhz) < value(cooled.sm_clock_mhz)
    assert value(stuck.power_watts) < value(cooled.power_watts)


def value_of(reasons: tuple[str, ...] | None) -> tuple[str, ...]:
    assert reasons is not None
    return reasons


def test_overheated_memory_throttles_a_card_whose_core_is_cool() -> None:
    lab = Lab()
    lab.load(0, 3)
    lab.rig.fault("vram", 0, offset_celsius=40)
    last = lab.wait(900)[-1]
    hot, healthy = last.gpus[0], last.gpus[3]
    assert value(hot.memory_temperature_celsius) >= physics.VRAM_THROTTLE_CELSIUS
    assert "hw_thermal" in value_of(hot.throttle_reasons)
    assert value(hot.temperature_celsius) < physics.CORE_TARGET_CELSIUS
    assert value(hot.sm_clock_mhz) < value(healthy.sm_clock_mhz)


def test_a_card_above_its_slowdown_temperature_halves_its_clock() -> None:
    card = physics.Card(core_celsius=96.0)
    card.step(0.1, load=0.5)
    assert card.sm_clock_mhz <= physics.BOOST_CLOCK_MHZ / 2
    assert {"hw_slowdown", "hw_thermal"} <= set(card.throttle_reasons)


def test_a_card_at_its_shutdown_temperature_cuts_its_power() -> None:
    card = physics.Card(core_celsius=98.5)
    card.step(0.1, load=1.0)
    assert card.shut_down


def test_middle_cards_run_hotter_than_outer_ones() -> None:
    lab = Lab()
    lab.load(0, 1, 2, 3)
    celsius = [value(gpu.temperature_celsius) for gpu in lab.wait(300)[-1].gpus]
    assert min(celsius[1], celsius[2]) >= max(celsius[0], celsius[3]) + 2


def test_the_hotspot_is_above_the_core() -> None:
    lab = Lab()
    lab.load(0)
    for reading in lab.wait(60):
        card = reading.gpus[0]
        assert value(card.hotspot_temperature_celsius) >= value(card.temperature_celsius) + 8


def test_the_energy_counter_is_the_integral_of_power() -> None:
    lab = Lab()
    lab.wait(5)
    before = value(lab.card(0).energy_joules)
    lab.load(0, utilization=0.7)
    readings = lab.wait(60)
    lab.rig.release("job")
    readings += lab.wait(30)
    # power is the mean of the last second and the readings are one second apart
    from_power = sum(value(reading.gpus[0].power_watts) for reading in readings)
    assert value(readings[-1].gpus[0].energy_joules) - before == pytest.approx(from_power, rel=1e-3)


def test_power_is_a_mean_over_one_second() -> None:
    lab = Lab()
    lab.wait(5)
    lab.load(0)
    watts = [value(reading.gpus[0].power_watts) for reading in lab.wait(2, every=0.1)]
    assert watts[0] < 100 < watts[4] < watts[12], "a step in load shows as a ramp of one second"
    assert watts[12] == pytest.approx(watts[19], rel=0.05)


def test_a_card_falls_idle_a_moment_after_its_load_ends() -> None:
    lab = Lab()
    lab.load(0)
    lab.wait(60)
    lab.rig.release("job")
    soon = lab.wait(1)[-1].gpus[0]
    later = lab.wait(10)[-1].gpus[0]
    assert soon.performance_state == 2
    assert later.performance_state == 8
    assert value(later.power_watts) < 40


def test_the_pcie_link_drops_its_generation_at_idle_but_never_its_width() -> None:
    lab = Lab()
    idle = lab.wait(10)[-1].gpus[0]
    lab.load(0)
    loaded = lab.wait(5)[-1].gpus[0]
    lab.rig.release("job")
    idle_again = lab.wait(10)[-1].gpus[0]
    assert [card.pcie_gen for card in (idle, loaded, idle_again)] == [1, 4, 1]
    assert [card.pcie_width for card in (idle, loaded, idle_again)] == [16, 16, 16]


def test_both_ends_of_a_bridge_count_the_same_traffic() -> None:
    lab = Lab()
    lab.load(0, 1, utilization=0.8)
    first, second = (reading.gpus for reading in (lab.wait(1)[-1], lab.wait(30)[-1]))
    sent = value(second[0].nvlink_tx_bytes) - value(first[0].nvlink_tx_bytes)
    received = value(second[1].nvlink_rx_bytes) - value(first[1].nvlink_rx_bytes)
    assert sent == received
    assert sent > 1e9


def test_an_idle_bridge_carries_its_keep_alive_and_nothing_else() -> None:
    lab = Lab()
    lab.load(0, 1)
    first, second = (reading.gpus for reading in (lab.wait(1)[-1], lab.wait(100)[-1]))
    per_second = (value(second[2].nvlink_tx_bytes) - value(first[2].nvlink_tx_bytes)) / 100
    assert 1 << 20 <= per_second <= 1.5 * (1 << 20)


def test_an_engine_across_two_pairs_talks_over_pcie_too() -> None:
    in_a_pair, across = Lab(), Lab()
    in_a_pair.load(0, 1)
    across.load(0, 2)
    for lab in (in_a_pair, across):
        lab.wait(1)
        lab.wait(30)
    assert value(across.card(0).pcie_tx_bytes) > 10 * value(in_a_pair.card(0).pcie_tx_bytes)
    assert value(across.card(0).nvlink_tx_bytes) < value(in_a_pair.card(0).nvlink_tx_bytes) / 10


def test_loading_weights_shows_on_the_pcie_counter() -> None:
    lab = Lab()
    lab.wait(5)
    before = value(lab.card(0).pcie_rx_bytes)
    lab.load(0, utilization=0.0, memory=12 * GIB)
    assert lab.wait(1)[-1].gpus[0].pcie_gen == 4
    assert value(lab.wait(9)[-1].gpus[0].pcie_rx_bytes) - before >= 12 * GIB


def test_the_same_seed_and_clock_give_the_same_readings() -> None:
    def story(seed: int) -> list[Reading]:
        lab = Lab(seed=seed)
        readings = lab.wait(5, every=0.2)
        lab.load(0, 1, utilization=0.6)
        return readings + lab.wait(30)

    assert story(7) == story(7)
    assert story(7) != story(8)


def test_a_rig_that_nobody_read_for_a_day_is_still_sane() -> None:
    lab = Lab()
    lab.load(0, 1, 2, 3)
    lab.time += 86400
    for card in lab.rig.read().gpus:
        assert not card.lost
        assert 60 <= value(card.temperature_celsius) <= 90
        assert 250 <= value(card.power_watts) <= 360
        assert value(card.energy_joules) == pytest.approx(347 * 86400, rel=0.05)


def test_a_clock_that_goes_back_changes_nothing() -> None:
    lab = Lab()
    lab.load(0)
    before = lab.wait(10)[-1].gpus[0]
    lab.time -= 3600
    assert lab.card(0).energy_joules == before.energy_joules
