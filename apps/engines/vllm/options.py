"""What a profile may set for ``vllm serve``. Names are vLLM's own, with underscores; ``None`` leaves its default.

The options that matter here are written out with their bounds; the others come from ``vllm serve --help=all`` of the
install at hand (``flags.py``), or of 0.32 where there is none yet.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, create_model, field_validator

from apps.engines.options import PANEL_OWNED, SAFE_TEXT, Options, set_options
from apps.engines.protocol import OptionError
from apps.engines.vllm.flags import FlagKind, Flags, shipped_flags

Positive = Annotated[int, Field(ge=1, le=100_000_000)]
JsonObject = dict[str, Any]

REMOVED = {
    "swap_space": "vLLM no longer has --swap-space: it recomputes instead. For KV offload to host memory set "
    "kv_offloading_size (GiB).",
    "calculate_kv_scales": "vLLM removed --calculate-kv-scales in 0.28.",
    "override_attention_dtype": "vLLM removed --override-attention-dtype in 0.28.",
    "num_scheduler_steps": "vLLM removed --num-scheduler-steps with its first engine; see async_scheduling.",
    "use_v2_block_manager": "vLLM removed --use-v2-block-manager; there is only one block manager now.",
    "disable_log_requests": "vLLM no longer logs requests unless asked; drop this option.",
    "max_seq_len_to_capture": "vLLM now counts captured sequences, not tokens: max_cudagraph_capture_size.",
    "guided_decoding_backend": "vLLM removed --guided-decoding-backend; its default chooses by request.",
    "enable_reasoning": "vLLM removed --enable-reasoning; reasoning_parser alone switches it on.",
}


class VllmOptions(Options):
    max_model_len: Positive | Literal["auto"] | None = None
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] | None = None
    kv_cache_memory_bytes: Annotated[int, Field(ge=1)] | None = None
    kv_cache_dtype: (
        Literal[
            "auto",
            "bfloat16",
            "float16",
            "fp8",
            "fp8_e4m3",
            "fp8_e5m2",
            "int8_per_token_head",
            "int4_per_token_head",
            "fp8_per_token_head",
        ]
        | None
    ) = None
    max_num_seqs: Positive | None = None
    max_num_batched_tokens: Positive | None = None
    max_cudagraph_capture_size: Annotated[int, Field(ge=0, le=65536)] | None = None
    optimization_level: Annotated[int, Field(ge=0, le=3)] | None = None
    enforce_eager: bool | None = None
    dtype: Literal["auto", "half", "float16", "bfloat16", "float", "float32"] | None = None
    quantization: str | None = None
    load_format: str | None = None
    safetensors_load_strategy: Literal["lazy", "eager", "prefetch", "torchao"] | None = None
    block_size: Positive | None = None
    enable_prefix_caching: bool | None = None
    enable_chunked_prefill: bool | None = None
    async_scheduling: bool | None = None
    performance_mode: Literal["balanced", "interactivity", "throughput"] | None = None
    attention_backend: str | None = None
    cpu_offload_gb: Annotated[float, Field(ge=0)] | None = None
    kv_offloading_size: Annotated[float, Field(gt=0)] | None = None
    kv_offloading_backend: Literal["native", "lmcache"] | None = None
    enable_expert_parallel: bool | None = None
    enable_sleep_mode: bool | None = None
    data_parallel: bool | None = None  # the layout's replicas in one server (--data-parallel-size)
    disable_custom_all_reduce: bool | None = None
    tokenizer_mode: Literal["auto", "hf", "mistral"] | None = None
    config_format: Literal["auto", "hf", "mistral"] | None = None
    revision: str | None = None
    trust_remote_code: bool | None = None
    tool_call_parser: str | None = None  # "none" switches the model's own off
    reasoning_parser: str | None = None  # likewise
    chat_template: str | None = None
    generation_config: str | None = None
    seed: Annotated[int, Field(ge=0)] | None = None
    hf_overrides: JsonObject | None = None
    limit_mm_per_prompt: JsonObject | None = None
    override_generation_config: JsonObject | None = None
    speculative_config: JsonObject | None = None

    @field_validator("max_model_len", mode="before")
    @classmethod
    def one_word_for_as_long_as_fits(cls, value: Any) -> Any:
        return "auto" if value in (-1, "-1") else value  # vLLM's command line takes both

    @field_validator(
        *("quantization", "load_format", "attention_backend", "revision"),
        *("tool_call_parser", "reasoning_parser", "generation_config", "chat_template"),
    )
    @classmethod
    def no_flag_in_disguise(cls, value: str | None) -> str | None:
        return None if value is None else _plain(value)

    @field_validator("hf_overrides", "limit_mm_per_prompt", "override_generation_config", "speculative_config")
    @classmethod
    def not_too_large(cls, value: JsonObject | None) -> JsonObject | None:
        return None if value is None else _small(value)


# Set by the adapter where it belongs on the command line, not by the plain rule below.
PLACED_BY_ADAPTER = frozenset(
    {"data_parallel", "tool_call_parser", "reasoning_parser", "disable_custom_all_reduce", "enable_sleep_mode"}
)

_LISTENS = "the panel alone decides where an engine listens and who may ask it"
_CODE = "it would load code of its own into the engine; put such code into the install instead"
_HOST = "it opens a file or folder of the host that the panel does not look after"
_LAYOUT = "it comes from the profile's layout and the cards that the panel reserved"
# Flags that exist and that a profile may not set, with the reason.
OWNED = PANEL_OWNED | {
    **dict.fromkeys(
        ("uds", "root_path", "headless", "grpc", "grpc_port", "ssl_ca_certs", "ssl_cert_reqs", "ssl_certfile"), _LISTENS
    ),
    **dict.fromkeys(("ssl_ciphers", "ssl_keyfile", "enable_ssl_refresh", "api_server_count"), _LISTENS),
    **dict.fromkeys(("allowed_origins", "allowed_headers", "allowed_methods", "allow_credentials"), _LISTENS),
    **dict.fromkeys(("tool_server", "otlp_traces_endpoint", "allowed_media_domains"), _LISTENS),
    **dict.fromkeys(
        ("middleware", "tool_parser_plugin", "reasoning_parser_plugin", "io_processor_plugin", "logits_processors"),
        _CODE,
    ),
    **dict.fromkeys(("worker_cls", "worker_extension_cls", "scheduler_cls", "model_class_overrides"), _CODE),
    **dict.fromkeys(("config", "log_config_file", "logging_config", "download_dir", "profiler_config"), _HOST),
    **dict.fromkeys(("allowed_local_media_path", "hf_config_path", "lora_modules", "default_mm_loras"), _HOST),
    "hf_token": "a hub's token is a secret of the panel, not an option",
    "enable_log_requests": "what people ask would stand in the job's log",
    "enable_log_outputs": "what people are answered would stand in the job's log",
    "enable_log_deltas": "what people are answered would stand in the job's log",
    "enable_auto_tool_choice": "it is set where there is a tool_call_parser",
    "enable_cumem_allocator": "it comes with enable_sleep_mode",
    "device_memory_utilization": "use gpu_memory_utilization, its other name",
    **dict.fromkeys(("numa_bind", "numa_bind_cpus", "numa_bind_nodes"), "the panel binds to the cards' own NUMA node"),
    **dict.fromkeys(
        ("distributed_executor_backend", "nnodes", "node_rank", "master_addr", "master_port", "ray_workers_use_nsight"),
        _LAYOUT,
    ),
    **dict.fromkeys(
        (
            "decode_context_parallel_size",
            "prefill_context_parallel_size",
            "elastic_ep_max_dp_size",
            "enable_elastic_ep",
        ),
        _LAYOUT,
    ),
}
OWNED_PREFIXES = {"data_parallel_": _LAYOUT, "dp_supervisor_": _LAYOUT}
JSON_MAX_CHARACTERS = 8_000


def _plain(value: str) -> str:
    if len(value) > 1_000:
        raise ValueError("at most 1,000 characters")
    if not SAFE_TEXT.match(value):
        raise ValueError(f"{value[:80]!r} is empty, starts with '-' or has control characters")
    return value


def _small(value: JsonObject) -> JsonObject:
    if len(json.dumps(value)) > JSON_MAX_CHARACTERS:
        raise ValueError(f"at most {JSON_MAX_CHARACTERS:,} characters of JSON")
    return value


Text = Annotated[str, AfterValidator(_plain)]
SmallObject = Annotated[JsonObject, AfterValidator(_small)]
TYPES: dict[FlagKind, Any] = {
    FlagKind.SWITCH: bool,
    FlagKind.WHOLE: Annotated[int, Field(ge=-1, le=1 << 50)],
    FlagKind.NUMBER: Annotated[float, Field(ge=-1e12, le=1e12)],
    FlagKind.TEXT: Text,
    FlagKind.JSON: SmallObject,
    FlagKind.LIST: Annotated[list[Text | int], Field(min_length=1, max_length=256)],
}


def owned_reasons(flags: Flags) -> dict[str, str]:
    """What a profile may not set although this vLLM has it."""
    by_prefix = {n: why for n in flags for prefix, why in OWNED_PREFIXES.items() if n.startswith(prefix)}
    return by_prefix | OWNED


def options_model(flags: Flags) -> type[VllmOptions]:
    """The options of the vLLM that has these flags: the curated ones above with their bounds, and every other flag with
    the type that the help text tells. A curated option whose flag this vLLM lacks is left out."""
    owned = owned_reasons(flags)
    fields: dict[str, Any] = {}
    for name, flag in flags.items():
        if name in owned or name in VllmOptions.model_fields:
            continue
        kind = TYPES[flag.kind]
        if flag.choices:
            values = tuple(int(c) for c in flag.choices) if flag.kind is FlagKind.WHOLE else flag.choices
            kind = Literal[values]
        fields[name] = (kind | None, None)
    model = create_model("InstalledVllmOptions", __base__=VllmOptions, **fields)
    return model


@lru_cache(maxsize=1)
def shipped_model() -> type[VllmOptions]:
    return options_model(shipped_flags())


def unknown_to(flags: Flags, options: VllmOptions) -> list[OptionError]:
    """Options that this vLLM has no flag for, each with a sentence."""
    missing = [n for n in set_options(options) if n not in flags and n != "data_parallel"]
    return [
        OptionError(
            n,
            REMOVED.get(n)
            or f"The chosen vLLM has no --{n.replace('_', '-')}. Take the option out, or install a vLLM that has it.",
        )
        for n in missing
    ]


def option_flags(options: VllmOptions) -> tuple[str, ...]:
    """``max_model_len=8192`` becomes ``--max-model-len 8192``; false becomes ``--no-...``."""
    flags: list[str] = []
    for name in type(options).model_fields:
        value = getattr(options, name)
        if value is None or name in PLACED_BY_ADAPTER:
            continue
        flag = "--" + name.replace("_", "-")
        if value is True:
            flags.append(flag)
        elif value is False:
            flags.append("--no-" + name.replace("_", "-"))
        elif isinstance(value, dict):
            flags += [flag, json.dumps(value, separators=(",", ":"), sort_keys=True)]
        elif isinstance(value, list):
            flags += [flag, *(str(one) for one in value)]
        else:
            flags += [flag, f"{value:g}" if isinstance(value, float) else str(value)]
    return tuple(flags)
