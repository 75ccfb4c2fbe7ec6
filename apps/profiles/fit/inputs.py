"""What an estimate is made of: facts of a model, a layout, an engine's options and the cards' memory. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from apps.profiles.fit.correction import NO_CORRECTION, Correction
from apps.profiles.fit.layers import LayerGroup

# Where a fact is not sourced the estimate spans these. A Gated DeltaNet layer of Qwen3-Next keeps 1.05 MiB of state
# in 16 bit and 2.05 MiB with fp32 recurrent states; larger models of the family have more heads.
STATE_BYTES_IF_UNKNOWN = (2**20, 6 * 2**20)
WINDOW_IF_UNKNOWN = (512, 4096)


@dataclass(frozen=True, slots=True)
class CacheShape:
    """The KV cache's layer groups. ``lean`` and ``rich`` differ where a fact (a window, a state's size) is unknown
    and then bound it from below and above; ``assumption`` is the sentence that says so. Both empty: no cache at all."""

    lean: tuple[LayerGroup, ...]
    rich: tuple[LayerGroup, ...]
    assumption: str | None = None


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """The catalogue's fields; None where nobody could source one. ``weights_estimated`` marks weights computed from a
    parameter count, which leaves out what a quantizer keeps in 16 bit. ``weights_most_bytes``: the high end where
    ``weights_bytes`` is a low one. ``cache`` is None where not known."""

    name: str
    weights_bytes: int | None
    weights_estimated: bool = False
    params_total: int | None = None
    layers: int | None = None
    hidden_size: int | None = None
    attention_heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None
    vocab_size: int | None = None
    experts: int | None = None
    experts_per_token: int | None = None
    max_context_tokens: int | None = None
    quantization: str = ""
    architecture: str = ""
    cache: CacheShape | None = None
    weights_most_bytes: int | None = None

    @property
    def four_bit_linear(self) -> bool:
        """Weights that Marlin or Machete repack: AWQ, GPTQ and other 4 bit checkpoints."""
        text = self.quantization.lower()
        return any(word in text for word in ("awq", "gptq", "4-bit", "int4", "w4a16"))


@dataclass(frozen=True, slots=True)
class Layout:
    replicas: int = 1
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1

    @property
    def gpus_per_replica(self) -> int:
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def gpus(self) -> int:
        return self.replicas * self.gpus_per_replica

    def __str__(self) -> str:
        stages = f" × PP{self.pipeline_parallel_size}" if self.pipeline_parallel_size > 1 else ""
        return f"{self.replicas} × TP{self.tensor_parallel_size}{stages}"


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """vLLM's options as far as they take memory; the defaults are ``vllm serve``'s on cards below 70 GiB.

    ``max_model_len`` None is the model's own. ``compile_cached``: an identical boot ran before and its compile cache
    is there; None is unknown and counts as a first boot. ``kv_cache_memory_bytes`` per GPU overrides the utilisation.
    ``auto_max_model_len``: vLLM shortens the context to what fits. ``cpu_offload_bytes`` of weights per GPU stay in
    host memory. ``max_cudagraph_capture_size`` None follows ``max_num_seqs``; 0 captures none.
    """

    max_model_len: int | None = None
    gpu_memory_utilization: float = 0.92
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    kv_cache_dtype: str = "auto"
    block_size: int = 16
    enforce_eager: bool = False
    enable_prefix_caching: bool = True
    enable_sleep_mode: bool = False
    kv_cache_memory_bytes: int | None = None
    max_cudagraph_capture_size: int | None = None
    cpu_offload_bytes: int = 0
    auto_max_model_len: bool = False
    compile_cached: bool | None = None
    vllm_version: tuple[int, int] = (0, 33)

    @property
    def graphs_in_budget(self) -> bool:
        """Whether the budget is charged for CUDA graphs: 0.26 does not (measured), 0.33 does (its source)."""
        return self.vllm_version > (0, 26)


@dataclass(frozen=True, slots=True)
class LlamaOptions:
    """llama.cpp's options as far as they take memory, under the names a profile gives them.

    ``context_tokens`` is shared by the slots; 0 is the model's own, None too, but llama.cpp shortens that one to what
    fits unless ``fit`` is off (never below ``fit_context_tokens``). ``gpu_layers`` None or "auto": as many as fit, the
    rest stays on the CPU. ``tensor_split`` None: by the cards' free memory. The experts of the first
    ``cpu_expert_layers`` layers stay on the CPU, and the cache without ``kv_offload``. ``tensors_overridden``: a
    pattern lays tensors elsewhere.
    """

    context_tokens: int | None = None
    parallel: int | None = None
    gpu_layers: int | str | None = None
    split_mode: str | None = None
    tensor_split: tuple[float, ...] | None = None
    micro_batch_tokens: int = 512
    flash_attention: str | None = None
    cache_type_k: str = "f16"
    cache_type_v: str = "f16"
    swa_full: bool = False
    fit: bool = True
    fit_context_tokens: int = 4096
    cpu_expert_layers: int = 0
    kv_offload: bool = True
    tensors_overridden: bool = False


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A GGUF file's real tensor sizes in bytes. ``layer_bytes``: per repeating layer; ``output_bytes`` is 0 where the
    embedding serves as output too; ``other_bytes``: norms and whatever belongs to no layer. ``cache`` and the
    context are what the file says of itself, for models of which the catalogue does not know them. ``expert_bytes``:
    the part of each layer that is experts, empty where it was not read."""

    total_bytes: int
    layer_bytes: tuple[int, ...] = ()
    embedding_bytes: int = 0
    output_bytes: int = 0
    other_bytes: int = 0
    cache: CacheShape | None = None
    max_context_tokens: int | None = None
    expert_bytes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class CardMemory:
    """``total_bytes`` as CUDA reports it, never the number on the box: 23.55 GiB on a 3090.

    ``in_use_bytes``: what others hold now and will keep (a display, other engines awake), without sleeping
    neighbours; None where not measured. ``sleeping_neighbours`` counts engines asleep on this card.
    """

    total_bytes: int
    in_use_bytes: int | None = 0
    sleeping_neighbours: int = 0
    display: bool = False

    @property
    def free_bytes(self) -> int:
        """Beside what is in use, as far as it was measured; sleepers may be stopped."""
        return self.total_bytes - (self.in_use_bytes or 0)


@dataclass(frozen=True, slots=True)
class RigMemory:
    """``cards`` in the order the layout takes them: replica after replica, in each stage after stage, rank after rank;
    cards beyond the layout are room for a larger one. ``correction`` is what this rig's own boots taught. ``indices``:
    what people call the cards, their positions where not given."""

    cards: tuple[CardMemory, ...]
    compute_capability: tuple[int, int] = (8, 6)
    host_available_bytes: int | None = None
    correction: Correction = NO_CORRECTION
    indices: tuple[int, ...] = ()

    def name(self, position: int) -> str:
        return f"GPU {self.indices[position] if self.indices else position}"


def model_facts(fields: Mapping[str, Any]) -> ModelFacts:
    """From the catalogue's columns (``apps.catalog.models.Model``) or its shipped file's entries."""
    formula = str(fields.get("weights_formula") or "")
    return ModelFacts(
        name=str(fields["name"]),
        weights_bytes=fields.get("weights_bytes"),
        weights_estimated="ESTIMATE" in formula.upper(),
        params_total=fields.get("params_total"),
        layers=fields.get("layers"),
        hidden_size=fields.get("hidden_size"),
        attention_heads=fields.get("attention_heads"),
        kv_heads=fields.get("kv_heads"),
        head_dim=fields.get("head_dim"),
        intermediate_size=fields.get("intermediate_size"),
        vocab_size=fields.get("vocab_size"),
        experts=fields.get("experts"),
        experts_per_token=fields.get("experts_per_token"),
        max_context_tokens=fields.get("max_context_tokens"),
        quantization=str(fields.get("quantization") or ""),
        architecture=str(fields.get("architecture") or ""),
        cache=cache_shape(fields.get("kv") or {}),
    )


def cache_shape(kv: Mapping[str, Any]) -> CacheShape | None:
    """The catalogue's ``kv`` facts as layer groups; None where they do not suffice."""
    shape = {
        "none": lambda _: CacheShape((), ()),
        "gqa_full": _gqa,
        "mla": _mla,
        "sliding_hybrid": _sliding,
        "hybrid_gdn": _gated_delta_net,
    }.get(str(kv.get("kind")))
    return shape(kv) if shape else None


def _gqa(kv: Mapping[str, Any]) -> CacheShape | None:
    if not (kv.get("layers") and kv.get("kv_heads") and kv.get("head_dim")):
        return None
    groups = (LayerGroup("full", kv["layers"], kv_heads=kv["kv_heads"], head_dim=kv["head_dim"]),)
    return CacheShape(groups, groups)


def _mla(kv: Mapping[str, Any]) -> CacheShape | None:
    if not (kv.get("layers") and kv.get("kv_lora_rank")):
        return None
    groups = (LayerGroup("mla", kv["layers"], head_dim=kv["kv_lora_rank"] + (kv.get("qk_rope_head_dim") or 0)),)
    return CacheShape(groups, groups)


def _sliding(kv: Mapping[str, Any]) -> CacheShape | None:
    if not (kv.get("full_layers") and kv.get("sliding_layers") and kv.get("kv_heads") and kv.get("head_dim")):
        return None
    full = LayerGroup(
        "full",
        kv["full_layers"],
        kv_heads=kv.get("global_kv_heads") or kv["kv_heads"],
        head_dim=kv.get("global_head_dim") or kv["head_dim"],
    )

    def groups(window: int) -> tuple[LayerGroup, ...]:
        layers, heads, dim = kv["sliding_layers"], kv["kv_heads"], kv["head_dim"]
        return full, LayerGroup("sliding", layers, kv_heads=heads, head_dim=dim, window=window)

    if kv.get("window"):
        return CacheShape(groups(kv["window"]), groups(kv["window"]))
    low, high = WINDOW_IF_UNKNOWN
    return CacheShape(
        groups(low), groups(high), f"The sliding window is not known; {low} to {high:,} tokens are assumed."
    )


def _gated_delta_net(kv: Mapping[str, Any]) -> CacheShape | None:
    if not (kv.get("full_attention_layers") and kv.get("linear_layers") and kv.get("kv_heads") and kv.get("head_dim")):
        return None
    full = LayerGroup("full", kv["full_attention_layers"], kv_heads=kv["kv_heads"], head_dim=kv["head_dim"])

    def groups(state_bytes: int) -> tuple[LayerGroup, ...]:
        return full, LayerGroup("state", kv["linear_layers"], state_bytes_per_layer=state_bytes)

    keys, values = kv.get("linear_num_key_heads"), kv.get("linear_num_value_heads")
    dim, kernel = kv.get("linear_head_dim"), kv.get("conv_kernel")
    if not (keys and values and dim and kernel):
        low, high = STATE_BYTES_IF_UNKNOWN
        sentence = "The size of the linear layers' state is not known; 1 to 6 MiB per layer are assumed."
        return CacheShape(groups(low), groups(high), sentence)
    # vLLM mamba_utils.gated_delta_net_state_shape: a convolution's last inputs and a matrix per value head.
    convolution = (kernel - 1) * (2 * keys * dim + values * dim) * 2
    matrix = values * dim * dim
    return CacheShape(
        groups(convolution + matrix * 2),
        groups(convolution + matrix * 4),
        "The recurrent states take 2 or 4 bytes a value, as the checkpoint's config says; both are spanned.",
    )
