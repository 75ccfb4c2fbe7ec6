"""What a person should look at: pure rules over one frame, with hysteresis, and their sentences.

The sampler decides which alerts are on and puts them into the frame; pages only phrase them, so that
every page and every rig shows the same ones.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

HYSTERESIS_CELSIUS = 2.0
# GDDR6X: Micron gives no public limit; cards throttle near 110 °C, so 95 leaves time to act.
MEMORY_HOT_CELSIUS = 95.0
MEMORY_THROTTLE_CELSIUS = 110
CORE_MARGIN_CELSIUS = 5.0
CORE_HOT_DEFAULT_CELSIUS = 88.0


class Card(Protocol):
    """What the rules need to know of a card: a Gpu row or the driver's GpuInfo."""

    @property
    def index(self) -> Any: ...
    @property
    def uuid(self) -> Any: ...
    @property
    def temperature_slowdown_celsius(self) -> Any: ...
    @property
    def pcie_width_max(self) -> Any: ...


@dataclass(frozen=True, slots=True)
class Alert:
    """``level`` is warn or bad; ``title`` says what, ``text`` what it means and what to do."""

    key: str
    level: str
    title: str
    text: str = ""
    href: str = ""
    link: str = ""


def active(
    cards: Collection[Card], readings: Mapping[str, Mapping[str, Any]], before: Collection[tuple[str, str]] = ()
) -> tuple[tuple[str, str], ...]:
    """The ``(kind, uuid)`` pairs that are on now; a heat alert goes off 2 °C below where it came on."""
    found = []
    for card in sorted(cards, key=lambda c: c.index):
        reading = readings.get(card.uuid)
        if reading is None or reading.get("lost"):
            continue
        for kind, value, limit in (
            ("hot", reading.get("temperature_celsius"), core_limit(card)),
            ("memory_hot", reading.get("memory_temperature_celsius"), MEMORY_HOT_CELSIUS),
        ):
            margin = HYSTERESIS_CELSIUS if (kind, card.uuid) in before else 0.0
            if value is not None and value >= limit - margin:
                found.append((kind, card.uuid))
        if reading.get("throttle"):
            found.append(("throttled", card.uuid))
        width = reading.get("pcie_width")
        # The generation drops at idle and comes back under load; the width never should.
        if width is not None and card.pcie_width_max is not None and width < card.pcie_width_max:
            found.append(("narrow", card.uuid))
    return tuple(found)


def core_limit(card: Card) -> float:
    slowdown = card.temperature_slowdown_celsius
    return CORE_HOT_DEFAULT_CELSIUS if slowdown is None else float(slowdown) - CORE_MARGIN_CELSIUS


def phrase(kind: str, card: Card, reading: Mapping[str, Any], count: int) -> Alert:
    """The sentence of an alert. ``count`` is the number of cards: those inside sit between others."""
    inner = 0 < card.index < count - 1
    between = f"GPU {card.index} sits between others: check" if inner else "Check"
    name = f"GPU {card.index}"
    href, link = f"/telemetry/?metric=temperature&gpu={card.index}&range=24h", "Last 24 hours"
    key = f"{kind}-{card.index}"
    if kind == "memory_hot":
        degrees = reading.get("memory_temperature_celsius")
        level = "bad" if degrees is not None and degrees >= 105 else "warn"
        return Alert(
            key,
            level,
            f"{name} runs its memory at {degrees:.0f} °C." if degrees is not None else f"{name} runs its memory hot.",
            f"It throttles near {MEMORY_THROTTLE_CELSIUS}. {between} its fan and the air between the cards.",
            href,
            link,
        )
    if kind == "hot":
        degrees = reading.get("temperature_celsius")
        slows = card.temperature_slowdown_celsius
        return Alert(
            key,
            "bad" if degrees is not None and slows is not None and degrees >= slows else "warn",
            f"{name} is at {degrees:.0f} °C." if degrees is not None else f"{name} is hot.",
            f"It slows itself down at {slows or 'about 93'}. {between} its fan, or lower its power limit.",
            href,
            link,
        )
    if kind == "throttled":
        reasons = str(reading.get("throttle") or "").replace("_", " ")
        why = "a power brake from the supply" if "power brake" in reasons else "heat"
        return Alert(
            key,
            "warn",
            f"{name} slows itself down.",
            f"The driver reports {reasons or why}: it loses speed to {why}.",
            href,
            link,
        )
    if kind == "narrow":
        return Alert(
            key,
            "warn",
            f"{name} runs on {reading.get('pcie_width')} PCIe lanes of {card.pcie_width_max}.",
            "Traffic between cards without a bridge is slower. Reseat the card or its riser, then check the slot.",
        )
    return Alert(key, "warn", f"{name}: {kind.replace('_', ' ')}.")
