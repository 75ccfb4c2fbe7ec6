"""What collecting gets and what judging gives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apps.hardware.protocol import GpuReading, Inventory, Reading
from apps.verification.models import Verdict

Data = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class KnownCard:
    """A card that the panel has seen in this rig, whether it is still there or not."""

    index: int
    uuid: str
    present: bool


@dataclass(frozen=True, slots=True)
class CheckContext:
    """``inventory`` and ``reading`` are fresh; None for checks that do not need the cards."""

    simulated: bool
    inventory: Inventory | None
    reading: Reading | None
    known: tuple[KnownCard, ...]
    models_dir: Path
    data_dir: Path
    sysfs: Path = Path("/sys")

    @property
    def cards(self) -> Inventory:
        if self.inventory is None:
            raise RuntimeError("this check reads the cards; NEEDS_CARDS must be true")
        return self.inventory

    def reading_of(self, uuid: str) -> GpuReading | None:
        return next((g for g in self.reading.gpus if g.uuid == uuid), None) if self.reading else None


@dataclass(frozen=True, slots=True)
class Judgement:
    """Texts for people: what was expected, what was measured, and what to do when they differ."""

    verdict: Verdict
    expected: str
    measured: str
    advice: str = ""


def named(indexes: Iterable[int]) -> str:
    """ "GPU 2", "GPUs 0 and 1"."""
    names = [str(i) for i in indexes]
    return f"GPU {names[0]}" if len(names) == 1 else f"GPUs {', '.join(names[:-1])} and {names[-1]}"


def same_or_list(values: Mapping[int, str]) -> str:
    """ "x16 on all 4" or "x16, x8, x16, x16" in slot order."""
    different = set(values.values())
    if len(different) == 1:
        word = next(iter(different))
        return word if len(values) == 1 else f"{word} on all {len(values)}"
    return ", ".join(f"{index}: {values[index]}" for index in sorted(values))
