"""What a profile may set for the simulated engine: some of vLLM's options, and scripted faults."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from apps.engines.options import Options

Phase = Literal["weights", "compile", "graphs", "server"]
FailCause = Literal[
    "kv_cache_too_small",
    "out_of_memory",
    "port_busy",
    "model_missing",
    "unsupported_split",
    "nccl",
    "disk_full",
    "killed",
    "bad_flag",
    "wrong_quantization",
    "crashed",
]
Seconds = Annotated[float, Field(ge=0, le=86400)]
Count = Annotated[int, Field(ge=0, le=1_000_000)]


class SimulatedOptions(Options):
    # as vLLM's
    max_model_len: Annotated[int, Field(ge=1, le=100_000_000)] | Literal["auto"] | None = None
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] | None = None
    kv_cache_memory_bytes: Annotated[int, Field(ge=1)] | None = None
    max_num_seqs: Annotated[int, Field(ge=1, le=65536)] | None = None
    enforce_eager: bool | None = None
    enable_sleep_mode: bool | None = None
    # how fast
    load_seconds: Seconds | None = None
    tokens_per_second: Annotated[float, Field(gt=0, le=1_000_000)] | None = None  # of one request
    slow_first_token_seconds: Seconds | None = None
    # what goes wrong
    fail_phase: Phase | None = None
    fail_cause: FailCause | None = None
    hang_phase: Phase | None = None
    fail_sleep: bool | None = None
    fail_wake: bool | None = None
    ignore_sigterm: bool | None = None
    error_500: bool | None = None  # every request
    fail_requests: Count | None = None  # so many first requests answer 500
    crash_after_requests: Count | None = None
