"""vLLM: one ``vllm serve`` per replica, tensor parallel over the replica's own GPUs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from apps.engines.diagnosis import diagnose_by_table
from apps.engines.options import check_options, safe_text, set_options
from apps.engines.prometheus import Exposition
from apps.engines.protocol import (
    NCCL_DEFAULT,
    Diagnosis,
    EngineKind,
    EngineLaunch,
    EngineMetrics,
    HealthProbe,
    Install,
    InvalidOptions,
    LaunchContext,
    ModelSpec,
    OptionError,
    Readiness,
    ReplicaSlot,
    StartCheck,
)
from apps.engines.vllm.boot import check_boot
from apps.engines.vllm.flags import Flags, flags_from_dict, shipped_flags
from apps.engines.vllm.logs import TABLE, judge_start
from apps.engines.vllm.options import (
    REMOVED,
    VllmOptions,
    option_flags,
    options_model,
    owned_reasons,
    shipped_model,
    unknown_to,
)
from apps.engines.vllm.sleeping import careful_cache_bytes, parse_version, sleep_problem

# Measured: 0.5-1 s, up to 6.6 s after it has slept. A SIGTERM near the end of the start was
# lost once and the server came up all the same: so ask twice before killing.
STOP_SIGNALS = (("SIGTERM", 15.0), ("SIGTERM", 10.0), ("SIGKILL", 10.0))


# Without a size the CPU build takes 92 % of the host's memory for its cache.
CPU_KV_CACHE_BYTES = 1 << 30


def cpu_cache_bytes(model: ModelSpec) -> int:
    """On each rank. Never less than one request of the full length, with which vLLM would refuse to start."""
    return max(CPU_KV_CACHE_BYTES, model.request_cache_bytes or 0)


class VllmAdapter:
    kind = EngineKind.VLLM
    health_path = "/health"
    metrics_path = "/metrics"  # open without the key, as is /health
    # 74 GB from a slow disk plus a first compile: minutes, not seconds.
    start_timeout_seconds = 1800.0

    def check(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return self.check_against({}, options)

    def check_against(self, flags: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
        """``check`` by the flags of an install (``EngineInstall.flags``), as the planner does before a launch; by those
        of the vLLM that this panel was written for where it has none."""
        return set_options(_checked(flags, options))

    sleep_path = "/sleep?level=1"  # never level 2: it drops the weights, and what it says of a sleeper is wrong
    wake_path = "/wake_up"
    asleep_path = "/is_sleeping"

    def may_sleep(self, options: Mapping[str, Any]) -> bool:
        return options.get("enable_sleep_mode") is True

    def is_asleep(self, text: str) -> bool | None:
        return {'{"is_sleeping":true}': True, '{"is_sleeping":false}': False}.get(text.replace(" ", "").strip())

    def compiles_per_key(self, version: str) -> bool:
        """Up to 0.31 at the latest ``VLLM_API_KEY`` is part of the compile cache's key (``envs.compile_factors``
        ignores it in 0.32 and not in 0.26). Seen on a GPU: with a new key an identical second boot compiled for 47 s
        again and had a third less KV cache. The other ways, ``--api-key`` and a config file, are printed to the log."""
        known = parse_version(version)
        return known is None or known < (0, 32)

    def one_server_for_all(self, options: Mapping[str, Any]) -> bool:
        """``data_parallel``: vLLM starts all replicas itself and spreads requests over them, behind one port."""
        return options.get("data_parallel") is True

    def launch_specs(self, context: LaunchContext) -> tuple[EngineLaunch, ...]:
        """One process per slot, each behind its own port: a dead one takes no other with it."""
        options = _checked(_told(context.install), context.options)
        for slot in context.replicas if options.enable_sleep_mode else ():
            if problem := sleep_problem(context.install.version, slot.host):
                raise InvalidOptions([OptionError("enable_sleep_mode", problem)])
        safe_text(context.model.source, "source")
        safe_text(context.model.served_name, "served_name")
        return tuple(
            EngineLaunch(
                launch_id=slot.launch_id,
                argv=(*context.install.command, *_arguments(context, options, slot)),
                env={**context.install.env, **_environment(context, options, slot)},
                secret_env={"VLLM_API_KEY": slot.api_key},
                replica=index,
                stop_signals=STOP_SIGNALS,
            )
            for index, slot in enumerate(context.replicas)
        )

    def readiness(self, log: str, probe: HealthProbe) -> Readiness:
        return judge_start(log, probe)

    def parse_metrics(self, text: str) -> EngineMetrics:
        metrics = Exposition(text)
        return EngineMetrics(
            requests_running=metrics.total("vllm:num_requests_running"),
            requests_waiting=metrics.total("vllm:num_requests_waiting"),
            kv_cache_usage_ratio=metrics.mean("vllm:kv_cache_usage_perc"),  # 0..1 despite its name
            prompt_tokens_total=metrics.total("vllm:prompt_tokens"),
            generation_tokens_total=metrics.total("vllm:generation_tokens"),
            kv_cache_tokens=metrics.label_total("vllm:cache_config_info", "kv_cache_size_tokens"),
            preemptions_total=metrics.total("vllm:num_preemptions"),
            time_to_first_token_seconds_sum=metrics.total("vllm:time_to_first_token_seconds_sum"),
            time_to_first_token_count=metrics.total("vllm:time_to_first_token_seconds_count"),
        )

    def check_start(self, log: str, argv: Sequence[str]) -> StartCheck:
        return check_boot(log)

    def diagnose(self, log: str, exit_code: int | None) -> Diagnosis:
        return diagnose_by_table(TABLE, log, exit_code, "vLLM")


def _told(install: Install) -> Mapping[str, Any]:
    return install.flags if isinstance(install.flags, Mapping) else {}


@lru_cache(maxsize=4)  # 300 fields take tens of milliseconds to build
def _model_of(stored: str) -> tuple[Flags, type[VllmOptions]]:
    flags = flags_from_dict(json.loads(stored))
    # Both know their names: an option of another vLLM is told apart from a mistyped one.
    return flags, options_model({**shipped_flags(), **flags})


def _checked(stored: Mapping[str, Any], options: Mapping[str, Any]) -> VllmOptions:
    if not stored:
        return check_options(shipped_model(), options, owned=owned_reasons(shipped_flags()), removed=REMOVED)
    flags, model = _model_of(json.dumps(stored, sort_keys=True))
    checked = check_options(model, options, owned=owned_reasons(flags), removed=REMOVED)
    if missing := unknown_to(flags, checked):
        raise InvalidOptions(missing)
    return checked


def _arguments(context: LaunchContext, options: VllmOptions, slot: ReplicaSlot) -> tuple[str, ...]:
    """The command after ``vllm serve``. No ``--quantization`` of our own: vLLM reads it from the
    model, and an explicit ``awq`` meant the slow kernel in older releases."""
    world = context.tensor_parallel_size * context.pipeline_parallel_size
    # vLLM's own all-reduce kernel needs every pair of a replica's GPUs bridged. It would notice
    # and only log a warning; on patched drivers it was seen to return wrong data.
    plain_all_reduce = options.disable_custom_all_reduce
    if plain_all_reduce is None:
        plain_all_reduce = world > 1 and not context.nvlinked and not _on_cpu(slot)
    return (
        context.model.source,
        *("--served-model-name", context.model.served_name),
        *("--host", slot.host),
        *("--port", str(slot.port)),
        *("--tensor-parallel-size", str(context.tensor_parallel_size)),
        *_when(
            context.pipeline_parallel_size > 1,
            "--pipeline-parallel-size",
            str(context.pipeline_parallel_size),
        ),
        *_when(context.data_parallel_size > 1, "--data-parallel-size", str(context.data_parallel_size)),
        *option_flags(options),
        *_sleep_flags(context, options, slot),
        *_when(
            _on_cpu(slot) and not _sizes_memory(options), "--kv-cache-memory-bytes", str(cpu_cache_bytes(context.model))
        ),
        *_when(plain_all_reduce, "--disable-custom-all-reduce"),
        *_parsers(context.model, options),
    )


def _sleep_flags(context: LaunchContext, options: VllmOptions, slot: ReplicaSlot) -> tuple[str, ...]:
    """None on the CPU: that build refuses the flag, and its developer endpoints pause and go on without it."""
    if not options.enable_sleep_mode or _on_cpu(slot):
        return ()
    careful = careful_cache_bytes(
        context.install.version,
        quantization=context.model.quantization,
        weights_bytes=context.model.weights_bytes,
        world=context.tensor_parallel_size * context.pipeline_parallel_size,
        card_bytes=min(slot.gpu_memory_total_bytes, default=0),
        utilization=options.gpu_memory_utilization,
        eager=bool(options.enforce_eager),
    )
    sized = options.kv_cache_memory_bytes is not None or careful is None
    return ("--enable-sleep-mode", *_when(not sized, "--kv-cache-memory-bytes", str(careful)))


def _on_cpu(slot: ReplicaSlot) -> bool:
    return not slot.gpu_uuids


def _sizes_memory(options: VllmOptions) -> bool:
    return options.kv_cache_memory_bytes is not None or options.gpu_memory_utilization is not None


def _parsers(model: ModelSpec, options: VllmOptions) -> tuple[str, ...]:
    tool = options.tool_call_parser or model.tool_parser
    reasoning = options.reasoning_parser or model.reasoning_parser
    return (
        *_when(bool(tool) and tool != "none", "--enable-auto-tool-choice", "--tool-call-parser", str(tool)),
        *_when(bool(reasoning) and reasoning != "none", "--reasoning-parser", str(reasoning)),
    )


def _environment(context: LaunchContext, options: VllmOptions, slot: ReplicaSlot) -> dict[str, str]:
    """Pinned by UUID: an index changes its meaning when a card falls off the bus.

    Not set on purpose: ``VLLM_PORT`` (it is vLLM's internal port base, not the API's),
    ``VLLM_ENABLE_STARTUP_PLAN`` (a plan saved by a compiling boot pins its small KV cache for
    good) and expandable segments (boot crashes were reported with NVLink).
    """
    world = context.tensor_parallel_size * context.pipeline_parallel_size
    environment = {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        # vLLM's own limit is 600 s for loading, too short for a slow disk.
        "VLLM_ENGINE_READY_TIMEOUT_S": "1800",
    }
    if options.enable_sleep_mode:
        environment["VLLM_SERVER_DEV_MODE"] = "1"  # the endpoints for sleep; loopback alone, see sleep_problem
    if slot.host in ("127.0.0.1", "localhost"):
        environment["VLLM_HOST_IP"] = "127.0.0.1"  # else its internal sockets listen on the network
    if context.model.source.startswith("/"):
        environment["HF_HUB_OFFLINE"] = "1"
    if context.cache_dir:
        environment["VLLM_CACHE_ROOT"] = context.cache_dir
    if _on_cpu(slot):
        # Its own binding wants a NUMA node for each rank and would put two engines on the same cores.
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        if world * context.data_parallel_size > 1:
            environment["OMP_NUM_THREADS"] = "1"
        return environment
    environment["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    environment["CUDA_VISIBLE_DEVICES"] = ",".join(slot.gpu_uuids)
    environment["OMP_NUM_THREADS"] = "1"
    if world > 1:
        environment.update(NCCL_DEFAULT if slot.nccl_env is None else slot.nccl_env)
    return environment


def _when(condition: bool, *arguments: str) -> tuple[str, ...]:
    return arguments if condition else ()
