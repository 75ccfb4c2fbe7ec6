"""Live frames: one reading as compact arrays, and the two keys in the store that keep them.

A frame is ``{"at": UTC seconds, "uuids": [...], "gpus": [[...], ...], "host": [...], "alerts": [[kind, uuid], ...]}``;
each card's list follows GPU_FIELDS, the host's HOST_FIELDS. Missing is None, never 0.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from apps.common.store import store
from apps.hardware.protocol import GpuReading, Reading

GPU_FIELDS = (
    "utilization_percent",
    "memory_used_bytes",
    "process_memory_bytes",
    "power_watts",
    "power_limit_watts",
    "temperature_celsius",
    "memory_temperature_celsius",
    "fan_percent",
    "sm_clock_mhz",
    "pcie_gen",
    "pcie_width",
    "nvlink_active_lanes",
    "nvlink_bytes_per_second",
    "throttle",
    "lost",
)
HOST_FIELDS = ("cpu_percent", "memory_used_bytes", "memory_total_bytes")
# Reasons that slow a card because something is wrong. sw_power_cap is left out: an idle 3090 reports it.
THROTTLE_FAULTS = ("hw_slowdown", "sw_thermal", "hw_thermal", "hw_power_brake")

LATEST_SECONDS = 3600  # how long "last seen" can still show what was seen
RING_LENGTH = 120  # one frame a second
VIEWERS_SECONDS = 10
STALE_AFTER_SECONDS = 5.0


def latest_key(rig_name: str) -> str:
    return f"rigpanel:telemetry:{rig_name}:latest"


def ring_key(rig_name: str) -> str:
    return f"rigpanel:telemetry:{rig_name}:ring"


def viewers_key(rig_name: str) -> str:
    return f"rigpanel:telemetry:{rig_name}:viewers"


class FrameBuilder:
    """Makes frames from readings; remembers the last one, for rates out of counters."""

    def __init__(self) -> None:
        self._before: tuple[float, dict[str, GpuReading]] | None = None

    def build(self, reading: Reading, alerts: Iterable[tuple[str, str]] = ()) -> dict[str, Any]:
        cards = {g.uuid: g for g in reading.gpus}
        earlier_at, earlier = self._before or (reading.at, {})
        seconds = reading.at - earlier_at
        rows = [_row(g, _nvlink_rate(g, earlier.get(g.uuid), seconds)) for g in reading.gpus]
        if seconds > 0 or self._before is None:
            self._before = (reading.at, cards)
        host = reading.host
        return {
            "at": round(reading.at, 3),
            "uuids": list(cards),
            "gpus": rows,
            "host": [host.cpu_percent, host.memory_used_bytes, host.memory_total_bytes],
            "alerts": [list(alert) for alert in alerts],
        }


def _row(gpu: GpuReading, nvlink_rate: float | None) -> list[Any]:
    reasons = gpu.throttle_reasons
    values: dict[str, Any] = {
        "process_memory_bytes": _process_memory(gpu),
        "nvlink_bytes_per_second": nvlink_rate,
        "throttle": None if reasons is None else " ".join(r for r in THROTTLE_FAULTS if r in reasons),
        "lost": 1 if gpu.lost else 0,
        "power_watts": None if gpu.power_watts is None else round(gpu.power_watts, 1),
    }
    return [values[name] if name in values else getattr(gpu, name) for name in GPU_FIELDS]


def _process_memory(gpu: GpuReading) -> int | None:
    if gpu.processes is None:
        return None
    known = [p.memory_used_bytes for p in gpu.processes if p.memory_used_bytes is not None]
    # No process is a fact (0); processes whose memory nobody reports are not.
    return sum(known) if known or not gpu.processes else None


def _nvlink_rate(now: GpuReading, before: GpuReading | None, seconds: float) -> float | None:
    if before is None or seconds <= 0:
        return None
    counters = (now.nvlink_tx_bytes, now.nvlink_rx_bytes, before.nvlink_tx_bytes, before.nvlink_rx_bytes)
    if any(c is None for c in counters):
        return None
    moved = sum(c or 0 for c in counters[:2]) - sum(c or 0 for c in counters[2:])
    return round(moved / seconds) if moved >= 0 else None  # counters fall when the driver is loaded again


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame as the pages read it."""

    at: float
    gpus: Mapping[str, Mapping[str, Any]]  # by UUID, then by field
    host: Mapping[str, Any]
    alerts: tuple[tuple[str, str], ...]

    def age_seconds(self, now: float) -> float:
        return max(0.0, now - self.at)

    def is_stale(self, now: float) -> bool:
        return self.age_seconds(now) > STALE_AFTER_SECONDS


def parse(raw: Mapping[str, Any]) -> Frame:
    return Frame(
        at=float(raw["at"]),
        gpus={u: dict(zip(GPU_FIELDS, row, strict=False)) for u, row in zip(raw["uuids"], raw["gpus"], strict=False)},
        host=dict(zip(HOST_FIELDS, raw.get("host", []), strict=False)),
        alerts=tuple((str(kind), str(uuid)) for kind, uuid in raw.get("alerts", [])),
    )


def keep(rig_name: str, frame: Mapping[str, Any]) -> bool:
    """Store a frame as the latest and in the ring, in one round trip. True while somebody looks.

    Raises redis.RedisError while the store is down.
    """
    text = json.dumps(frame, separators=(",", ":"))
    with store().pipeline(transaction=False) as pipe:
        pipe.set(latest_key(rig_name), text, ex=LATEST_SECONDS)
        pipe.rpush(ring_key(rig_name), text)
        pipe.ltrim(ring_key(rig_name), -RING_LENGTH, -1)
        pipe.expire(ring_key(rig_name), RING_LENGTH)
        pipe.exists(viewers_key(rig_name))
        answers: Sequence[Any] = pipe.execute()
    return bool(answers[-1])


def looked_at(rig_name: str) -> None:
    """Somebody watches this rig: the sampler reads faster for the next seconds."""
    store().set(viewers_key(rig_name), "1", ex=VIEWERS_SECONDS)
