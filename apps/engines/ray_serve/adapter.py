"""Ray Serve: one launch for all replicas of a profile, behind one address.

The launch is ``launcher.py`` in Ray's own Python. It owns Ray's head, one raylet per replica, the application and the
door; Serve balances between the replicas and starts one that died again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apps.engines.diagnosis import diagnose_by_table
from apps.engines.options import check_options, set_options
from apps.engines.prometheus import Exposition
from apps.engines.protocol import (
    Diagnosis,
    EngineKind,
    EngineLaunch,
    EngineMetrics,
    HealthProbe,
    LaunchContext,
    Readiness,
    ReplicaCondition,
    SharedReport,
    StartCheck,
)
from apps.engines.ray_serve.application import application, is_local, seat
from apps.engines.ray_serve.logs import TABLE, judge_start
from apps.engines.ray_serve.options import OWNED, RayServeOptions
from apps.engines.ray_serve.status import RUNNING
from apps.engines.vllm.options import REMOVED

# The launcher is asked alone and ends Ray in order: 4 s measured on a quiet machine, three times as much under load.
ASK_FIRST_SECONDS = 40.0
STOP_SIGNALS = (("SIGTERM", 10.0), ("SIGKILL", 10.0))
PACKAGE_ROOT = Path(__file__).resolve().parents[3]
WARNING = re.compile(r"^\[rigpanel\] warning: ([^\n]+)", re.MULTILINE)
LAUNCHER = "apps.engines.ray_serve.launcher"


class RayServeAdapter:
    kind = EngineKind.RAY_SERVE
    health_path = "/health"
    metrics_path = "/metrics"
    replicas_path = "/rigpanel/replicas"
    start_timeout_seconds = 2400.0  # as long as vLLM may take, and Ray before it

    def check(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return set_options(check_options(RayServeOptions, options, owned=OWNED, removed=REMOVED))

    def launch_specs(self, context: LaunchContext) -> tuple[EngineLaunch, ...]:
        """One launch on the first slot's port; the other slots are its further replicas."""
        options = check_options(RayServeOptions, context.options, owned=OWNED, removed=REMOVED)
        document = application(context, options)
        first = context.replicas[0]
        seats = [json.dumps(seat(context, slot), separators=(",", ":"), sort_keys=True) for slot in context.replicas]
        return (
            EngineLaunch(
                launch_id=first.launch_id,
                argv=(
                    *(*context.install.command, "-m", LAUNCHER),
                    *("--host", first.host),
                    *("--port", str(first.port)),
                    # Weights that are still to be fetched need a way out.
                    *("--network", "private" if is_local(context.model) else "host"),
                    *(word for one in seats for word in ("--replica", one)),
                    *("--application", json.dumps(document, separators=(",", ":"), sort_keys=True)),
                ),
                env={**context.install.env, **ENVIRONMENT},
                secret_env={"RIGPANEL_ENGINE_KEY": first.api_key},
                replica=0,
                stop_signals=STOP_SIGNALS,
                ask_first_seconds=ASK_FIRST_SECONDS,
                binds_itself=True,
            ),
        )

    def readiness(self, log: str, probe: HealthProbe) -> Readiness:
        return judge_start(log, probe)

    def parse_metrics(self, text: str) -> EngineMetrics:
        """Ray exports vLLM's metrics under names of its own: ``vllm:x`` becomes ``ray_vllm_x``."""
        metrics = Exposition(text)
        return EngineMetrics(
            requests_running=metrics.total("ray_vllm_num_requests_running"),
            requests_waiting=metrics.total("ray_vllm_num_requests_waiting"),
            kv_cache_usage_ratio=metrics.mean("ray_vllm_kv_cache_usage_perc"),
            prompt_tokens_total=metrics.total("ray_vllm_prompt_tokens"),
            generation_tokens_total=metrics.total("ray_vllm_generation_tokens"),
            kv_cache_tokens=metrics.label_total("ray_vllm_cache_config_info", "kv_cache_size_tokens"),
            preemptions_total=metrics.total("ray_vllm_num_preemptions"),
            time_to_first_token_seconds_sum=metrics.total("ray_vllm_time_to_first_token_seconds_sum"),
            time_to_first_token_count=metrics.total("ray_vllm_time_to_first_token_seconds_count"),
        )

    def parse_report(self, text: str) -> SharedReport | None:
        """The launcher's state document; None for anything else."""
        try:
            document = json.loads(text)
            conditions = tuple(
                ReplicaCondition(int(place["index"]), place["state"] == RUNNING, str(place["state"]).lower())
                for place in document["places"]
            )
            return SharedReport(conditions, str(document["message"]))
        except (ValueError, TypeError, KeyError):
            return None

    def check_start(self, log: str, argv: Sequence[str]) -> StartCheck:
        """What the launcher found once all was up: Ray's ports that other machines reach."""
        private = "Ray is in a network of its own" in log
        return StartCheck(tuple(WARNING.findall(log)), {"network": "private" if private else "host"})

    def diagnose(self, log: str, exit_code: int | None) -> Diagnosis:
        return diagnose_by_table(TABLE, log, exit_code, "Ray Serve")


ENVIRONMENT = {
    "PYTHONPATH": str(PACKAGE_ROOT),  # the launcher is ours, the Python is Ray's
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    "RAY_USAGE_STATS_ENABLED": "0",
    "DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1",
    # Else the proxy prefers the replica on the head's raylet and leaves the others idle (measured).
    "RAY_SERVE_PROXY_PREFER_LOCAL_NODE_ROUTING": "0",
    # Ray runs its workers at nice 15, below everything else on the host; here they are what the host is for.
    "RAY_worker_niceness": "0",
    # A wrong option fails the same way each time, and each try loads for minutes.
    "RAY_SERVE_MAX_PER_REPLICA_RETRY_COUNT": "1",
}
