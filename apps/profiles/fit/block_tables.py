"""How vLLM deals a model's layers into groups that share block ids. Pure.

Read in vLLM 0.33.0: ``v1/core/kv_cache_planning.py`` (grouping, equal pages), ``platforms/interface.py`` (blocks of
models with states), ``v1/kv_cache_interface.py`` (blocks per request), ``distributed/utils.py`` (pipeline stages).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from apps.profiles.fit.layers import MLA_TOKEN_BYTES, Kind, LayerGroup, heads_per_rank, token_bytes

MLA_BLOCK_TOKENS = 128  # blocks of MLA models with states are multiples of this


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """The cache of one layer on one rank. ``padded_to`` is a page size above what the content needs."""

    kind: Kind
    block_size: int
    token_bytes: int  # for a state: the bytes of the whole state
    shape: tuple[int, ...]
    window: int = 0
    padded_to: int | None = None

    @property
    def page_bytes(self) -> int:
        if self.padded_to is not None:
            return self.padded_to
        return self.token_bytes if self.kind == "state" else self.token_bytes * self.block_size


@dataclass(frozen=True, slots=True)
class BlockTable:
    """Layers that share block ids. ``stage_bytes``: what one block of theirs takes on each pipeline stage."""

    spec: LayerSpec
    stage_bytes: tuple[int, ...]


def layer_specs(
    groups: Sequence[LayerGroup], tensor_parallel_size: int, kv_cache_dtype: str, block_size: int
) -> list[tuple[LayerSpec, int]]:
    """Each group's spec and its number of layers, before pages are made equal."""
    attention = [g for g in groups if g.kind != "state"]
    states = [-(-(g.state_bytes_per_layer or 0) // tensor_parallel_size) for g in groups if g.kind == "state"]
    padded_to = None
    if attention and states:
        # The attention block grows until its page holds a state, and the state's page is padded to it.
        main = next((g for g in attention if g.kind != "sliding"), attention[0])
        per_token = token_bytes(main, tensor_parallel_size, kv_cache_dtype)
        if kv_cache_dtype in MLA_TOKEN_BYTES:  # vLLM aligns by the bare head here, without the format's scales
            per_token = main.head_dim or 0
        step = max(block_size, MLA_BLOCK_TOKENS) if main.kind == "mla" else block_size
        block_size = max(block_size, step * -(-max(states) // (step * per_token)))
        padded_to = block_size * per_token
    specs = []
    for group in groups:
        if group.kind == "state":
            size = -(-(group.state_bytes_per_layer or 0) // tensor_parallel_size)
            spec = LayerSpec("state", block_size, size, (size,), padded_to=padded_to)
        else:
            spec = LayerSpec(
                group.kind,
                block_size,
                token_bytes(group, tensor_parallel_size, kv_cache_dtype),
                (heads_per_rank(group, tensor_parallel_size), group.head_dim or 0),
                window=group.window or 0 if group.kind == "sliding" else 0,
            )
        specs.append((spec, group.layers))
    return specs


def block_tables(specs: Sequence[tuple[LayerSpec, int]], stages: int) -> list[BlockTable]:
    """Deal the layers into groups as vLLM does, and weigh each group on each pipeline stage."""
    layers = _in_model_order(specs)
    if _one_table(set(layers)):
        return [_table(list(enumerate(layers)), len(layers), stages)]
    try:
        layers = _with_equal_pages(layers)
    except _PagesDiffer:
        # MLA beside a sliding window: vLLM gives the window's layers blocks for all tokens instead.
        layers = [replace(s, kind="full") if s.kind == "sliding" else s for s in layers]
        if not _one_table(set(layers)):
            raise ValueError(
                "The caches of these layers cannot share blocks: vLLM pads pages of attention and state layers, "
                "but not those of MLA layers. It refuses such a model too."
            ) from None
        return [_table(list(enumerate(layers)), len(layers), stages)]

    buckets: dict[LayerSpec, list[tuple[int, LayerSpec]]] = {}
    for at, spec in enumerate(layers):
        buckets.setdefault(spec, []).append((at, spec))
    sizes = [len(bucket) for bucket in buckets.values()]
    # Up to 1.5 times the smallest, the largest: padding costs less there than more groups.
    group_size = max(sizes) if max(sizes) < 1.5 * min(sizes) else min(sizes)
    tables = []
    for bucket in buckets.values():
        count = -(-len(bucket) // group_size)
        tables += [_table(bucket[at::count], len(layers), stages) for at in range(count)]
    return tables


class _PagesDiffer(Exception):
    """Pages that vLLM cannot make equal."""


def _in_model_order(specs: Sequence[tuple[LayerSpec, int]]) -> list[LayerSpec]:
    """One spec per layer, each kind spread evenly over the depth, as models interleave them.

    Only pipeline stages need it: which layers lie on which stage.
    """
    placed = [((at + 0.5) / count, order, spec) for order, (spec, count) in enumerate(specs) for at in range(count)]
    return [spec for _, _, spec in sorted(placed, key=lambda item: item[:2])]


def _one_table(specs: set[LayerSpec]) -> bool:
    """Whether all layers need the same number of token slots, so that one block table serves them."""
    kinds = {"full" if s.kind == "mla" else s.kind for s in specs}
    if len(kinds) > 1 or len({s.block_size for s in specs}) > 1:
        return False
    if kinds == {"state"}:
        return len({s.page_bytes for s in specs}) == 1
    return kinds == {"full"} or len({s.window for s in specs}) == 1


def _with_equal_pages(layers: list[LayerSpec]) -> list[LayerSpec]:
    largest = max(s.page_bytes for s in layers)

    def grown(spec: LayerSpec) -> LayerSpec:
        if spec.page_bytes == largest:
            return spec
        if spec.kind != "state" and largest % spec.page_bytes == 0:
            return replace(spec, block_size=spec.block_size * (largest // spec.page_bytes))
        if spec.kind == "mla":
            raise _PagesDiffer
        return replace(spec, padded_to=largest)

    return [grown(spec) for spec in layers]


def _table(members: Sequence[tuple[int, LayerSpec]], layers: int, stages: int) -> BlockTable:
    """``members``: (position in the model, spec)."""
    ends = stage_ends(layers, stages)
    weights = [0] * stages
    for at, member in members:
        weights[next(i for i, end in enumerate(ends) if at < end)] += member.page_bytes
    return BlockTable(members[0][1], tuple(weights))


def stage_ends(layers: int, stages: int) -> list[int]:
    """Where each pipeline stage ends. A remainder goes to the stages before the last, the latest of them first.

    vLLM distributed/utils.py: the last stage has the output head to carry, with few left over the first its embedding.
    """
    if layers < stages:
        raise ValueError(f"{layers} layers cannot be spread over {stages} pipeline stages; use at most {layers}.")
    sizes = [layers // stages] * stages
    for back in range(2, layers % stages + 2):
        sizes[-back] += 1
    return [sum(sizes[: at + 1]) for at in range(stages)]


def blocks_of(spec: LayerSpec, length: int, in_flight: int, state_pages: int) -> int:
    """Blocks of one group that one request of ``length`` tokens can hold at most."""
    if spec.kind == "state":
        return state_pages
    if spec.kind == "sliding":
        # One more, since a window need not begin where a block does.
        return -(-min(spec.window - 1 + in_flight, length) // spec.block_size) + 1
    return -(-length // spec.block_size)
