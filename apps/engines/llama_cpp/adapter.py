"""llama.cpp's server: GGUF files, on the CPU or on any number of GPUs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from apps.engines.diagnosis import diagnose_by_table
from apps.engines.llama_cpp.logs import FATAL, PHASES, TABLE
from apps.engines.llama_cpp.options import NAMED_TEMPLATES, LlamaCppOptions, fit_flags
from apps.engines.llama_cpp.split import check_split, memory_shares
from apps.engines.llama_cpp.xllama_server import known_flags
from apps.engines.options import check_options, safe_text, set_options
from apps.engines.prometheus import Exposition
from apps.engines.protocol import (
    Diagnosis,
    EngineKind,
    EngineLaunch,
    EngineMetrics,
    HealthProbe,
    Install,
    InvalidOptions,
    LaunchContext,
    OptionError,
    Readiness,
    ReadinessState,
    ReplicaSlot,
    StartCheck,
)

# Measured: SIGTERM ends it in 0.4 s, also with open streams, which it cuts.
STOP_SIGNALS = (("SIGTERM", 10.0), ("SIGKILL", 10.0))


class LlamaCppAdapter:
    kind = EngineKind.LLAMA_CPP
    health_path = "/health"
    metrics_path = "/metrics"  # with the key: only /health is open
    start_timeout_seconds = 600.0

    def check(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return set_options(check_options(LlamaCppOptions, options))

    def launch_specs(self, context: LaunchContext) -> tuple[EngineLaunch, ...]:
        """One process per replica. Raises InvalidOptions for a model that is not a GGUF file."""
        options = check_options(LlamaCppOptions, context.options)
        source = safe_text(context.model.source, "source")
        if not source.endswith(".gguf"):
            raise InvalidOptions([OptionError("source", f"llama.cpp serves GGUF files; {source} is not one.")])
        flags = _flags_of(context.install)
        build = f"llama-server {context.install.version}".strip()
        return tuple(
            EngineLaunch(
                launch_id=slot.launch_id,
                argv=(*context.install.command, *fit_flags(_arguments(context, options, slot), flags, build)),
                env={**context.install.env, **_environment(slot)},
                # llama-server reads its key from here as from --api-key; argv is visible to all users.
                secret_env={"LLAMA_API_KEY": slot.api_key},
                replica=index,
                stop_signals=STOP_SIGNALS,
            )
            for index, slot in enumerate(context.replicas)
        )

    def readiness(self, log: str, probe: HealthProbe) -> Readiness:
        if probe.status == 200:
            return Readiness(ReadinessState.READY, "server", 1.0)
        if (fatal := FATAL.search(log)) is not None:
            return Readiness(ReadinessState.FAILED, "failed", 0.0, fatal[0])
        phase, fraction = "process", 0.0
        for pattern, name, reached in PHASES:
            if pattern.search(log):
                phase, fraction = name, reached
        return Readiness(ReadinessState.WAITING, phase, fraction)

    def check_start(self, log: str, argv: Sequence[str]) -> StartCheck:
        return check_split(log, argv)

    def parse_metrics(self, text: str) -> EngineMetrics:
        """llama.cpp tells neither the fill of its cache nor a time to first token."""
        metrics = Exposition(text)
        return EngineMetrics(
            requests_running=metrics.total("llamacpp:requests_processing"),
            requests_waiting=metrics.total("llamacpp:requests_deferred"),
            kv_cache_usage_ratio=metrics.mean("llamacpp:kv_cache_usage_ratio"),  # older builds only
            prompt_tokens_total=metrics.total("llamacpp:prompt_tokens"),
            generation_tokens_total=metrics.total("llamacpp:tokens_predicted"),
            steps_total=metrics.total("llamacpp:n_decode"),
        )

    def diagnose(self, log: str, exit_code: int | None) -> Diagnosis:
        return diagnose_by_table(TABLE, log, exit_code, "llama-server")


def _flags_of(install: Install) -> frozenset[str] | None:
    """The starter's flags are our own module's; those of a llama-server were read from its help."""
    if any(part.endswith("xllama_server.py") for part in install.command):
        return known_flags()
    return None if install.flags is None else frozenset(install.flags)


def _arguments(context: LaunchContext, options: LlamaCppOptions, slot: ReplicaSlot) -> tuple[str, ...]:
    on_gpu = bool(slot.gpu_uuids)
    flags = _flags_of(context.install)
    template = options.chat_template or context.model.chat_template
    shares = _shares(options, slot)
    split_mode = options.split_mode or ("layer" if len(slot.gpu_uuids) > 1 else None)
    context_tokens = options.context_tokens
    if options.context_tokens_per_slot is not None:
        context_tokens = options.context_tokens_per_slot * (options.parallel or 1)
    arguments = [
        *("--model", context.model.source),
        *("--alias", safe_text(context.model.served_name, "served_name")),
        *("--host", slot.host),
        *("--port", str(slot.port)),
        "--metrics",
        "--no-webui",
        *_flag("--ctx-size", context_tokens),
        *_flag("--parallel", options.parallel or (1 if options.context_tokens_per_slot else None)),
        *_flag("--n-gpu-layers", _gpu_layers(options) if on_gpu else 0),
        *_flag("--split-mode", split_mode if on_gpu else None),
        *_flag("--tensor-split", _numbers(shares) if on_gpu else None),
        *_flag("--main-gpu", options.main_gpu if on_gpu else None),
        # Only from this level on does the log say which layers went where; builds before --fit counted levels
        # otherwise and say it anyway.
        *_flag("--verbosity", 4 if on_gpu and (flags is None or "--fit" in flags) else None),
        *_flag("--batch-size", options.batch_tokens),
        *_flag("--ubatch-size", options.micro_batch_tokens),
        *_flag("--threads", options.threads),
        *_flag("--threads-batch", options.threads_batch),
        *_flag("--flash-attn", options.flash_attention),
        *_flag("--cache-type-k", options.cache_type_k),
        *_flag("--cache-type-v", options.cache_type_v),
        *_flag("--reasoning-format", options.reasoning_format),
        *(("--no-jinja",) if template in NAMED_TEMPLATES else ()),
        *_flag("--chat-template", template),
        *(("--embeddings",) if options.embeddings else ()),
        *_flag("--pooling", options.pooling),
        *(options.extra_args or ()),
    ]
    return tuple(arguments)


def _gpu_layers(options: LlamaCppOptions) -> str:
    """All of them unless told otherwise: left to itself, llama.cpp fits the model by moving layers to the CPU, and
    nobody is told why it is slow. (``all`` as a number, which every build takes.)"""
    asked = "all" if options.gpu_layers is None else options.gpu_layers
    return "999" if asked == "all" else str(asked)


def _shares(options: LlamaCppOptions, slot: ReplicaSlot) -> tuple[float, ...] | None:
    cards = len(slot.gpu_uuids)
    if cards and options.main_gpu is not None and options.main_gpu >= cards:
        raise InvalidOptions(
            [OptionError("main_gpu", f"It counts from 0 among the replica's own GPUs, of which there are {cards}.")]
        )
    if options.tensor_split is None:
        if cards < 2 or options.split_mode == "none":
            return None
        return memory_shares(slot.gpu_memory_free_bytes, slot.gpu_memory_total_bytes)
    if cards and len(options.tensor_split) != cards:
        many = f"{len(options.tensor_split)} share{'s' if len(options.tensor_split) != 1 else ''}"
        raise InvalidOptions(
            [OptionError("tensor_split", f"It has {many}, the layout gives each replica {cards}; one for each GPU.")]
        )
    if sum(options.tensor_split) <= 0:
        raise InvalidOptions([OptionError("tensor_split", "At least one share must be above 0.")])
    return options.tensor_split


def _environment(slot: ReplicaSlot) -> dict[str, str]:
    """An engine on the CPU must not see the cards: a CUDA build would take memory on each."""
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(slot.gpu_uuids)}


def _flag(name: str, value: object) -> tuple[str, ...]:
    return () if value is None else (name, str(value))


def _numbers(values: tuple[float, ...] | None) -> str | None:
    return None if values is None else ",".join(f"{v:g}" for v in values)
