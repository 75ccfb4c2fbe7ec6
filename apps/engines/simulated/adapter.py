"""The simulated engine: a real server process with real sockets, logs and failures, no model.

It also stands in for a GPU engine on a simulated rig (``LaunchContext.stand_in_for``): then it
takes from the profile's options what it understands, so that a context that would not fit on
real cards fails here with the same words.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from apps.engines.diagnosis import diagnose_by_table
from apps.engines.options import check_options, safe_text, set_options
from apps.engines.protocol import (
    Diagnosis,
    EngineKind,
    EngineLaunch,
    EngineMetrics,
    ExpectedMemory,
    HealthProbe,
    Install,
    LaunchContext,
    Readiness,
    ReplicaSlot,
)
from apps.engines.simulated.options import SimulatedOptions
from apps.engines.vllm.adapter import VllmAdapter
from apps.engines.vllm.logs import TABLE, judge_start

STOP_SIGNALS = (("SIGTERM", 10.0), ("SIGKILL", 10.0))
LOAD_SECONDS_AT_LEAST = 3.0
LOAD_BYTES_PER_SECOND = 20e9  # as if the weights came from the page cache over PCIe
# What other engines call the options that matter here.
STAND_IN_NAMES = {"context_tokens": "max_model_len", "parallel": "max_num_seqs"}


def simulated_install() -> Install:
    """Always there: it is this package, run by the panel's own Python."""
    return Install(
        kind=EngineKind.SIMULATED,
        version="1",
        command=(sys.executable, "-m", "apps.engines.simulated.server"),
        env={"PYTHONPATH": str(Path(__file__).resolve().parents[3]), "PYTHONDONTWRITEBYTECODE": "1"},
    )


class SimulatedAdapter:
    kind = EngineKind.SIMULATED
    health_path = "/health"
    metrics_path = "/metrics"
    start_timeout_seconds = 300.0

    def check(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return set_options(check_options(SimulatedOptions, options))

    sleep_path, wake_path, asleep_path = VllmAdapter.sleep_path, VllmAdapter.wake_path, VllmAdapter.asleep_path

    def may_sleep(self, options: Mapping[str, Any]) -> bool:
        return options.get("enable_sleep_mode") is True

    def is_asleep(self, text: str) -> bool | None:
        return VllmAdapter().is_asleep(text)

    def launch_specs(self, context: LaunchContext) -> tuple[EngineLaunch, ...]:
        options = check_options(SimulatedOptions, _understood(context))
        safe_text(context.model.source, "source")
        safe_text(context.model.served_name, "served_name")
        install = context.install if context.install.kind is EngineKind.SIMULATED else simulated_install()
        return tuple(
            EngineLaunch(
                launch_id=slot.launch_id,
                argv=(*install.command, *_arguments(context, options, slot)),
                env=dict(install.env),
                secret_env={"VLLM_API_KEY": slot.api_key},
                replica=index,
                stop_signals=STOP_SIGNALS,
            )
            for index, slot in enumerate(context.replicas)
        )

    def readiness(self, log: str, probe: HealthProbe) -> Readiness:
        return judge_start(log, probe)

    def parse_metrics(self, text: str) -> EngineMetrics:
        return VllmAdapter().parse_metrics(text)

    def diagnose(self, log: str, exit_code: int | None) -> Diagnosis:
        return diagnose_by_table(TABLE, log, exit_code, "The simulated engine")


def _understood(context: LaunchContext) -> dict[str, Any]:
    if context.stand_in_for is None:
        return dict(context.options)
    renamed = {STAND_IN_NAMES.get(name, name): value for name, value in context.options.items()}
    return {name: value for name, value in renamed.items() if name in SimulatedOptions.model_fields and value}


def _expected(memory: ExpectedMemory | None) -> str | None:
    return None if memory is None else json.dumps(asdict(memory), separators=(",", ":"))


def _arguments(context: LaunchContext, options: SimulatedOptions, slot: ReplicaSlot) -> tuple[str, ...]:
    model = context.model
    load_seconds = options.load_seconds
    if load_seconds is None:
        load_seconds = LOAD_SECONDS_AT_LEAST + (model.weights_bytes or 0) / LOAD_BYTES_PER_SECOND
    values: dict[str, object] = {
        "--model": model.source,
        "--served-model-name": model.served_name,
        "--host": slot.host,
        "--port": slot.port,
        "--tensor-parallel-size": context.tensor_parallel_size,
        "--pipeline-parallel-size": context.pipeline_parallel_size,
        "--weights-bytes": model.weights_bytes,
        "--kv-bytes-per-token": model.kv_bytes_per_token,
        "--model-max-tokens": model.max_context_tokens,
        "--gpu-uuids": ",".join(slot.gpu_uuids) or None,
        "--gpu-memory-bytes": ",".join(str(n) for n in slot.gpu_memory_total_bytes) or None,
        "--hardware-socket": context.simulation_socket,
        "--load-seconds": f"{load_seconds:.2f}",
        "--expected-memory": _expected(context.expected),
    }
    for name in SimulatedOptions.model_fields:
        value = getattr(options, name)
        if name != "load_seconds" and value is not None and value is not False:
            values["--" + name.replace("_", "-")] = value
    flags: list[str] = []
    for flag, value in values.items():
        if value is True:
            flags.append(flag)
        elif value is not None:
            flags += [flag, str(value)]
    return tuple(flags)
