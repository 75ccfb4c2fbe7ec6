"""vLLM's build for the CPU: what it takes of the host's memory, and the cache it is started with. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from apps.engines.vllm.adapter import CPU_KV_CACHE_BYTES
from apps.profiles import fit
from apps.profiles.engine_options import vllm_options
from apps.profiles.fit.gpus import gib, span
from apps.profiles.fit.kv_cache import KvCacheCapacity
from apps.profiles.fit.llama_cpp import host_verdict
from apps.profiles.fit.outcomes import STATE_PAGES

GIB = 2**30
# 2.7 GiB of processes were measured beside the smallest model.
PROCESSES = fit.Range(int(2.0 * GIB), int(4.0 * GIB))
# Defaults on the CPU (vLLM 0.32, platforms/cpu.py and engine/arg_utils.py); steps there do not overlap.
BLOCK_SIZE = 128
BATCHED_TOKENS = 2048  # for each rank
WIDE = ("float", "float32")


def request_cache_bytes(model: fit.ModelFacts, layout: fit.Layout, given: Mapping[str, Any]) -> int | None:
    """The least KV cache on each rank with which it starts: one request of the full length.

    None where that is not known, and where vLLM shortens the context itself; 0 for a model without a cache.
    """
    options = vllm_options(given, card_bytes=0, version=(0, 33))
    length = options.max_model_len or model.max_context_tokens
    if model.cache is None or length is None or options.auto_max_model_len:
        return None
    if not model.cache.rich:
        return 0
    try:
        return fit.bytes_for_one_request(max_model_len=length, **_cache(model, layout, given))
    except ValueError:  # a cache that vLLM refuses itself
        return None


def vllm_on_host(
    model: fit.ModelFacts,
    layout: fit.Layout,
    given: Mapping[str, Any],
    *,
    host_total_bytes: int | None,
    host_available_bytes: int | None,
) -> fit.FitEstimate:
    """``given``: the profile's options. Every replica has weights and caches of its own."""
    if model.weights_bytes is None:
        return fit.FitEstimate(None, f"The size of {model.name}'s weights is not known, so nothing can be said before.")
    options = vllm_options(given, card_bytes=0, version=(0, 33))
    length = options.max_model_len or model.max_context_tokens
    needed = request_cache_bytes(model, layout, given)
    asked = options.kv_cache_memory_bytes
    if asked is not None and needed is not None and asked < needed:
        shorter = _capacity(model, layout, given, length or 0, asked).estimated_max_model_len or 0
        return fit.FitEstimate(
            fit.Verdict.DOES_NOT_FIT,
            f"One request of {length:,} tokens needs {gib(needed, 2)} of KV cache, and kv_cache_memory_bytes is "
            f"{gib(asked, 2)}: leave it out, or set max_model_len to {shorter:,} tokens at most.",
            next_boot_compiles=False,
            max_model_len=length,
        )
    cache = max(CPU_KV_CACHE_BYTES, needed or 0) if asked is None else asked
    if asked is None and given.get("gpu_memory_utilization"):
        cache = needed or 0  # a share of the host instead, which must hold one request
    if options.auto_max_model_len and length and model.cache is not None and model.cache.rich:
        length = _capacity(model, layout, given, length, cache).estimated_max_model_len or length
    weights, cache = _weights(model, given), cache * layout.gpus_per_replica
    each = fit.Range(weights + cache, int(weights * 1.05) + cache) + PROCESSES
    need = fit.Range(each.low * layout.replicas, each.high * layout.replicas)
    words = f"It needs {span(need)} of the host's memory with {gib(cache)} of KV cache for each replica"
    verdict, reason = host_verdict(need, words, host_total_bytes, host_available_bytes)
    return fit.FitEstimate(verdict, reason, next_boot_compiles=False, host_memory=need, max_model_len=length)


def _weights(model: fit.ModelFacts, given: Mapping[str, Any]) -> int:
    """In memory: a 16 bit checkpoint is widened where the profile asks for that."""
    stored = model.weights_bytes or 0
    quantized = model.params_total is not None and stored < 1.8 * model.params_total
    return stored * 2 if given.get("dtype") in WIDE and not quantized else stored


def _capacity(
    model: fit.ModelFacts, layout: fit.Layout, given: Mapping[str, Any], length: int, available: int
) -> KvCacheCapacity:
    return fit.kv_cache_capacity(max_model_len=length, available_kv_bytes=available, **_cache(model, layout, given))


def _cache(model: fit.ModelFacts, layout: fit.Layout, given: Mapping[str, Any]) -> dict[str, Any]:
    dtype = str(given.get("kv_cache_dtype") or "auto")
    if dtype == "auto" and given.get("dtype") in WIDE:
        dtype = "float32"
    return {
        "groups": model.cache.rich if model.cache else (),
        "tensor_parallel_size": layout.tensor_parallel_size,
        "pipeline_parallel_size": layout.pipeline_parallel_size,
        "kv_cache_dtype": dtype if dtype in fit.KV_CACHE_DTYPES else "auto",
        "block_size": int(given.get("block_size") or BLOCK_SIZE),
        "max_num_batched_tokens": int(given.get("max_num_batched_tokens") or BATCHED_TOKENS * layout.gpus_per_replica),
        "state_pages": 1 if given.get("enable_prefix_caching") is False else STATE_PAGES[1],
    }
