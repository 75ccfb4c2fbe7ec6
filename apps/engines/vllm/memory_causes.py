"""Rows of vLLM's table (see ``causes.py``) for memory that did not suffice: the cards', and the host's."""

from __future__ import annotations

import math
import re

from apps.engines.diagnosis import Table, words
from apps.engines.protocol import Cause, Diagnosis

SETTING = r"'{name}': (True|False|-?[\d.]+)"
MOST_UTILIZATION = 0.95
BEGINS_LOADING = re.compile(r"Loading model from scratch|Starting to load model")
LOADED = re.compile(r"Model loading took")


def _asked(match: re.Match[str], name: str) -> float | None:
    """The value that this start was given, from vLLM's own line of non-default arguments."""
    line = re.search(r"non-default args: \{[^\n]*", match.string)
    found = re.search(SETTING.format(name=name), line[0]) if line else None
    return float(found[1]) if found and found[1] not in ("True", "False") else None


def _eager(match: re.Match[str]) -> bool:
    line = re.search(r"non-default args: \{[^\n]*", match.string)
    return bool(line and "'enforce_eager': True" in line[0])


def _cache_too_small(match: re.Match[str]) -> Diagnosis:
    """vLLM names the length that would be possible, but for one of 0."""
    wanted, needed, available = int(match[1]), match[2], match[3]
    summary = f"A context of {wanted:,} tokens needs {needed} GiB of KV cache per GPU; {available} GiB are left."
    if not match[4]:
        return _more_cache(match, summary, needed_bytes=(math.floor(float(needed)) + 1) << 30)
    possible = int(match[4])
    return Diagnosis(
        Cause.KV_CACHE_TOO_SMALL,
        summary,
        suggestion=f"Set max_model_len to {possible}, or raise gpu_memory_utilization.",
        suggested_options={"max_model_len": possible},
    )


def _no_cache_memory(match: re.Match[str]) -> Diagnosis:
    return _more_cache(match, "The weights and activations leave no memory for the KV cache.")


def _more_cache(match: re.Match[str], summary: str, needed_bytes: int | None = None) -> Diagnosis:
    """``needed_bytes``: what one request takes, where vLLM said so."""
    if needed_bytes is not None and _asked(match, "kv_cache_memory_bytes") is not None:
        return Diagnosis(
            Cause.KV_CACHE_TOO_SMALL,
            summary,
            suggestion=f"Set kv_cache_memory_bytes to {needed_bytes >> 30} GiB, or max_model_len lower.",
            suggested_options={"kv_cache_memory_bytes": needed_bytes},
        )
    now = _asked(match, "gpu_memory_utilization")
    if now is not None and now < MOST_UTILIZATION:
        more = min(MOST_UTILIZATION, round(now + 0.05, 2))
        return Diagnosis(
            Cause.KV_CACHE_TOO_SMALL,
            summary,
            suggestion=f"Set gpu_memory_utilization to {more:g}; if that is not enough, use more GPUs per replica.",
            suggested_options={"gpu_memory_utilization": more},
        )
    if not _eager(match):
        return Diagnosis(
            Cause.KV_CACHE_TOO_SMALL,
            summary,
            suggestion="Set enforce_eager: without compiled graphs the activations take about a GiB less. If that "
            "is not enough, use more GPUs per replica.",
            suggested_options={"enforce_eager": True},
        )
    return Diagnosis(
        Cause.KV_CACHE_TOO_SMALL,
        summary,
        suggestion="Use more GPUs per replica, or a smaller quantisation of the model.",
    )


def _memory_taken(match: re.Match[str]) -> Diagnosis:
    free, total = float(match[1]), float(match[2])
    possible = math.floor((free / total - 0.01) * 100) / 100
    usable = {"gpu_memory_utilization": possible} if possible >= 0.1 else {}
    device = re.search(r"Free memory on device \w+:(\d+)", match[0])
    which = f"GPU {device[1]}" if device else "A GPU"
    return Diagnosis(
        Cause.OUT_OF_MEMORY,
        f"{which} had {match[1]} of {match[2]} GiB free, less than the {match[4]} GiB asked for: "
        "something else uses its memory.",
        suggestion="End what holds the memory, or set gpu_memory_utilization"
        + (f" to {possible:g}." if usable else " lower."),
        suggested_options=usable,
    )


def _loading(match: re.Match[str]) -> bool:
    """Whether the weights were being read: only what comes after them is sized by gpu_memory_utilization."""
    begun = max((found.end() for found in BEGINS_LOADING.finditer(match.string, 0, match.start())), default=None)
    return begun is not None and not LOADED.search(match.string, begun, match.start())


def _out_of_memory(match: re.Match[str]) -> Diagnosis:
    """PyTorch names the device by the engine's own count: GPU 0 is the first of the replica's cards."""
    found = re.search(r"Tried to allocate ([\d.]+ \w+)\. GPU (\d+) has a total capacity", match.string[match.start() :])
    summary = (
        f"GPU {found[2]} of the replica ran out of memory: {found[1]} more were wanted."
        if found
        else "A GPU ran out of memory."
    )
    if _loading(match):
        return Diagnosis(
            Cause.OUT_OF_MEMORY,
            f"While the weights were loaded: {summary}",
            suggestion="Use more GPUs per replica, or a smaller quantisation of the model. gpu_memory_utilization does "
            "not bound what the weights take.",
        )
    now = _asked(match, "gpu_memory_utilization") or 0.92
    if now > 0.5:
        less = round(now - 0.05, 2)
        return Diagnosis(
            Cause.OUT_OF_MEMORY,
            summary,
            suggestion=f"Set gpu_memory_utilization to {less:g}, so that more is left outside vLLM's own budget; or "
            "use more GPUs per replica.",
            suggested_options={"gpu_memory_utilization": less},
        )
    return Diagnosis(Cause.OUT_OF_MEMORY, summary, suggestion="Use more GPUs per replica, or a smaller quantisation.")


def _host_memory_at_start(match: re.Match[str]) -> Diagnosis:
    free, total = float(match[1]), float(match[2])
    possible = math.floor((free / total - 0.1) * 10) / 10
    usable = {"gpu_memory_utilization": possible} if possible >= 0.1 else {}
    return Diagnosis(
        Cause.OUT_OF_MEMORY,
        f"The host has {match[1]} of {match[2]} GiB free, less than the share that vLLM was given on the CPU.",
        suggestion=f"Set gpu_memory_utilization to {possible:g}: on the CPU it is a share of the host's memory."
        if usable
        else "End what uses the host's memory.",
        suggested_options=usable,
    )


def _host_memory_for_cache(match: re.Match[str]) -> Diagnosis:
    free, wanted = float(match[1]), match[3]
    possible = int(free / 2)
    usable = {"kv_cache_memory_bytes": possible << 30} if possible >= 1 else {}
    return Diagnosis(
        Cause.KV_CACHE_TOO_SMALL,
        f"A KV cache of {wanted} GiB was asked for on the CPU; the host has {match[1]} GiB free.",
        suggestion=f"Set kv_cache_memory_bytes to {possible} GiB." if usable else "End what uses the host's memory.",
        suggested_options=usable,
    )


_pinned = words(
    Cause.OUT_OF_MEMORY,
    "The host's memory could not be pinned: a sleeping model needs 1.9 times its weights of it.",
    "Serve this model without sleep.",
    enable_sleep_mode=None,
)

GIB = r"(-?[\d.]+)"

MEMORY: Table = (
    (
        re.compile(
            r"max seq len \((\d+)\), \(" + GIB + r" GiB KV cache is needed, which is larger than the available "
            r"KV cache memory \(" + GIB + r" GiB\)\."
            r"(?: Based on the available memory, the estimated maximum model length is (\d+))?"
        ),
        _cache_too_small,
    ),
    (
        re.compile(r"No available memory for the cache blocks|Cannot auto-fit max_model_len: not enough"),
        _no_cache_memory,
    ),
    (
        re.compile(
            r"Free memory on device \S+ \(" + GIB + "/" + GIB + r" GiB\) on startup is less than desired GPU memory "
            r"utilization \(([\d.]+), " + GIB + r" GiB\)"
        ),
        _memory_taken,
    ),
    (
        # The last as NCCL writes it (checks.h), with and without a number: its buffers lie outside vLLM's budget.
        re.compile(
            r"torch\.(?:cuda\.)?OutOfMemoryError|CUDA out of memory|CUDA error: out of memory|"
            r"Cuda failure (?:\d+ )?'out of memory'"
        ),
        _out_of_memory,
    ),
    (
        re.compile(r"cudaHostAlloc|cudaHostRegister|pinned memory[^\n]*(?:failed|out of memory)|pin_memory[^\n]*Error"),
        _pinned,
    ),
    (
        re.compile(
            r"Available memory on node \S+ \(" + GIB + "/" + GIB + r" GiB\) on startup is less than desired CPU memory"
        ),
        _host_memory_at_start,
    ),
    (
        re.compile(
            r"Available memory on node \S+ \(" + GIB + "/" + GIB + r" GiB\) on kv cache allocation is less than "
            r"requested memory for kv \(" + GIB + r" GiB\)"
        ),
        _host_memory_for_cache,
    ),
)
