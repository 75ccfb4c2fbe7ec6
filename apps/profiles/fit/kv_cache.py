"""How many KV cache tokens vLLM will make of a given amount of memory. Pure arithmetic.

Agrees with the planner of vLLM 0.33.0 (its ``v1/core/kv_cache_planning.py``, ``v1/core/kv_cache_utils.py``,
``v1/kv_cache_interface.py`` and the block size alignment in ``platforms/interface.py``), read there and
compared with it in bulk; ``docs/planner.md`` says how. The rules, in that planner's own terms:

* A *page* is what one layer keeps for one block of tokens. Layers of one kind and shape share a block table.
* Where shapes differ, layers with smaller pages get larger blocks, or padding, until all pages are equal.
* Layers are dealt into groups of one size; a block id belongs to one group at a time, so a block is as large
  as the largest group and a request takes the *sum* of the blocks its groups need.
* ``num_blocks`` is the memory divided by that size. One of the blocks is never given to a request: whether
  a request of the full length fits is decided with one block less, though the reported tokens count all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from apps.profiles.fit.block_tables import BlockTable, block_tables, blocks_of, layer_specs
from apps.profiles.fit.layers import LayerGroup


@dataclass(frozen=True, slots=True)
class KvCacheCapacity:
    """What vLLM makes of the memory, whether or not it then agrees to start.

    ``bytes_per_block`` is per rank (with pipeline stages: the largest stage's). ``kv_cache_tokens`` and
    ``max_concurrency`` (requests of the full length) are what its log prints; the tokens of models with a sliding
    window or states depend on the length asked for. ``estimated_max_model_len`` is the length it would suggest,
    None where the length asked for fits, 0 where not even one token does.
    """

    bytes_per_block: int
    num_blocks: int
    kv_cache_tokens: int
    max_concurrency: float
    estimated_max_model_len: int | None
    fits: bool


def kv_cache_capacity(
    groups: Sequence[LayerGroup],
    *,
    tensor_parallel_size: int,
    pipeline_parallel_size: int = 1,
    kv_cache_dtype: str = "auto",
    max_model_len: int,
    available_kv_bytes: int,
    block_size: int = 16,
    max_num_batched_tokens: int = 2048,
    concurrent_batches: int | None = None,
    state_pages: int = 1,
) -> KvCacheCapacity:
    """What vLLM's planner answers for ``available_kv_bytes`` of KV cache memory on every rank.

    ``concurrent_batches``: steps under way at once, which a sliding window must keep tokens for; by default one
    per pipeline stage. vLLM's asynchronous scheduling, on by default on GPUs, has one more. ``state_pages``: pages
    of state per request, 1 without prefix caching, 2 and more with it. Raises ValueError for what vLLM
    refuses (an unknown dtype, caches that cannot share blocks) and for a model without a KV cache.
    """
    pool = _pool(
        tuple(groups),
        tensor_parallel_size,
        pipeline_parallel_size,
        kv_cache_dtype,
        block_size,
        max_num_batched_tokens,
        concurrent_batches,
        state_pages,
    )
    if max_model_len < 1:
        raise ValueError(f"max_model_len must be at least 1, not {max_model_len}.")
    num_blocks = max(0, available_kv_bytes // max(pool.stage_bytes))
    needed = pool.blocks_per_request(max_model_len)
    concurrency = num_blocks / needed
    # Stages are checked in order, and the first that cannot hold the request names the length.
    estimated = None
    for size in pool.stage_bytes:
        usable = available_kv_bytes // size - 1
        if needed > usable:
            estimated = _longest(max_model_len, usable, pool.blocks_per_request)
            break
    return KvCacheCapacity(
        bytes_per_block=max(pool.stage_bytes),
        num_blocks=num_blocks,
        kv_cache_tokens=int(concurrency * max_model_len),
        max_concurrency=concurrency,
        estimated_max_model_len=estimated,
        fits=estimated is None,
    )


def bytes_for_one_request(
    groups: Sequence[LayerGroup],
    *,
    tensor_parallel_size: int,
    pipeline_parallel_size: int = 1,
    kv_cache_dtype: str = "auto",
    max_model_len: int,
    block_size: int = 16,
    max_num_batched_tokens: int = 2048,
    concurrent_batches: int | None = None,
    state_pages: int = 1,
) -> int:
    """The least KV cache memory per rank with which vLLM starts: one full request and the block it holds back.

    vLLM's own message ("X GiB KV cache is needed") leaves that one block out.
    """
    pool = _pool(
        tuple(groups),
        tensor_parallel_size,
        pipeline_parallel_size,
        kv_cache_dtype,
        block_size,
        max_num_batched_tokens,
        concurrent_batches,
        state_pages,
    )
    return max(pool.stage_bytes) * (pool.blocks_per_request(max_model_len) + 1)


class _Pool:
    """Block tables, and what a block and a request take. ``stage_bytes``: bytes per block on each stage."""

    def __init__(
        self,
        groups: tuple[LayerGroup, ...],
        tensor_parallel_size: int,
        pipeline_parallel_size: int,
        kv_cache_dtype: str,
        block_size: int,
        max_num_batched_tokens: int,
        concurrent_batches: int | None,
        state_pages: int,
    ) -> None:
        for name, value in (
            ("tensor_parallel_size", tensor_parallel_size),
            ("pipeline_parallel_size", pipeline_parallel_size),
            ("block_size", block_size),
            ("max_num_batched_tokens", max_num_batched_tokens),
            ("state_pages", state_pages),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}.")
        if not groups:
            raise ValueError("The model keeps no KV cache, so there is no capacity to compute.")
        specs = layer_specs(groups, tensor_parallel_size, kv_cache_dtype, block_size)
        self._tables: list[BlockTable] = block_tables(specs, pipeline_parallel_size)
        self._in_flight = max_num_batched_tokens * (concurrent_batches or pipeline_parallel_size)
        self._state_pages = state_pages
        self.stage_bytes: list[int] = [max(sizes) for sizes in zip(*(t.stage_bytes for t in self._tables), strict=True)]

    def blocks_per_request(self, length: int) -> int:
        """Each group draws its own blocks, so their counts add up."""
        return sum(blocks_of(t.spec, length, self._in_flight, self._state_pages) for t in self._tables)


# Remembered, since one plan asks for the same pool a dozen times.
_pool = lru_cache(maxsize=512)(_Pool)


def _longest(max_model_len: int, usable_blocks: int, blocks_per_request: Callable[[int], int]) -> int:
    """The longest request that fits, by bisection; 0 where none does."""
    if blocks_per_request(1) > usable_blocks:
        return 0
    fitting, too_long = 1, max_model_len
    while too_long - fitting > 1:
        middle = (fitting + too_long) // 2
        if blocks_per_request(middle) <= usable_blocks:
            fitting = middle
        else:
            too_long = middle
    return fitting
