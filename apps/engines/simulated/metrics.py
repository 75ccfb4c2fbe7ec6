"""What the simulated engine counts, and how it tells: names and labels of vLLM 0.32's /metrics."""

from __future__ import annotations

from dataclasses import dataclass, field

BUCKETS = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
)


@dataclass(slots=True)
class Settings:
    served_name: str
    model: str
    api_key: str
    max_model_len: int
    max_num_seqs: int = 256
    tokens_per_second: float = 40.0
    slow_first_token_seconds: float = 0.0
    error_500: bool = False
    fail_requests: int = 0
    crash_after_requests: int | None = None
    sleep_mode: bool = False
    fail_sleep: bool = False
    fail_wake: bool = False
    kv_cache_tokens: int = 0
    gpu_memory_utilization: float = 0.0


@dataclass(slots=True)
class Counters:
    running: int = 0
    waiting: int = 0
    accepted: int = 0
    tokens_in_flight: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    finished: dict[str, int] = field(default_factory=lambda: {"stop": 0, "length": 0, "abort": 0})
    first_token_seconds: list[float] = field(default_factory=list)  # only of the last 10,000
    first_token_sum: float = 0.0
    first_token_count: int = 0

    def note_first_token(self, seconds: float) -> None:
        self.first_token_sum += seconds
        self.first_token_count += 1
        self.first_token_seconds = [*self.first_token_seconds[-9_999:], seconds]


def exposition(settings: Settings, counters: Counters) -> str:
    """The families that the panel reads, in the Prometheus text format."""
    s, c = settings, counters
    usage = min(1.0, c.tokens_in_flight / s.kv_cache_tokens) if s.kv_cache_tokens else 0.0
    ttft = "time_to_first_token_seconds"
    within = [sum(1 for seconds in c.first_token_seconds if seconds <= limit) for limit in BUCKETS]
    buckets = [(f'le="{limit}"', count) for limit, count in zip(BUCKETS, within, strict=True)]
    info = (
        f'block_size="16",gpu_memory_utilization="{s.gpu_memory_utilization}",'
        f'kv_cache_size_tokens="{s.kv_cache_tokens}",num_gpu_blocks="{s.kv_cache_tokens // 16}"'
    )
    families: list[tuple[str, str, list[tuple[str, str, float]]]] = [
        ("num_requests_running", "gauge", [("", "", c.running)]),
        ("num_requests_waiting", "gauge", [("", "", c.waiting)]),
        ("kv_cache_usage_perc", "gauge", [("", "", usage)]),
        ("num_preemptions_total", "counter", [("", "", 0)]),
        ("prompt_tokens_total", "counter", [("", "", c.prompt_tokens)]),
        ("generation_tokens_total", "counter", [("", "", c.generation_tokens)]),
        (
            "request_success_total",
            "counter",
            [("", f'finished_reason="{reason}"', count) for reason, count in c.finished.items()],
        ),
        (
            ttft,
            "histogram",
            [
                *(("_bucket", label, count) for label, count in buckets),
                ("_bucket", 'le="+Inf"', c.first_token_count),
                ("_count", "", c.first_token_count),
                ("_sum", "", c.first_token_sum),
            ],
        ),
        ("cache_config_info", "gauge", [("", info, 1)]),
    ]
    name = s.served_name.replace("\\", "\\\\").replace('"', '\\"')
    lines = []
    for family, kind, rows in families:
        lines.append(f"# TYPE vllm:{family} {kind}")
        for suffix, more, value in rows:
            labels = f'engine="0",model_name="{name}"' + (f",{more}" if more else "")
            lines.append(f"vllm:{family}{suffix}{{{labels}}} {float(value)}")
    return "\n".join(lines) + "\n"
