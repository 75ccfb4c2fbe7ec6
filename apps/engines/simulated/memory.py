"""How much KV cache a model gets on a card: vLLM's own arithmetic, for the simulated engine.

From vLLM 0.33 (``v1/worker/gpu_worker.py``, ``v1/core/kv_cache_utils.py``)::

    requested    = total * gpu_memory_utilization
    available_kv = requested - weights - everything else
    blocks       = available_kv // bytes_per_block           (16 tokens each)
    tokens       = blocks * 16; the longest request gets one block less (block 0 is kept back)

The parts come from the plan where there is one, so that a start does what the plan said.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from apps.engines.protocol import ExpectedMemory

GIB = 1 << 30
BLOCK_TOKENS = 16
# Without a plan: 1.0 to 1.9 GiB beside the weights were seen per 3090 (vllm#10517, vllm#13061, club-3090#104); this is
# the middle of that band. The CUDA context and NCCL's buffers lie outside the requested share.
ACTIVATION_BYTES = int(1.0 * GIB)
GRAPH_BYTES = int(0.20 * GIB)
NON_TORCH_BYTES = int(0.25 * GIB)
CONTEXT_BYTES = int(0.5 * GIB)
DEFAULT_UTILIZATION = 0.92


@dataclass(frozen=True, slots=True)
class CachePlan:
    """Per GPU, in bytes; ``blocks`` and tokens count for the whole replica."""

    requested_bytes: int
    parts: ExpectedMemory
    available_bytes: int
    block_bytes: float

    @property
    def weights_bytes(self) -> int:
        return self.parts.weights_bytes

    @property
    def overhead_bytes(self) -> int:
        """What lies within the requested share beside weights and cache."""
        return self.parts.activation_bytes + self.parts.cuda_graph_bytes + self.parts.non_torch_bytes

    @property
    def blocks(self) -> int:
        return max(0, int(self.available_bytes / self.block_bytes))

    @property
    def tokens(self) -> int:
        return self.blocks * BLOCK_TOKENS

    @property
    def longest_request_tokens(self) -> int:
        return max(0, self.blocks - 1) * BLOCK_TOKENS

    def needed_bytes(self, tokens: int) -> int:
        """Cache memory per GPU for one request of that many tokens."""
        return ceil(ceil(tokens / BLOCK_TOKENS) * self.block_bytes)


def plan_cache(
    *,
    total_bytes: int,
    utilization: float,
    weights_bytes: int,
    kv_bytes_per_token: int,
    gpus: int,
    kv_cache_memory_bytes: int | None = None,
    expected: ExpectedMemory | None = None,
) -> CachePlan:
    """``weights_bytes`` and ``kv_bytes_per_token`` are of the whole model; ``gpus`` share them."""
    requested = int(total_bytes * utilization)
    parts = expected or ExpectedMemory(
        ceil(weights_bytes / gpus), ACTIVATION_BYTES, GRAPH_BYTES, NON_TORCH_BYTES, CONTEXT_BYTES
    )
    token_bytes = parts.kv_token_bytes or ceil(kv_bytes_per_token / gpus)
    available = (
        requested - parts.weights_bytes - parts.activation_bytes - parts.cuda_graph_bytes - parts.non_torch_bytes
    )
    if kv_cache_memory_bytes is not None:
        available = kv_cache_memory_bytes
    return CachePlan(requested, parts, available, token_bytes * BLOCK_TOKENS)
