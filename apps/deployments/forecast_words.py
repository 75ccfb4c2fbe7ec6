"""A forecast as plain values, for the API, the command line and the page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from apps.common.units import gib
from apps.profiles import fit
from apps.profiles.advice import Advice, Choice
from apps.profiles.forecast import Forecast

PARTS = ("weights", "kv_cache", "activation", "cuda_graphs", "overhead", "slack")


def forecast_dict(found: Forecast) -> dict[str, Any]:
    """Bytes as ``{"low", "high"}``; ``None`` where not known or not of this engine."""
    estimate = found.estimate
    boot = None
    if estimate.first_boot is not None:
        boot = "first" if estimate.next_boot_compiles else "later"
    return {
        "verdict": str(estimate.verdict) if estimate.verdict else None,
        "reason": estimate.reason,
        "gpus": [_gpu(found, gpu) for gpu in estimate.gpus],
        "max_model_len": estimate.max_model_len,
        "needed_kv_bytes": _range(estimate.needed_kv),
        "next_boot": boot,
        "first_boot": _boot(estimate.first_boot),
        "later_boots": _boot(estimate.later_boots),
        "host_memory_bytes": _range(estimate.host_memory),
        "pinned_host_bytes": _range(estimate.pinned_host),
        "changes": [
            {
                "setting": s.setting,
                "sentence": s.sentence,
                "options": s.options,
                "replicas": s.replicas,
                "tensor_parallel_size": s.tensor_parallel_size,
                "pipeline_parallel_size": s.pipeline_parallel_size,
            }
            for s in found.suggestions
        ],
        "corrected_by_boots": found.corrected_by,
    }


def _gpu(found: Forecast, gpu: fit.GpuEstimate) -> dict[str, Any]:
    card, memory = found.cards[gpu.position], found.memory[gpu.position]
    return {
        "index": card.index,
        "uuid": card.uuid,
        "replica": gpu.replica,
        "stage": gpu.stage,
        "total_bytes": memory.total_bytes,
        "in_use_bytes": memory.in_use_bytes,
        "sleeping_neighbours": memory.sleeping_neighbours,
        **{name: _range(getattr(gpu, name)) for name in PARTS},
    }


def _range(value: fit.Range | None) -> dict[str, int] | None:
    return None if value is None else {"low": value.low, "high": value.high}


def _boot(boot: fit.BootForecast | None) -> dict[str, Any] | None:
    if boot is None:
        return None
    low, high = boot.max_concurrency
    return {
        "available_kv_bytes": _range(boot.available_kv),
        "kv_cache_tokens": _range(boot.kv_cache_tokens),
        "max_concurrency": {"low": round(low, 2), "high": round(high, 2)},
        "estimated_max_model_len": boot.estimated_max_model_len,
    }


def forecast_lines(found: Forecast) -> Iterator[str]:
    """For a terminal."""
    yield f"{found.word}: {found.sentence}"
    for gpu in found.estimate.gpus:
        parts = ", ".join(f"{name.replace('_', ' ')} {_span(getattr(gpu, name))}" for name in PARTS)
        yield f"  GPU {found.cards[gpu.position].index}: {parts}"
    for name, boot in (("first boot", found.estimate.first_boot), ("later boots", found.estimate.later_boots)):
        if boot is not None:
            now = " (this is next)" if boot is found.estimate.next_boot else ""
            tokens = boot.kv_cache_tokens
            yield f"  {name}{now}: {tokens.low:,} to {tokens.high:,} tokens of KV cache"
    for suggestion in found.suggestions:
        yield f"  would fit: {suggestion.sentence}"


def _span(value: fit.Range) -> str:
    return gib(value.low) if value.low == value.high else f"{value.low / 2**30:.1f}-{gib(value.high)}"


def advice_dict(found: Advice | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        "one_fast_user": _choice(found.one_fast_user),
        "many_users": _choice(found.many_users),
        "options": [
            {
                "layout": str(option.layout),
                "verdict": str(option.verdict) if option.verdict else None,
                "reason": option.reason,
                "kv_cache_tokens": _range(option.tokens),
                "measured": [
                    {"concurrency": m.concurrency, "tokens_per_second": round(m.tokens_per_second, 1), "looks": m.looks}
                    for m in option.measured
                ],
                "published": [
                    {
                        "model": p.model,
                        "setting": p.setting,
                        "one_stream_tokens_per_second": p.one,
                        "total_tokens_per_second": p.many,
                        "source": p.source,
                    }
                    for p in option.published
                ],
            }
            for option in found.options
        ],
    }


def _choice(choice: Choice) -> dict[str, Any]:
    return {
        "layout": str(choice.layout) if choice.layout else None,
        "sentence": choice.sentence,
        "basis": choice.basis,
    }


def advice_lines(found: Advice | None) -> Iterator[str]:
    if found is None:
        return
    for who, choice in (("one fast user", found.one_fast_user), ("many users", found.many_users)):
        yield f"{who}: {choice.layout or 'no advice'}. {choice.sentence}"
