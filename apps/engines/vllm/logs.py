"""What vLLM's log lines mean. Forms of 0.26 (seen on a GPU) and of 0.32/0.33 are both accepted;
the text is matched, never the file in brackets, which gains a folder at debug level."""

from __future__ import annotations

import re

from apps.engines.protocol import HealthProbe, Readiness, ReadinessState
from apps.engines.vllm.causes import TABLE
from apps.engines.vllm.memory_causes import BEGINS_LOADING, LOADED

__all__ = ["TABLE", "judge_start"]

# (pattern, phase, fraction at its start, fraction at its end). A percentage in group 1 moves
# between the two. The shares are those of a boot whose compile cache is warm.
PHASES = (
    (re.compile(r"Resolved architecture:"), "config", 0.05, 0.05),
    (re.compile(r"Initializing a V1 LLM engine"), "config", 0.10, 0.10),
    (BEGINS_LOADING, "weights", 0.15, 0.15),
    (re.compile(r"Loading (?:safetensors|pt) checkpoint shards: +(\d+)%"), "weights", 0.15, 0.50),
    (LOADED, "weights", 0.50, 0.50),
    (
        re.compile(r"Using cache directory: \S+ for vLLM's torch.compile|Dynamo bytecode"),
        "compile",
        0.55,
        0.55,
    ),
    (re.compile(r"Compiling a graph|torch\.compile took"), "compile", 0.70, 0.70),
    (re.compile(r"Available KV cache memory:|[GC]PU KV cache size:"), "cache", 0.78, 0.78),
    (re.compile(r"Capturing CUDA graphs \([^)\n]*PIECEWISE[^)\n]*\): +(\d+)%"), "graphs", 0.80, 0.86),
    (re.compile(r"Capturing CUDA graphs \([^)\n]*FULL[^)\n]*\): +(\d+)%"), "graphs", 0.86, 0.90),
    (re.compile(r"Graph capturing finished"), "graphs", 0.90, 0.90),
    (re.compile(r"init engine \(profile"), "server", 0.93, 0.93),
    (re.compile(r"Starting vLLM (?:API )?server"), "server", 0.96, 0.96),
    (re.compile(r"Application startup complete"), "server", 0.98, 0.98),
)

# Behind a percentage: " Completed | 1/4 [00:01<…" of the weights, "|██▋  | 27/98 [00:02<…" of the graphs.
COUNTED = re.compile(r"[^|\n]*\|(?:[^|\n]*\|)? *(\d+)/(\d+) *\[")
COUNTS = {"weights": "shards", "graphs": "graphs"}
FATAL = re.compile(r"Engine core initialization failed|vllm: error: |pydantic_core\S*ValidationError|EngineDeadError")


def judge_start(log: str, probe: HealthProbe) -> Readiness:
    """vLLM's port opens only when it is ready, so 200 settles it."""
    if probe.status == 200:
        return Readiness(ReadinessState.READY, "server", 1.0)
    if (fatal := FATAL.search(log)) is not None:
        return Readiness(ReadinessState.FAILED, "failed", 0.0, fatal[0].strip())
    phase, fraction, detail, count = "process", 0.0, "", ""
    for pattern, name, begin, end in PHASES:
        matches = list(pattern.finditer(log))
        if matches:
            last = matches[-1]
            share = int(last[1]) / 100 if pattern.groups else 0.0
            phase, fraction, detail = name, begin + (end - begin) * share, last[0]
            bar = COUNTED.match(log, last.end()) if name in COUNTS else None
            count = f"{bar[1]} of {bar[2]} {COUNTS[name]}" if bar else ""
    return Readiness(ReadinessState.WAITING, phase, round(fraction, 3), detail, count)
