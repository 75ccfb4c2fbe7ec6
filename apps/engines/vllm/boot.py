"""What one start of vLLM told of itself in its log: memory by part, cache, seconds by phase.

Forms of 0.26 (recorded on an H200) and of 0.32/0.33. Of several ranks the fullest counts, as it does for vLLM itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from apps.engines.protocol import StartCheck

GIB = 1 << 30
NUMBER = r"(-?[\d.]+)"

WEIGHTS = re.compile(rf"Model loading took {NUMBER} GiB(?: memory)? and {NUMBER} seconds")
AVAILABLE = re.compile(rf"Available KV cache memory: {NUMBER} GiB")
EXPLICIT = re.compile(rf"Explicitly set \({NUMBER}/[\d.]+\) GiB for KV cache|reserved {NUMBER} GiB memory for KV Cache")
TOKENS = re.compile(r"(?:GPU|CPU) KV cache size: ([\d,]+) tokens")
CONCURRENCY = re.compile(rf"Maximum concurrency for ([\d,]+) tokens per request: {NUMBER}x")
GRAPHS = re.compile(rf"Graph capturing finished in {NUMBER} secs?, took {NUMBER} GiB")
# 0.26 tells weights and the rest apart, 0.33 tells their sum.
USAGE = re.compile(
    rf"Actual usage is (?:{NUMBER} GiB for weight|{NUMBER} GiB for consumed memory \(weights \+ non-torch\)), "
    rf"{NUMBER} GiB for peak activation, (?:{NUMBER} GiB for non-torch memory, )?and {NUMBER} GiB for CUDAGraph"
)
COMPILE = re.compile(rf"torch\.compile took {NUMBER} s in total")
CACHE_HIT = re.compile(r"Directly load (?:AOT compilation|the compiled graph)")
CACHE_MISS = re.compile(r"saved AOT compiled function|Compiling a graph for|Cache the graph")
ENGINE = re.compile(rf"init engine \([^)]*\) took {NUMBER} s")
PLAN_APPLIED = re.compile(r"Applying persisted startup plan")
PLAN_SAVED = re.compile(r"Saved startup plan to (\S+?)\.?(?=\s|$)")
STAMP = re.compile(r"\b(\d\d)-(\d\d) (\d\d):(\d\d):(\d\d)\b")


@dataclass(frozen=True, slots=True)
class BootFacts:
    """Bytes per GPU, tokens per engine, seconds; None where the log does not tell.

    ``compiled``: torch.compile ran afresh; such a boot's activation peak is a third of a card higher than it will be
    from the next boot on, and its cache as much smaller. ``trusted`` is False where the log's own sum cannot be right:
    a negative non-torch part means that vLLM counted freed memory as used and made the cache too big.
    """

    weights: int | None = None
    activation: int | None = None
    cuda_graphs: int | None = None
    non_torch: int | None = None
    available_kv: int | None = None
    kv_cache_tokens: int | None = None
    max_concurrency: float | None = None
    compiled: bool | None = None
    startup_plan: str = ""  # "", "applied" or "saved"
    startup_plan_path: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def trusted(self) -> bool:
        return self.non_torch is None or self.non_torch >= 0

    @property
    def plan_may_be_kept(self) -> bool:
        """A startup plan of a boot that compiled pins its small cache for good."""
        return self.compiled is False


def boot_facts(log: str) -> BootFacts:
    """Read a start's log. Later lines win over earlier ones of the same rank; across ranks the larger part counts."""
    weights = _largest(WEIGHTS, log, 1)
    activation = non_torch = graphs = None
    for found in USAGE.finditer(log):
        weight, consumed, peak, outside, captured = found.groups()
        activation = _max(activation, _bytes(peak))
        graphs = _max(graphs, _bytes(captured))
        if outside is not None:
            non_torch = _max(non_torch, _bytes(outside)) if _bytes(outside) >= 0 else _bytes(outside)
        elif consumed is not None and weights is not None:
            non_torch = _max(non_torch, _bytes(consumed) - weights)
        if weight is not None:
            weights = _max(weights, _bytes(weight))
    if graphs is None:
        graphs = _largest(GRAPHS, log, 2)
    tokens = [int(m[1].replace(",", "")) for m in TOKENS.finditer(log)]
    concurrency = [float(m[2]) for m in CONCURRENCY.finditer(log)]
    available = [_bytes(m[1]) for m in AVAILABLE.finditer(log)]
    available += [_bytes(m[1] or m[2]) for m in EXPLICIT.finditer(log)]
    saved = PLAN_SAVED.search(log)
    hit, missed = CACHE_HIT.search(log), CACHE_MISS.search(log)
    return BootFacts(
        weights=weights,
        activation=activation,
        cuda_graphs=graphs,
        non_torch=non_torch,
        available_kv=min(available, default=None),  # all ranks take the smallest
        kv_cache_tokens=min(tokens, default=None),
        max_concurrency=min(concurrency, default=None),
        compiled=True if missed else False if hit else None,
        startup_plan="applied" if PLAN_APPLIED.search(log) else "saved" if saved else "",
        startup_plan_path=saved[1] if saved else "",
        seconds=_seconds(log),
    )


NO_P2P = re.compile(r"lacks GPU P2P capability or P2P test failed")


def check_boot(log: str) -> StartCheck:
    """What a start that succeeded shows of itself that nobody should rely on."""
    facts, warnings, discard = boot_facts(log), [], []
    if not facts.trusted and facts.non_torch is not None:
        warnings.append(
            f"vLLM counted {-facts.non_torch / GIB:.1f} GiB as used that had been freed, and made its cache larger by "
            "that: compare the card's memory with its budget, and set kv_cache_memory_bytes."
        )
    if facts.startup_plan == "saved" and not facts.plan_may_be_kept:
        # It would pin the small cache of a start that compiled (measured: 10,336 tokens instead of 16,304).
        discard.append(facts.startup_plan_path)
    if NO_P2P.search(log):
        warnings.append(
            "The cards cannot copy to each other directly, so all exchange goes through host memory: look at the "
            "NVLink bridge, or at whether the driver allows it."
        )
    told = {"compiled": facts.compiled, "kv_cache_tokens": facts.kv_cache_tokens, "startup_plan": facts.startup_plan}
    return StartCheck(tuple(warnings), {n: v for n, v in told.items() if v not in (None, "")}, tuple(discard))


def _seconds(log: str) -> dict[str, float]:
    """By phase: what vLLM says itself where it does, else the time between two of its stamped lines."""
    told: dict[str, float] = {}
    for name, pattern, group in (("weights", WEIGHTS, 2), ("compile", COMPILE, 1), ("graphs", GRAPHS, 1)):
        values = [float(m[group]) for m in pattern.finditer(log)]
        if values:
            told[name] = max(values)
    if (engine := ENGINE.search(log)) is not None:
        told["engine"] = float(engine[1])
    lines = [line for line in log.splitlines() if STAMP.search(line)]
    first = next((_moment(line) for line in lines), None)
    loading = next(
        (_moment(x) for x in lines if "Loading model from scratch" in x or "Starting to load model" in x), None
    )
    if first is not None and loading is not None:
        told["imports"] = (loading - first) % 86_400  # past midnight
    return told


def _moment(line: str) -> float | None:
    found = STAMP.search(line)
    return int(found[3]) * 3600 + int(found[4]) * 60 + int(found[5]) if found else None


def _bytes(gib: str) -> int:
    return int(float(gib) * GIB)


def _largest(pattern: re.Pattern[str], log: str, group: int) -> int | None:
    return max((_bytes(m[group]) for m in pattern.finditer(log)), default=None)


def _max(before: int | None, now: int) -> int:
    return now if before is None else max(before, now)
