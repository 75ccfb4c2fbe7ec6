"""One GPU's memory in parts, each with a low and a high. Pure.

vLLM's equation (0.33, ``v1/worker/gpu_worker.py``): of ``total x gpu_memory_utilization`` it takes away the weights,
what else stayed allocated, the activation peak of a profiling run and an estimate for CUDA graphs; the rest is KV
cache. CUDA context and NCCL buffers exist before it begins to count, so they lie beyond that budget, with all other
users of the card.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from math import ceil

from apps.profiles.fit import overheads
from apps.profiles.fit.inputs import CardMemory, EngineOptions, Layout, ModelFacts, RigMemory
from apps.profiles.fit.ranges import GIB, ZERO, Range, no_wider

WIDEST = int(1.5 * GIB)  # wider an estimate is of no use; docs/planner.md


class Verdict(StrEnum):
    FITS = "fits"
    TIGHT = "tight"
    DOES_NOT_FIT = "does not fit"


@dataclass(frozen=True, slots=True)
class GpuEstimate:
    """One GPU's memory after the next boot, in bytes. ``overhead`` is the CUDA context, NCCL's buffers and what else
    stays allocated; ``slack`` is what remains free, below zero where the parts could exceed the card."""

    position: int  # in RigMemory.cards
    replica: int
    stage: int
    weights: Range
    kv_cache: Range
    activation: Range
    cuda_graphs: Range
    overhead: Range
    slack: Range
    non_torch: Range = ZERO  # the part of ``overhead`` within vLLM's budget


@dataclass(frozen=True, slots=True)
class Parts:
    """One GPU's numbers. ``budget`` is what vLLM asks for, ``free`` what it would find at its start."""

    gpu: GpuEstimate
    budget: int
    free: Range
    available_kv: Range


def parts_per_gpu(
    model: ModelFacts, layout: Layout, options: EngineOptions, rig: RigMemory, stages: list[Range], *, compiles: bool
) -> list[Parts]:
    learnt = rig.correction
    peak = learnt.activation if compiles and not options.enforce_eager else learnt.later_activation
    activation = peak.apply(overheads.activation(model, layout, options, compiles=compiles))
    graphs = learnt.cuda_graphs.apply(overheads.cuda_graphs(model, layout, options))
    non_torch = learnt.non_torch.apply(overheads.non_torch(layout))
    stages = [_kept(learnt.weights.apply(stage), options.cpu_offload_bytes) for stage in stages]
    cached = not model.cache or bool(model.cache.rich)
    known: dict[tuple[CardMemory, int], Parts] = {}  # equal cards with equal stages come out equal
    found = []
    for at in range(layout.gpus):
        stage = at % layout.gpus_per_replica // layout.tensor_parallel_size
        key = rig.cards[at], stage
        if key not in known:
            known[key] = _one_gpu(
                at, rig.cards[at], layout, options, stages[stage], stage, activation, graphs, non_torch, cached=cached
            )
        parts = known[key]
        if parts.gpu.position != at:
            gpu = replace(parts.gpu, position=at, replica=at // layout.gpus_per_replica)
            parts = Parts(gpu, parts.budget, parts.free, parts.available_kv)
        found.append(parts)
    return found


def _kept(stage: Range, offloaded: int) -> Range:
    return Range(max(0, stage.low - offloaded), max(0, stage.high - offloaded))


def _one_gpu(
    at: int,
    card: CardMemory,
    layout: Layout,
    options: EngineOptions,
    weights: Range,
    stage: int,
    activation: Range,
    graphs: Range,
    non_torch: Range,
    *,
    cached: bool,
) -> Parts:
    others, context = overheads.used_by_others(card), overheads.context(layout)
    free = Range(card.total_bytes - others.high - context.high, card.total_bytes - others.low - context.low)
    charged = graphs if options.graphs_in_budget else ZERO
    taken = weights + activation + non_torch + charged
    budget = ceil(card.total_bytes * options.gpu_memory_utilization)
    if options.kv_cache_memory_bytes is not None:
        available = Range.exactly(options.kv_cache_memory_bytes)
    else:
        available = no_wider(Range(budget - taken.high, budget - taken.low), WIDEST)
    kv_cache = Range(max(0, available.low), max(0, available.high)) if cached else ZERO
    if options.kv_cache_memory_bytes is None and cached:
        # The cache fills the budget, so what stays free does not depend on how well the parts are known.
        beyond = ZERO if options.graphs_in_budget else graphs
        short = max(0, -available.high), max(0, -available.low)
        slack = Range(free.low - budget - beyond.high - short[1], free.high - budget - beyond.low - short[0])
    else:
        whole = weights + activation + non_torch + graphs + kv_cache
        slack = Range(free.low - whole.high, free.high - whole.low)
    gpu = GpuEstimate(
        position=at,
        replica=at // layout.gpus_per_replica,
        stage=stage,
        weights=weights,
        kv_cache=kv_cache,
        activation=activation,
        cuda_graphs=graphs,
        overhead=context + non_torch,
        slack=no_wider(slack, WIDEST),
        non_torch=non_torch,
    )
    return Parts(gpu, budget, free, available)


def cannot_start(parts: list[Parts], options: EngineOptions, rig: RigMemory) -> tuple[Verdict, str] | None:
    """vLLM refuses to start where less is free than it asks for; with a fixed KV size it just runs out."""
    if options.kv_cache_memory_bytes is not None:
        worst = min(parts, key=lambda p: p.gpu.slack.low)
        if worst.gpu.slack.low >= 0:
            return None
        sure = worst.gpu.slack.high < 0
        return (
            Verdict.DOES_NOT_FIT if sure else Verdict.TIGHT,
            f"The {gib(options.kv_cache_memory_bytes)} of KV cache asked for leave {rig.name(worst.gpu.position)} "
            f"{'short of' if sure else 'possibly short of'} memory by {gib(-worst.gpu.slack.low)}.",
        )
    worst = min(parts, key=lambda p: p.free.low - p.budget)
    if worst.free.low >= worst.budget:
        return None
    sure = worst.free.high < worst.budget
    return (
        Verdict.DOES_NOT_FIT if sure else Verdict.TIGHT,
        f"At its start vLLM asks for {gib(worst.budget)} of {rig.name(worst.gpu.position)} "
        f"(utilisation {options.gpu_memory_utilization:g}), and {span(worst.free)} "
        f"{'are' if sure else 'may be'} free beside its own context and other users of the card"
        f"{': it refuses.' if sure else '.'}",
    )


def gib(value: int, digits: int = 1) -> str:
    return f"{value / GIB:.{digits}f} GiB"


def span(value: Range, digits: int = 1) -> str:
    low, high = f"{value.low / GIB:.{digits}f}", f"{value.high / GIB:.{digits}f}"
    return f"{low} GiB" if low == high else f"{low} to {high} GiB"
