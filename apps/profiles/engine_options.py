"""A profile's options as the planner takes them: what of them takes memory, with the engines' own defaults. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from apps.engines.llama_cpp.options import EXTRA_FLAGS
from apps.profiles import fit

GIB = 2**30
# vLLM's defaults for ``vllm serve`` depend on the card (engine/arg_utils.py): (sequences, batched tokens).
SMALL_CARD, LARGE_CARD = (256, 2048), (1024, 8192)
LARGE_CARD_BYTES = 70 * GIB
LLAMA_BATCH = 512
LLAMA_SHORTEST = 4096  # llama.cpp's --fit-ctx, of each slot that has a cache of its own
ALL_LAYERS = 1000
# Options that take memory which the estimate does not count.
NOT_COUNTED = {
    "speculative_config": "Speculative decoding is not counted: leave room for the draft model's weights and cache.",
    "enable_lora": "LoRA adapters are not counted.",
    "hf_overrides": "hf_overrides may change the model's shape; the estimate takes the catalogue's.",
    "kv_offloading_size": "KV offloading takes host memory that is not counted.",
}


def vllm_options(
    options: Mapping[str, Any],
    *,
    card_bytes: int,
    version: tuple[int, int],
    compile_cached: bool | None = None,
) -> fit.EngineOptions:
    """``card_bytes`` is the smallest card's memory, which vLLM's defaults depend on."""
    sequences, batched = LARGE_CARD if card_bytes >= LARGE_CARD_BYTES else SMALL_CARD
    if options.get("performance_mode") == "throughput":
        sequences, batched = 2 * sequences, 2 * batched
    length = options.get("max_model_len")
    automatic = length in ("auto", -1)
    level = options.get("optimization_level")
    offload = options.get("cpu_offload_gb")
    compilation = options.get("compilation_config")
    no_graphs = isinstance(compilation, Mapping) and str(compilation.get("cudagraph_mode", "")).upper() == "NONE"
    return fit.EngineOptions(
        max_model_len=length if isinstance(length, int) and length > 0 else None,
        auto_max_model_len=automatic,
        gpu_memory_utilization=float(options.get("gpu_memory_utilization") or 0.92),
        max_num_seqs=int(options.get("max_num_seqs") or sequences),
        max_num_batched_tokens=int(options.get("max_num_batched_tokens") or batched),
        kv_cache_dtype=str(options.get("kv_cache_dtype") or "auto"),
        block_size=int(options.get("block_size") or 16),
        # -O0 neither compiles nor captures.
        enforce_eager=bool(options.get("enforce_eager")) or level == 0,
        enable_prefix_caching=options.get("enable_prefix_caching") is not False,
        enable_sleep_mode=bool(options.get("enable_sleep_mode")),
        kv_cache_memory_bytes=options.get("kv_cache_memory_bytes"),
        max_cudagraph_capture_size=0 if no_graphs else options.get("max_cudagraph_capture_size"),
        cpu_offload_bytes=int(float(offload) * GIB) if offload else 0,
        compile_cached=compile_cached,
        vllm_version=version,
    )


def llama_options(options: Mapping[str, Any]) -> fit.LlamaOptions:
    extra = _flags(options.get("extra_args") or ())
    split = options.get("tensor_split")
    per_slot = options.get("context_tokens_per_slot")
    layers = options.get("gpu_layers")
    slots = 1 if "--kv-unified" in extra else int(options.get("parallel") or 1)
    return fit.LlamaOptions(
        context_tokens=int(per_slot) * int(options.get("parallel") or 1) if per_slot else options.get("context_tokens"),
        parallel=options.get("parallel"),
        gpu_layers="all" if layers is None else layers,  # the adapter asks for all of them unless told otherwise
        split_mode=options.get("split_mode"),
        tensor_split=tuple(float(v) for v in split) if split else None,
        micro_batch_tokens=int(options.get("micro_batch_tokens") or LLAMA_BATCH),
        flash_attention=options.get("flash_attention"),
        cache_type_k=str(options.get("cache_type_k") or "f16"),
        cache_type_v=str(options.get("cache_type_v") or "f16"),
        swa_full="--swa-full" in extra,
        fit=extra.get("--fit") != "off",
        fit_context_tokens=_number(extra.get("--fit-ctx"), LLAMA_SHORTEST) * slots,
        cpu_expert_layers=ALL_LAYERS if "--cpu-moe" in extra else _number(extra.get("--n-cpu-moe"), 0),
        kv_offload="--no-kv-offload" not in extra,
        tensors_overridden="--override-tensor" in extra,
    )


def _flags(words: Sequence[str]) -> dict[str, str]:
    """llama.cpp's flags as they are passed, each with its value; nothing for one that takes none."""
    found, rest = {}, iter(words)
    for flag in rest:
        found[flag] = next(rest, "") if EXTRA_FLAGS.get(flag) else ""
    return found


def _number(text: str | None, default: int) -> int:
    return int(text) if text and text.isdecimal() else default


def with_changes(options: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The profile's options with a change put in; a context of all slots takes the place of one for each slot."""
    kept = {k: v for k, v in options.items() if k != "context_tokens_per_slot" or "context_tokens" not in changes}
    return {**kept, **changes}


def changed(before: fit.EngineOptions | fit.LlamaOptions, after: object) -> dict[str, Any]:
    """The profile options that a suggested change sets. Both kinds of options have the profile's own names."""
    return {
        field.name: getattr(after, field.name)
        for field in fields(before)
        if getattr(before, field.name) != getattr(after, field.name)
    }


def not_counted(options: Mapping[str, Any]) -> list[str]:
    return [sentence for name, sentence in NOT_COUNTED.items() if options.get(name)]


def version_of(text: str, default: tuple[int, int] = (0, 33)) -> tuple[int, int]:
    """``0.26.0`` or ``0.33.0+cu130`` as (major, minor)."""
    found = re.search(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else default
