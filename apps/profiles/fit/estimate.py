"""Whether a profile fits before it starts, and if not, the nearest setting that would. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import floor
from typing import Literal

from apps.profiles.fit.gpus import Verdict
from apps.profiles.fit.inputs import EngineOptions, Layout, LlamaOptions, ModelFacts, RigMemory
from apps.profiles.fit.outcomes import Outcome, outcome
from apps.profiles.fit.overheads import context, used_by_others

HIGHEST_UTILIZATION = 0.98
LOWEST_UTILIZATION = 0.30
SHORTEST_USEFUL_TOKENS = 4096  # shorter is no answer: other layouts are proposed then
LENGTH_STEP = 1024

Setting = Literal[
    "gpu_memory_utilization",
    "max_model_len",
    "kv_cache_dtype",
    "layout",
    "layout and max_model_len",
    "context_tokens",
    "cache_type",
]


@dataclass(frozen=True, slots=True)
class Change:
    """A setting with which the model fits, and the whole profile that has it."""

    setting: Setting
    sentence: str
    layout: Layout
    options: EngineOptions | LlamaOptions


@dataclass(frozen=True, slots=True)
class FitEstimate(Outcome):
    """``changes``: settings that would fit, the nearest first; empty where it fits or nothing helps."""

    changes: tuple[Change, ...] = ()


def estimate(model: ModelFacts, layout: Layout, options: EngineOptions, rig: RigMemory) -> FitEstimate:
    """What a profile takes of each GPU, whether it fits and what would.

    Raises ValueError for options no engine would take (a utilisation above 1, a size below 1).
    """
    found = outcome(model, layout, options, rig)
    changes: tuple[Change, ...] = ()
    if found.verdict in (Verdict.TIGHT, Verdict.DOES_NOT_FIT):
        # First what its users do not notice, then what they might, then what takes other GPUs.
        changes = tuple(_changes(found, model, layout, options, rig))
    fields = {name: getattr(found, name) for name in Outcome.__dataclass_fields__}
    return FitEstimate(**fields, changes=changes)


def _changes(
    found: Outcome, model: ModelFacts, layout: Layout, options: EngineOptions, rig: RigMemory
) -> Iterator[Change]:
    if found.gpus:
        yield from _utilization(model, layout, options, rig)
        yield from _length(found, model, layout, options, rig)
        yield from _cache_dtype(model, layout, options, rig)
    yield from _layouts(found, model, layout, options, rig)


def _fits(model: ModelFacts, layout: Layout, options: EngineOptions, rig: RigMemory) -> bool:
    return outcome(model, layout, options, rig).verdict is Verdict.FITS


def _utilization(model: ModelFacts, layout: Layout, options: EngineOptions, rig: RigMemory) -> Iterator[Change]:
    """The nearest hundredth that fits, up or down. Up to what vLLM finds free at its start."""
    if options.kv_cache_memory_bytes is not None:
        return
    cards = rig.cards[: layout.gpus]
    most = min(
        floor(100 * (c.total_bytes - used_by_others(c).high - context(layout).high) / c.total_bytes) / 100
        for c in cards
    )
    most = min(most, HIGHEST_UTILIZATION)
    now = options.gpu_memory_utilization

    def with_hundredths(value: int) -> EngineOptions:
        return replace(options, gpu_memory_utilization=value / 100)

    def enough(value: int) -> bool:
        return _fits(model, layout, with_hundredths(value), rig)

    lowest, highest = floor(now * 100) + 1, round(most * 100)
    if now > most:
        lowest = highest
    if highest < max(lowest, 100 * LOWEST_UTILIZATION) or not enough(highest):
        return
    # More memory never fits worse, so the least that is enough is found by bisection.
    value = bisect_left(range(lowest, highest), True, key=enough) + lowest
    word = "Raise" if value / 100 > now else "Lower"
    yield Change(
        "gpu_memory_utilization", f"{word} the utilisation to {value / 100:.2f}.", layout, with_hundredths(value)
    )


def _length(
    found: Outcome, model: ModelFacts, layout: Layout, options: EngineOptions, rig: RigMemory
) -> Iterator[Change]:
    boot = found.next_boot
    if boot is None or boot.estimated_max_model_len is None:
        return
    length = boot.estimated_max_model_len // LENGTH_STEP * LENGTH_STEP
    if length < SHORTEST_USEFUL_TOKENS:
        return
    changed = replace(options, max_model_len=length)
    if _fits(model, layout, changed, rig):
        yield Change("max_model_len", f"Shorten the context to {length:,} tokens.", layout, changed)


def _cache_dtype(model: ModelFacts, layout: Layout, options: EngineOptions, rig: RigMemory) -> Iterator[Change]:
    """Half the bytes per token, where a kernel for it exists.

    Below compute capability 8.9 vLLM takes fp8 with FlashInfer only; models with attention sinks (gpt-oss) need
    its Triton kernels, which take int8 per head there, and its MLA kernels take 16 bit only.
    """
    if options.kv_cache_dtype not in ("auto", "bfloat16", "float16", "half") or model.cache is None:
        return
    old = rig.compute_capability < (8, 9)
    if old and any(group.kind == "mla" for group in model.cache.lean):
        return
    sinks = "gptoss" in model.architecture.lower()
    dtype = "int8_per_token_head" if old and sinks else "fp8"
    changed = replace(options, kv_cache_dtype=dtype)
    if _fits(model, layout, changed, rig):
        note = " (with FlashInfer's kernels on these cards)" if old and dtype == "fp8" else ""
        yield Change("kv_cache_dtype", f"Keep the KV cache as {dtype}{note}.", layout, changed)


def _layouts(
    found: Outcome, model: ModelFacts, layout: Layout, options: EngineOptions, rig: RigMemory
) -> Iterator[Change]:
    """More GPUs per replica, fewest first; where the layout itself is impossible, the nearest that is not.

    Tensor parallel comes before pipeline stages, which leave GPUs waiting for each other. If no layout is enough
    alone, the first that is with less context.
    """
    room, now = len(rig.cards), layout.gpus_per_replica
    sizes = [
        (ranks, stages)
        for ranks in (1, 2, 4, 8)
        for stages in (1, 2, 4)
        if ranks * stages <= room and (ranks * stages > now or not found.gpus)
    ]
    if found.gpus:
        sizes.sort(key=lambda size: (size[0] * size[1], size[1]))
    else:
        sizes.sort(key=lambda size: (size[1], abs(size[0] - now), -size[0]))
    shorter = None
    for ranks, stages in sizes:
        candidate = Layout(min(layout.replicas, room // (ranks * stages)), ranks, stages)
        if candidate == layout:
            continue
        other = outcome(model, candidate, options, rig)
        if other.verdict is Verdict.FITS:
            yield Change("layout", f"Use {candidate}.", candidate, options)
            return
        if shorter is None:
            shorter = next(_length(other, model, candidate, options, rig), None)
    if shorter is not None:
        length = getattr(shorter.options, "max_model_len", None) or 0
        sentence = f"Use {shorter.layout} and shorten the context to {length:,} tokens."
        yield Change("layout and max_model_len", sentence, shorter.layout, shorter.options)
