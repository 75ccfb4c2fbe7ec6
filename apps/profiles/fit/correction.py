"""What a rig's own boots teach the next estimate: predicted parts beside those the engine's log told. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from apps.profiles.fit.ranges import GIB, Range

PARTS = ("weights", "activation", "cuda_graphs", "non_torch")
# A factor far from 1 is a different engine or a misread log rather than a constant that is a little off.
FACTOR_LIMITS = (0.5, 2.0)
# Parts below this say nothing about a factor: a log prints two decimals of a GiB.
LEAST_BYTES = int(0.04 * GIB)
BOOTS_TO_NARROW = 3
LEAST_HALF_WIDTH = int(0.05 * GIB)


@dataclass(frozen=True, slots=True)
class BootFacts:
    """One boot as its log told it: bytes on the fullest GPU, tokens per replica, seconds per phase. None where it did
    not say. ``compiled``: torch.compile ran afresh; None where the log does not show it."""

    weights: int | None = None
    activation: int | None = None
    cuda_graphs: int | None = None
    non_torch: int | None = None
    available_kv: int | None = None
    kv_cache_tokens: int | None = None
    compiled: bool | None = None
    seconds: Mapping[str, float] | None = None


@dataclass(frozen=True, slots=True)
class Prediction:
    """What was said before a boot, on the fullest GPU."""

    weights: Range
    activation: Range
    cuda_graphs: Range
    non_torch: Range
    available_kv: Range | None
    kv_cache_tokens: Range | None
    compiles: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Prediction:
        def span(name: str) -> Range | None:
            value = data.get(name)
            return Range(int(value["low"]), int(value["high"])) if value else None

        parts = {name: span(name) or Range(0, 0) for name in PARTS}
        return Prediction(
            **parts,
            available_kv=span("available_kv"),
            kv_cache_tokens=span("kv_cache_tokens"),
            compiles=bool(data.get("compiles")),
        )


@dataclass(frozen=True, slots=True)
class PartCorrection:
    """``factor`` times the middle; ``half_width`` replaces the range's own where enough boots agree."""

    factor: float = 1.0
    half_width: int | None = None

    def apply(self, value: Range) -> Range:
        if self.factor == 1.0 and self.half_width is None:
            return value
        half = value.width // 2
        if self.half_width is not None:
            half = min(half, self.half_width)
        middle = int((value.low + value.high) / 2 * self.factor)
        return Range(max(0, middle - half), middle + half)


UNCHANGED = PartCorrection()


@dataclass(frozen=True, slots=True)
class Correction:
    """``boots`` it was learnt from; 0 changes nothing."""

    weights: PartCorrection = UNCHANGED
    activation: PartCorrection = UNCHANGED  # of a boot that compiles
    later_activation: PartCorrection = UNCHANGED
    cuda_graphs: PartCorrection = UNCHANGED
    non_torch: PartCorrection = UNCHANGED
    boots: int = 0


NO_CORRECTION = Correction()


def correction(
    pairs: Iterable[tuple[Prediction, BootFacts]], *, same_settings: bool = False, same_model: bool = True
) -> Correction:
    """From predictions *without correction* and what became of them.

    Each part is moved by the median of actual over predicted. With ``same_settings`` (all pairs are boots of what is
    asked about) and three boots or more its range narrows to one and a half times the largest deviation from that;
    it never widens. A boot with negative non-torch memory is left out whole:
    vLLM 0.26 counts wrongly there (AWQ in sleep mode). An activation peak counts only where the boot was of the
    kind predicted, since one that compiles has another peak. Boots of another model (not ``same_model``) teach nothing
    about weights: what a kernel adds when it repacks them is a matter of the model's own quantization.
    """
    usable = [(said, was) for said, was in pairs if was.non_torch is None or was.non_torch >= 0]

    def part(name: str, *, compiles: bool | None = None) -> PartCorrection:
        rows = []
        for said, was in usable:
            actual: int | None = getattr(was, name)
            middle = getattr(said, name).middle
            kind = said.compiles if was.compiled is None else was.compiled
            if actual is None or middle < LEAST_BYTES:
                continue
            if compiles is None or (kind == said.compiles == compiles):
                rows.append((middle, actual))
        return _part(rows, same_settings)

    return Correction(
        weights=part("weights") if same_model else UNCHANGED,
        activation=part("activation", compiles=True),
        later_activation=part("activation", compiles=False),
        cuda_graphs=part("cuda_graphs"),
        non_torch=part("non_torch"),
        boots=len(usable),
    )


def _part(rows: list[tuple[float, int]], same_settings: bool) -> PartCorrection:
    if not rows:
        return UNCHANGED
    low, high = FACTOR_LIMITS
    factor = min(max(median(actual / middle for middle, actual in rows), low), high)
    if not same_settings or len(rows) < BOOTS_TO_NARROW:
        return PartCorrection(factor)
    off = max(abs(actual - middle * factor) for middle, actual in rows)
    return PartCorrection(factor, max(int(1.5 * off), LEAST_HALF_WIDTH))
