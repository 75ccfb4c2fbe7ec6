"""What a profile's page shows of its plan: a bar per card, both kinds of boot, what would fit."""

from __future__ import annotations

import json
from dataclasses import dataclass

from apps.deployments.plan import Plan, plan
from apps.deployments.policies.verdicts import pinned_profiles
from apps.deployments.switch_sleep import Effect, effect_of
from apps.profiles.fit import BootForecast, GpuEstimate, Range
from apps.profiles.forecast import Forecast, Suggestion
from apps.profiles.models import ProfileVersion
from apps.rigs.models import Rig

# A part, its colour in the bar (weights and cache as on the rig page) and its name.
PARTS = (
    ("weights", "2", "Weights"),
    ("kv_cache", "1", "KV cache"),
    ("activation", "3", "Activations"),
    ("cuda_graphs", "4", "CUDA graphs"),
    ("overhead", "5", "Overhead"),
)


@dataclass(frozen=True, slots=True)
class Row:
    """One card: ``segments`` are (colour, bytes) for the bar, ``values`` the parts in the table's order."""

    index: int
    label: str
    total_bytes: int
    segments: tuple[tuple[str, int], ...]
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Offer:
    """A suggested change and what its button sends."""

    sentence: str
    values: str


@dataclass(frozen=True, slots=True)
class Panel:
    """``boots`` are (name, whether it is the next one, forecast); ``fills`` the bar's colours with their names."""

    plan: Plan
    effect: Effect
    fit: Forecast
    headings: tuple[str, ...]
    rows: tuple[Row, ...]
    boots: tuple[tuple[str, bool, BootForecast], ...]
    offers: tuple[Offer, ...]
    fills: tuple[tuple[str, str], ...]
    reasons: tuple[str, ...]


def plan_panel(version: ProfileVersion, rig: Rig) -> Panel:
    the_plan = plan(version, rig, advise=True)
    effect = effect_of(version, rig, the_plan=the_plan, keep=pinned_profiles(rig))
    found = the_plan.forecast
    estimate = found.estimate
    boots = [("First boot", estimate.first_boot), ("Later boots", estimate.later_boots)]
    if estimate.first_boot == estimate.later_boots:
        boots = [("Each boot", estimate.first_boot)]
    used = [part for part in PARTS if any(getattr(gpu, part[0]).high for gpu in estimate.gpus)]
    return Panel(
        plan=the_plan,
        effect=effect,
        fit=found,
        headings=(*(label for _, _, label in used), "In use by others", "Stays free"),
        rows=tuple(_row(found, gpu, used) for gpu in estimate.gpus),
        boots=tuple((name, boot == estimate.next_boot, boot) for name, boot in boots if boot is not None),
        offers=tuple(Offer(s.sentence, _sent(version, s)) for s in found.suggestions),
        reasons=tuple(dict.fromkeys(r for binding in the_plan.bindings for r in binding.reasons)),
        fills=(("rest", "In use by others"), *((colour, label) for _, colour, label in used)),
    )


def _row(found: Forecast, gpu: GpuEstimate, used: list[tuple[str, str, str]]) -> Row:
    card, memory = found.cards[gpu.position], found.memory[gpu.position]
    others = memory.in_use_bytes
    label = ", ".join(f"{label} {_words(getattr(gpu, name))}" for name, _, label in used)
    return Row(
        index=card.index,
        label=f"GPU {card.index} of {_gib(memory.total_bytes)} GiB: {label}",
        total_bytes=memory.total_bytes,
        segments=(("rest", others or 0), *((colour, getattr(gpu, name).middle) for name, colour, _ in used)),
        values=(
            *(_words(getattr(gpu, name)) for name, _, _ in used),
            "not measured" if others is None else f"{_gib(others)} GiB",
            _words(gpu.slack),
        ),
    )


def _gib(value: int) -> str:
    return f"{value / 2**30:.1f}".replace("-", "\u2212")


def _words(value: Range) -> str:
    low, high = _gib(value.low), _gib(value.high)
    return f"{low} GiB" if low == high else f"{low} to {high} GiB"


def _sent(version: ProfileVersion, suggestion: Suggestion) -> str:
    """Only what differs, as ``profiles:change`` takes it."""
    values = {
        name: getattr(suggestion, name)
        for name in ("options", "replicas", "tensor_parallel_size", "pipeline_parallel_size")
        if getattr(suggestion, name) != getattr(version, name)
    }
    return json.dumps(values)
