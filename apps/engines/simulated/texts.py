"""The words of vLLM's log, for the simulated engine (0.26 and 0.33; the facts parsers read)."""

# ruff: noqa: T201 - standard output and error are this program's log

from __future__ import annotations

import os
import time

from apps.engines.simulated.memory import GIB, CachePlan

UTILIZATION_HINT = (
    "Try increasing `gpu_memory_utilization` (which also controls CPU memory on the CPU backend) or "
    "decreasing "
    "`max_model_len` when initializing the engine. See "
    "https://docs.vllm.ai/en/latest/configuration/conserving_memory/ for more details."
)
ENGINE_FAILED = "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}"


def say(process: str, place: str, message: str, level: str = "INFO") -> None:
    """One line as vLLM's logger writes it."""
    now = time.strftime("%m-%d %H:%M:%S")
    print(f"({process} pid={os.getpid()}) {level} {now} [{place}] {message}", flush=True)


def gib(count: float) -> str:
    """vLLM rounds to two decimals and prints the float: 8.0, not 8.00."""
    return str(round(count / GIB, 2))


def cache_too_small(tokens: int, plan: CachePlan) -> str:
    return (
        f"ValueError: To serve at least one request with the model's max seq len ({tokens}), "
        f"({gib(plan.needed_bytes(tokens))} GiB KV cache is needed, which is larger than the available KV "
        f"cache memory "
        f"({gib(plan.available_bytes)} GiB). Based on the available memory, the estimated maximum model "
        f"length is "
        f"{plan.longest_request_tokens}. {UTILIZATION_HINT}"
    )


def no_cache_memory() -> str:
    return (
        "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when "
        "initializing the engine (this flag also controls CPU memory reservation on the CPU backend, "
        "despite its name)."
    )


def memory_taken(free_bytes: int, total_bytes: int, utilization: float, requested_bytes: int, device: int) -> str:
    return (
        f"ValueError: Free memory on device cuda:{device} ({gib(free_bytes)}/{gib(total_bytes)} GiB) on "
        f"startup is less "
        f"than desired GPU memory utilization ({utilization:g}, {gib(requested_bytes)} GiB). Decrease GPU "
        f"memory "
        "utilization or reduce GPU memory used by other processes."
    )


def too_long(tokens: int, limit: int) -> str:
    return (
        f"Value error, User-specified max_model_len ({tokens}) is greater than the derived max_model_len "
        f"(max_position_embeddings={float(limit)} or model_max_length=None in model's config.json)."
    )


def out_of_memory(size_bytes: int, total_bytes: int) -> str:
    return (
        f"torch.OutOfMemoryError: CUDA out of memory. Tried to allocate {gib(size_bytes)} GiB. GPU 0 has a "
        f"total "
        f"capacity of {gib(total_bytes)} GiB of which 0.12 GiB is free."
    )


# What a scripted failure prints, by its cause; {model} and {tp} are filled in.
SCRIPTED = {
    "port_busy": "OSError: [Errno 98] Address already in use",
    "model_missing": "huggingface_hub.errors.HFValidationError: Repo id must be in the form 'repo_name' or "
    "'namespace/repo_name': '{model}'. Use `repo_type` argument if needed.",
    "unsupported_split": "Value error, Total number of attention heads (40) must be divisible by tensor "
    "parallel "
    "size ({tp}).",
    "nccl": "RuntimeError: NCCL error: unhandled cuda error (run with NCCL_DEBUG=INFO for details)",
    "disk_full": "OSError: [Errno 28] No space left on device: '/var/cache/vllm/torch_compile_cache'",
    "bad_flag": "vllm: error: unrecognized arguments: --no-such-flag",
    "wrong_quantization": "Value error, Quantization method specified in the model config (awq) does not "
    "match the "
    "quantization method specified in the `quantization` argument (gptq).",
    "crashed": "vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue. See stack "
    "trace (above) "
    "for the root cause.",
}
