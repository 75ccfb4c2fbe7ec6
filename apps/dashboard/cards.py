"""The rig as it stands: cards in slot order, the bridges between them, memory and power. For the home page."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from apps.common.units import gib
from apps.deployments.models import SERVING, WHOLE_CARD, Deployment
from apps.deployments.strays import STRAY_ENGINE, strays
from apps.gateway.selectors import ledger_trouble
from apps.rigs.models import Gpu, Link, Rig
from apps.rigs.selectors import gpus_in_slot_order, link_list
from apps.telemetry import alerts, selectors
from apps.telemetry.consumers import SPARK_METRIC, SPARK_SECONDS
from apps.telemetry.frames import Frame

COLUMNS_MAX = 8
LANES_MAX = 4


@dataclass(frozen=True, slots=True)
class GpuCard:
    """One slot. ``reading`` is empty for a card that is missing or was never read."""

    gpu: Gpu
    reading: Mapping[str, Any]
    present: bool
    holder: str  # the deployment that reserved it
    memory_parts: tuple[tuple[str, str, float], ...]  # (name, fill, percent of the card)
    weights_bytes: int
    hot_celsius: float
    spark: tuple[float | None, ...]
    bridge: str  # in words, for narrow screens and screen readers

    @property
    def memory_label(self) -> str:
        used = self.reading.get("memory_used_bytes")
        return f"Memory of GPU {self.gpu.index}: {gib(used)} of {gib(self.gpu.memory_total_bytes)}"

    @property
    def memory_rects(self) -> list[dict[str, str]]:
        x, rects = 0.0, []
        for name, fill, percent in self.memory_parts:
            width = min(percent, 100 - x)
            rects.append({"name": name, "fill": fill, "x": f"{x:.2f}", "width": f"{width:.2f}"})
            x += width
        return rects

    @property
    def memory_percent(self) -> int:
        return round(min(100.0, sum(percent for _, _, percent in self.memory_parts)))

    @property
    def is_hot(self) -> bool:
        degrees = self.reading.get("temperature_celsius")
        return degrees is not None and degrees >= self.hot_celsius

    @property
    def memory_is_hot(self) -> bool:
        degrees = self.reading.get("memory_temperature_celsius")
        return degrees is not None and degrees >= alerts.MEMORY_HOT_CELSIUS


@dataclass(frozen=True, slots=True)
class Bridge:
    """Drawn from column ``start`` over ``span`` columns, in ``lane`` (1 is the upper one)."""

    start: int
    span: int
    lane: int
    tone: str  # "", warn or bad
    text: str
    sentence: str


@dataclass(frozen=True, slots=True)
class Power:
    watts: float | None
    supply_watts: int | None
    caps: str

    @property
    def percent(self) -> float:
        return min(100.0, 100 * self.watts / self.supply_watts) if self.watts and self.supply_watts else 0.0


@dataclass(frozen=True, slots=True)
class RigPanel:
    rig: Rig
    cards: tuple[GpuCard, ...]
    bridges: tuple[Bridge, ...]
    lanes: int
    power: Power
    is_live: bool
    seen_at: datetime | None
    has_weights: bool

    @property
    def columns(self) -> int:
        return max(1, min(COLUMNS_MAX, len(self.cards)))


def rig_panel(rig: Rig, live: Sequence[Deployment]) -> RigPanel:
    frame, ring = selectors.live(rig.slug, SPARK_SECONDS)
    gpus = gpus_in_slot_order(rig)
    links = link_list(rig)
    holders = _holders(live)
    cards = tuple(_card(g, frame, ring, holders.get(g.pk), links) for g in gpus)
    bridges = place_bridges([g.pk for g in gpus], {g.pk for g in gpus if g.present}, links)
    return RigPanel(
        rig=rig,
        cards=cards,
        bridges=bridges,
        lanes=max((b.lane for b in bridges), default=0),
        power=_power(rig, [c for c in cards if c.present]),
        is_live=selectors.is_live(frame),
        seen_at=selectors.last_seen(rig, frame),
        has_weights=any(c.weights_bytes for c in cards),
    )


def _holders(live: Sequence[Deployment]) -> dict[int, Deployment]:
    """Which deployment reserved which card (by primary key)."""
    return {
        r.gpu_id: deployment
        for deployment in live
        for replica in deployment.replicas.all()
        for r in replica.reservations.all()
        if r.released_at is None and r.gpu_id is not None and r.slot == WHOLE_CARD
    }


def _card(
    gpu: Gpu, frame: Frame | None, ring: Sequence[Frame], holder: Deployment | None, links: Sequence[Link]
) -> GpuCard:
    reading = frame.gpus.get(gpu.uuid, {}) if frame else {}
    present = gpu.present and not reading.get("lost")
    weights = _weights_bytes(holder, reading.get("process_memory_bytes"))
    return GpuCard(
        gpu=gpu,
        reading=reading if present else {},
        present=present,
        holder=holder.profile_name if holder else "",
        memory_parts=_memory_parts(gpu.memory_total_bytes, reading, weights),
        weights_bytes=weights,
        hot_celsius=alerts.core_limit(gpu),
        spark=tuple(f.gpus.get(gpu.uuid, {}).get(SPARK_METRIC) for f in ring),
        bridge=_bridge_words(gpu, links),
    )


def _weights_bytes(holder: Deployment | None, process_bytes: int | None) -> int:
    """The weights' share of a card, known only once the engine serves; 0 where it is not known."""
    if holder is None or holder.status not in SERVING or not process_bytes:
        return 0
    version = holder.version
    total = version.model.weights_bytes
    if not total:
        return 0
    share = total // (version.tensor_parallel_size * version.pipeline_parallel_size)
    return share if share <= process_bytes else 0  # more than all it holds: the catalogue's size is of another file


def _memory_parts(total: int | None, reading: Mapping[str, Any], weights: int) -> tuple[tuple[str, str, float], ...]:
    used, process = reading.get("memory_used_bytes"), reading.get("process_memory_bytes")
    amounts = {
        "weights": weights,
        "process": max(0, (process or 0) - weights),
        "rest": max(0, (used or 0) - (process or 0)),
    }
    fills = {"weights": "2", "process": "1", "rest": "rest"}
    return tuple((name, fills[name], 100 * amount / total if total else 0.0) for name, amount in amounts.items())


def _power(rig: Rig, cards: Sequence[GpuCard]) -> Power:
    watts = [c.reading["power_watts"] for c in cards if c.reading.get("power_watts") is not None]
    limits = [round(c.reading["power_limit_watts"]) for c in cards if c.reading.get("power_limit_watts") is not None]
    caps = " + ".join(f"{limits.count(w)}×{w} W" for w in sorted(set(limits), reverse=True))
    return Power(sum(watts) if watts else None, rig.power_supply_watts, caps)


def place_bridges(order: Sequence[int], present: set[int], links: Sequence[Link]) -> tuple[Bridge, ...]:
    """Where each bridge goes above cards in ``order`` (primary keys). Ones that overlap get lanes of their own."""
    column = {pk: i + 1 for i, pk in enumerate(order)}
    spans = []
    for link in links:
        if link.first_id not in column or column[link.first_id] > COLUMNS_MAX:
            continue
        ends = sorted(column[pk] for pk in (link.first_id, link.second_id) if pk in column)
        spans.append((ends[0], min(ends[-1], COLUMNS_MAX), link))
    placed: list[tuple[int, int, int, Link]] = []
    for start, end, link in sorted(spans, key=lambda s: (s[1] - s[0], s[0])):
        taken = {lane for a, b, lane, _ in placed if (start < b and a < end) or (a, b) == (start, end)}
        lane = next((n for n in range(1, LANES_MAX) if n not in taken), LANES_MAX)
        placed.append((start, end, lane, link))
    # Short ones lie next to the cards: lanes were counted from below, the page counts from above.
    deepest = max((lane for _, _, lane, _ in placed), default=1)
    return tuple(
        Bridge(start, end - start + 1, deepest - lane + 1, *_bridge_look(link, present))
        for start, end, lane, link in sorted(placed, key=lambda p: (p[0], p[1]))
    )


def _bridge_look(link: Link, present: set[int]) -> tuple[str, str, str]:
    """Tone, label and sentence."""
    ends = f"GPU {link.first.index} and " + (f"GPU {link.second.index}" if link.second else "an unknown card")
    missing = link.first_id not in present or (link.second_id is not None and link.second_id not in present)
    if missing:
        return "bad", "NVLink: a card is missing", f"The bridge between {ends} carries nothing: a card is missing."
    if link.second is None:
        return (
            "bad",
            "NVLink: far end unknown",
            f"The NVLink connection of GPU {link.first.index} leads to a card that is not reported.",
        )
    if link.active_lanes == 0:
        return (
            "bad",
            "NVLink broken",
            f"The bridge between {ends} is broken: none of its {link.total_lanes} lanes is active. Reseat it.",
        )
    speed = f"{link.gigabytes_per_second:.0f} GB/s" if link.gigabytes_per_second is not None else "speed not reported"
    if link.active_lanes < link.total_lanes:
        lanes = f"{link.active_lanes} of {link.total_lanes} lanes"
        return "warn", f"NVLink {speed}, {lanes}", f"The bridge between {ends} runs on {lanes}, {speed}. Reseat it."
    return "", f"NVLink {speed}", f"NVLink between {ends}: {speed} each way."


def _bridge_words(gpu: Gpu, links: Sequence[Link]) -> str:
    for link in links:
        if gpu.pk in (link.first_id, link.second_id):
            peer = link.second if link.first_id == gpu.pk else link.first
            name = f"GPU {peer.index}" if peer else "unknown"
            if link.active_lanes == 0:
                return f"{name}, broken"
            lanes = "" if link.active_lanes == link.total_lanes else f", {link.active_lanes}/{link.total_lanes} lanes"
            return name + lanes
    return ""


def rig_alerts(rig: Rig) -> tuple[alerts.Alert, ...]:
    """What somebody should look at now: hardware, missing cards, a silent sampler, hot cards."""
    frame = selectors.latest(rig.slug)
    gpus = gpus_in_slot_order(rig)
    found: list[alerts.Alert] = []
    if rig.hardware_error:
        found.append(alerts.Alert("hardware", "bad", "The cards cannot be read.", rig.hardware_error))
    elif not rig.hardware_source:
        found.append(
            alerts.Alert(
                "sampler",
                "warn",
                "The cards have not been read yet.",
                "The sampler has not reported since the panel was set up.",
            )
        )
    elif frame is None or frame.is_stale(time.time()):
        found.append(
            alerts.Alert(
                "stale",
                "warn",
                "No live readings.",
                "The sampler on this rig does not report; what is shown is old. It is started again by itself; "
                "its log says why it ended.",
            )
        )
    for gpu in gpus:
        lost = frame is not None and frame.gpus.get(gpu.uuid, {}).get("lost")
        if not gpu.present or lost:
            why = (
                "It fell off the bus while running (often Xid 79: power, riser or heat)."
                if lost
                else "The driver does not list it."
            )
            advice = (
                "Switch the machine off at the supply, reseat the card and its cables, then look at the kernel log."
            )
            found.append(alerts.Alert(f"missing-{gpu.index}", "bad", f"GPU {gpu.index} is missing.", f"{why} {advice}"))
    for stray in strays(rig):
        where = " on GPU " + ", ".join(map(str, stray.gpus)) if stray.gpus else ""
        memory = f", {gib(stray.memory_used_bytes)}" if stray.memory_used_bytes is not None else ""
        what = "An engine that is not on record" if stray.kind == STRAY_ENGINE else "A process of somebody else"
        user, command = stray.user or "an unknown user", stray.command or "command not readable"
        who = f"Process {stray.pid} of {user}{memory}: {command}."
        found.append(
            alerts.Alert(f"stray-{stray.pid}", "warn", f"{what} runs{where}.", f"{who} The panel leaves it alone.")
        )
    if frame is not None and not frame.is_stale(time.time()):
        by_uuid = {g.uuid: g for g in gpus}
        for kind, uuid in frame.alerts:
            if uuid in by_uuid:
                found.append(alerts.phrase(kind, by_uuid[uuid], frame.gpus[uuid], len(gpus)))
    if trouble := ledger_trouble():
        found.append(
            alerts.Alert(
                "ledger",
                "bad",
                "The usage ledger cannot be written.",
                f"{trouble}. Requests are served and their lines wait in memory; make room on the disk.",
            )
        )
    return tuple(found)
