"""A part of a model's KV cache, and what one token of it takes. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["full", "sliding", "mla", "state"]

# One fp32 scale beside each head's data, for K and for V (vLLM v1/attention/backends/triton_attn.py).
SCALE_BYTES = 4
ELEMENT_BYTES = {
    "auto": 2,  # the model's own dtype; every catalogue model computes in 16 bit
    "half": 2,
    "float16": 2,
    "bfloat16": 2,
    "float": 4,
    "float32": 4,
    "fp8": 1,
    "fp8_e4m3": 1,
    "fp8_e5m2": 1,
}
MLA_TOKEN_BYTES = {"fp8_ds_mla": 656, "nvfp4_ds_mla": 352}  # vLLM model_executor/layers/attention/mla_attention.py
KV_CACHE_DTYPES = (
    *ELEMENT_BYTES,
    "fp8_per_token_head",
    "int8_per_token_head",
    "int4_per_token_head",
    "nvfp4",
    *MLA_TOKEN_BYTES,
)


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers of a model that keep the same kind and shape of cache.

    ``kv_heads`` and ``state_bytes_per_layer`` are the whole model's, before tensor parallelism divides them.
    ``full`` and ``sliding`` need ``kv_heads`` and ``head_dim``; ``sliding`` needs ``window`` (tokens).
    ``mla`` keeps one compressed head on every rank: ``head_dim`` is kv_lora_rank + the rope dimensions.
    ``state`` (Mamba, Gated DeltaNet) keeps ``state_bytes_per_layer`` for a request whatever its length.
    """

    kind: Kind
    layers: int
    kv_heads: int | None = None
    head_dim: int | None = None
    window: int | None = None
    state_bytes_per_layer: int | None = None

    def __post_init__(self) -> None:
        needed = {
            "full": ("kv_heads", "head_dim"),
            "sliding": ("kv_heads", "head_dim", "window"),
            "mla": ("head_dim",),
            "state": ("state_bytes_per_layer",),
        }
        if self.kind not in needed:
            raise ValueError(f"{self.kind!r} is no kind of KV cache; there are full, sliding, mla and state.")
        for name in ("layers", *needed[self.kind]):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"A group of {self.kind} layers needs {name} of at least 1, not {value!r}.")


def heads_per_rank(group: LayerGroup, tensor_parallel_size: int) -> int:
    """KV heads one rank keeps. Fewer heads than ranks are repeated; MLA's one head lies on every rank."""
    return 1 if group.kind == "mla" else max(1, (group.kv_heads or 1) // tensor_parallel_size)


def token_bytes(group: LayerGroup, tensor_parallel_size: int, kv_cache_dtype: str) -> int:
    """Bytes one token takes in one layer of the group on one rank. Heads fewer than ranks are repeated."""
    if kv_cache_dtype not in KV_CACHE_DTYPES:
        raise ValueError(
            f"{kv_cache_dtype!r} is no KV cache dtype this planner knows; it knows {', '.join(KV_CACHE_DTYPES)}."
        )
    head_dim = group.head_dim or 0  # a group without one has no tokens; __post_init__ saw to the others
    if group.kind == "mla":
        if kv_cache_dtype in MLA_TOKEN_BYTES:
            return MLA_TOKEN_BYTES[kv_cache_dtype]
        if kv_cache_dtype not in ELEMENT_BYTES:
            raise ValueError(f"vLLM has no {kv_cache_dtype} cache for MLA models; use fp8 or auto.")
        return head_dim * ELEMENT_BYTES[kv_cache_dtype]
    heads = heads_per_rank(group, tensor_parallel_size)
    if kv_cache_dtype in ELEMENT_BYTES:
        return 2 * heads * head_dim * ELEMENT_BYTES[kv_cache_dtype]
    if kv_cache_dtype == "nvfp4":  # 4 bit values and an 8 bit scale for each 16 of them
        return 2 * heads * (head_dim // 2 + head_dim // 16)
    if kv_cache_dtype in MLA_TOKEN_BYTES:
        raise ValueError(f"{kv_cache_dtype} is a cache for MLA models only; use fp8 or auto.")
    width = head_dim // 2 if kv_cache_dtype.startswith("int4") else head_dim
    return 2 * heads * (width + SCALE_BYTES)
