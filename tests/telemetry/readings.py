"""Readings for tests, by hand and from the simulation."""

from __future__ import annotations

from typing import Any

from apps.hardware.protocol import GpuProcess, GpuReading, HostReading, Reading

GIB = 2**30


def card(uuid: str = "GPU-a", **values: Any) -> GpuReading:
    defaults: dict[str, Any] = {
        "utilization_percent": 50.0,
        "memory_used_bytes": 10 * GIB,
        "power_watts": 250.0,
        "power_limit_watts": 350.0,
        "temperature_celsius": 60.0,
        "memory_temperature_celsius": 80.0,
        "pcie_width": 16,
        "throttle_reasons": ("sw_power_cap",),
        "processes": (GpuProcess(1, 9 * GIB, "engine"),),
    }
    return GpuReading(uuid=uuid, **defaults | values)


def reading(at: float, *cards: GpuReading) -> Reading:
    return Reading(at=at, gpus=cards, host=HostReading(10.0, 4 * GIB, 64 * GIB))
