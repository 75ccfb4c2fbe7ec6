"""Which vLLM may be put to sleep, and what its cache must be told then.

Facts: 0.14-0.16 leave a model's weights on the card (vllm#32714, fixed by PR 32947 in 0.17); up to 0.32 the allocator
of sleep mode counts what repacking a quantised model freed as used, so that the cache was sized 3.6-4.4 GiB too big
(measured with 0.26 on an H200; 0.33 sizes it by free memory).
"""

from __future__ import annotations

import re

FIRST_GOOD = (0, 17)
SIZES_BY_FREE_MEMORY = (0, 33)
DEFAULT_UTILIZATION = 0.92
GIB = 1 << 30
# What a card must keep besides weights and cache: activation (with the spike of a first compile), graphs, NCCL.
KEPT_BYTES = int(2.4 * GIB)
KEPT_EAGER_BYTES = int(1.6 * GIB)  # on one GPU, neither compiled nor captured: 0.9 GiB were left of 2.4 on an H100
REPACKED = ("awq", "gptq", "compressed-tensors", "int4", "w4a16", "marlin")
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def parse_version(text: str) -> tuple[int, int] | None:
    found = re.search(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else None


def sleep_problem(version: str, host: str) -> str:
    """Why this vLLM is not put to sleep at this address; empty when it may be."""
    known = parse_version(version)
    if known is None:
        return "Sleep needs vLLM 0.17 or newer; this install does not tell its version."
    if known < FIRST_GOOD:
        return f"vLLM {version} does not give the memory back when it sleeps; use 0.17 or newer."
    if host not in LOOPBACK:
        return (
            "Sleep needs vLLM's developer endpoints, which let anybody who reaches them stop or read the engine. They "
            f"are opened on loopback alone, and this engine listens on {host} (RIGPANEL_ENGINE_BIND)."
        )
    return ""


def careful_cache_bytes(
    version: str,
    *,
    quantization: str | None,
    weights_bytes: int | None,
    world: int,
    card_bytes: int,
    utilization: float | None,
    eager: bool,
) -> int | None:
    """The cache size per GPU to ask for where this version would size it too big; None where its own choice is right.

    ``card_bytes`` is the smallest card's memory as CUDA reports it, ``world`` the GPUs of one replica. The plan counts
    with it and the launch asks for it.
    """
    known = parse_version(version)
    repacked = any(word in (quantization or "").lower() for word in REPACKED)
    if known is None or known >= SIZES_BY_FREE_MEMORY or not repacked or not card_bytes or weights_bytes is None:
        return None
    kept = KEPT_EAGER_BYTES if eager and world == 1 else KEPT_BYTES
    left = int(card_bytes * (utilization or DEFAULT_UTILIZATION) - weights_bytes / world * 1.03 - kept)
    return left if left > 0 else None
