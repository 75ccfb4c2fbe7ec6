"""Frames, alerts and means: pure parts of live telemetry."""

from __future__ import annotations

from dataclasses import dataclass

from apps.hardware.protocol import GpuProcess, GpuReading
from apps.telemetry import alerts
from apps.telemetry.frames import FrameBuilder, parse
from apps.telemetry.services import SpanMeans
from tests.telemetry.readings import GIB, card, reading


@dataclass
class Facts:
    index: int = 0
    uuid: str = "GPU-a"
    temperature_slowdown_celsius: int | None = 95
    pcie_width_max: int | None = 16


def frame_of(*cards: GpuReading, at: float = 100.0):
    return parse(FrameBuilder().build(reading(at, *cards)))


def test_what_a_card_does_not_report_stays_none_in_a_frame() -> None:
    seen = frame_of(GpuReading(uuid="GPU-a")).gpus["GPU-a"]
    assert seen["memory_temperature_celsius"] is None
    assert seen["power_watts"] is None
    assert seen["throttle"] is None
    assert seen["process_memory_bytes"] is None


def test_no_process_is_zero_bytes_but_unreported_processes_are_none() -> None:
    assert frame_of(card(processes=())).gpus["GPU-a"]["process_memory_bytes"] == 0
    assert frame_of(card(processes=(GpuProcess(1, None, "x"),))).gpus["GPU-a"]["process_memory_bytes"] is None
    assert frame_of(card()).gpus["GPU-a"]["process_memory_bytes"] == 9 * GIB


def test_nvlink_traffic_is_a_rate_of_counters_and_none_when_they_fall() -> None:
    frames = FrameBuilder()
    frames.build(reading(100.0, card(nvlink_tx_bytes=1000, nvlink_rx_bytes=500)))
    second = parse(frames.build(reading(102.0, card(nvlink_tx_bytes=3000, nvlink_rx_bytes=2500))))
    assert second.gpus["GPU-a"]["nvlink_bytes_per_second"] == 2000
    third = parse(frames.build(reading(103.0, card(nvlink_tx_bytes=0, nvlink_rx_bytes=0))))
    assert third.gpus["GPU-a"]["nvlink_bytes_per_second"] is None


def test_a_frame_older_than_five_seconds_is_stale() -> None:
    seen = frame_of(card(), at=100.0)
    assert not seen.is_stale(104.0)
    assert seen.is_stale(106.0)


def on(*cards: GpuReading, before: tuple[tuple[str, str], ...] = (), facts: Facts | None = None):
    return alerts.active([facts or Facts()], frame_of(*cards).gpus, before)


def test_the_software_power_cap_alone_is_no_alert() -> None:
    assert on(card(throttle_reasons=("sw_power_cap", "gpu_idle"))) == ()


def test_hot_memory_alerts_and_goes_off_only_two_degrees_below() -> None:
    hot = on(card(memory_temperature_celsius=95.0))
    assert hot == (("memory_hot", "GPU-a"),)
    assert on(card(memory_temperature_celsius=94.0)) == ()
    assert on(card(memory_temperature_celsius=94.0), before=hot) == hot
    assert on(card(memory_temperature_celsius=92.0), before=hot) == ()


def test_a_card_without_memory_sensor_never_alerts_for_its_memory() -> None:
    assert on(card(memory_temperature_celsius=None)) == ()


def test_thermal_throttling_and_lost_lanes_are_told() -> None:
    found = on(card(throttle_reasons=("sw_thermal",), pcie_width=8))
    assert [kind for kind, _ in found] == ["throttled", "narrow"]


def test_a_lost_card_has_no_readings_to_alert_on() -> None:
    assert on(GpuReading(uuid="GPU-a", lost=True)) == ()


def test_an_inner_card_is_told_to_sit_between_others() -> None:
    seen = frame_of(card(memory_temperature_celsius=101.0)).gpus["GPU-a"]
    inner = alerts.phrase("memory_hot", Facts(index=2), seen, 4)
    assert inner.title == "GPU 2 runs its memory at 101 °C."
    assert "sits between others" in inner.text
    assert "sits between others" not in alerts.phrase("memory_hot", Facts(index=3), seen, 4).text


def means_of(*readings_: object) -> list[dict]:
    frames, means, rows = FrameBuilder(), SpanMeans(), []
    for r in readings_:
        rows += means.add(r, frames.build(r))
    return rows


def test_ten_seconds_become_one_row_of_means_and_energy() -> None:
    rows = means_of(
        reading(100.0, card(power_watts=200.0, energy_joules=1000.0)),
        reading(105.0, card(power_watts=300.0, energy_joules=2250.0)),
        reading(110.0, card(power_watts=300.0, energy_joules=3500.0)),
        reading(120.0, card(power_watts=300.0, energy_joules=6500.0)),
    )
    assert [r["power_watts"] for r in rows] == [250.0, 300.0]
    assert rows[0]["at"].timestamp() == 100
    # What was used between the last reading of one span and the first of the next falls to one of them.
    assert sum(r["energy_joules"] for r in rows) == 3500.0 - 1000.0


def test_a_mean_leaves_out_what_was_not_reported() -> None:
    rows = means_of(
        reading(100.0, card(fan_percent=None)), reading(104.0, card(fan_percent=40.0)), reading(111.0, card())
    )
    assert rows[0]["fan_percent"] == 40.0
    assert "sm_clock_mhz" not in rows[0]


def test_a_lost_card_adds_nothing_to_the_means() -> None:
    assert means_of(reading(100.0, GpuReading(uuid="GPU-a", lost=True)), reading(111.0, card())) == []
