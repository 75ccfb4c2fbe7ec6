"""The application as Serve's REST API takes it: one OpenAI-compatible model with its replicas."""

from __future__ import annotations

from typing import Any

from apps.engines.options import safe_text
from apps.engines.protocol import NCCL_DEFAULT, LaunchContext, ModelSpec, ReplicaSlot
from apps.engines.ray_serve.options import RayServeOptions, engine_arguments
from apps.engines.ray_serve.status import PLACE
from apps.engines.vllm.adapter import cpu_cache_bytes

NAME = "model"
BUILDER = "ray.serve.llm:build_openai_app"  # no ``serve run`` line takes replicas, sizes or an address
# A replica that compiles or loads answers late; Serve would kill it as unhealthy.
HEALTH_PERIOD_SECONDS, HEALTH_TIMEOUT_SECONDS = 5, 60
# Ray 2.60 holds tokens back for 50 ms to send them together; a person reading sees that as stutter.
STREAM_BATCHING_MS = 0


def application(context: LaunchContext, options: RayServeOptions) -> dict[str, Any]:
    """Raises InvalidOptions for a model whose name or source cannot be used."""
    model = context.model
    deployment: dict[str, Any] = {
        "num_replicas": len(context.replicas),
        "health_check_period_s": HEALTH_PERIOD_SECONDS,
        "health_check_timeout_s": HEALTH_TIMEOUT_SECONDS,
        "ray_actor_options": {"num_cpus": 1},
    }
    if options.max_ongoing_requests is not None:
        deployment["max_ongoing_requests"] = options.max_ongoing_requests
    batching = options.stream_batching_interval_ms
    config: dict[str, Any] = {
        "model_loading_config": {
            "model_id": safe_text(model.served_name, "served_name"),
            "model_source": safe_text(model.source, "source"),
        },
        "accelerator_config": {"kind": "gpu" if on_gpus(context) else "cpu"},
        "deployment_config": deployment,
        "placement_group_config": {"bundles": bundles(context), "strategy": "STRICT_PACK"},
        "engine_kwargs": arguments(context, options),
        "experimental_configs": {"stream_batching_interval_ms": STREAM_BATCHING_MS if batching is None else batching},
        "runtime_env": {"env_vars": worker_environment(context)},
    }
    return {
        "name": NAME,
        "route_prefix": "/",
        "import_path": BUILDER,
        # The ingress would scale by itself; one is enough for a rig and makes no third place.
        "args": {
            "llm_configs": [config],
            "ingress_deployment_config": {"num_replicas": 1, "autoscaling_config": None},
        },
    }


def on_gpus(context: LaunchContext) -> bool:
    return any(slot.gpu_uuids for slot in context.replicas)


def bundles(context: LaunchContext) -> list[dict[str, float]]:
    """One bundle for each worker of a replica; the first takes the place on a raylet, so STRICT_PACK keeps all of
    them on the cards of that raylet."""
    world = context.tensor_parallel_size * context.pipeline_parallel_size
    each = {"CPU": 1.0, "GPU": 1.0} if on_gpus(context) else {"CPU": 1.0}
    return [{**each, PLACE: 1.0} if rank == 0 else dict(each) for rank in range(world)]


def arguments(context: LaunchContext, options: RayServeOptions) -> dict[str, Any]:
    """vLLM's arguments. Serve sets the model, its name and the executor itself and refuses them here."""
    world = context.tensor_parallel_size * context.pipeline_parallel_size
    chosen = engine_arguments(options)
    tool = chosen.pop("tool_call_parser", None) or context.model.tool_parser
    reasoning = chosen.pop("reasoning_parser", None) or context.model.reasoning_parser
    given: dict[str, Any] = {"tensor_parallel_size": context.tensor_parallel_size}
    if context.pipeline_parallel_size > 1:
        given["pipeline_parallel_size"] = context.pipeline_parallel_size
    # As for plain vLLM: its own all-reduce needs every pair of a replica's cards bridged.
    if world > 1 and on_gpus(context) and not context.nvlinked:
        given["disable_custom_all_reduce"] = True
    if not on_gpus(context) and not {"gpu_memory_utilization", "kv_cache_memory_bytes"} & set(chosen):
        given["kv_cache_memory_bytes"] = cpu_cache_bytes(context.model)
    given |= chosen
    if tool and tool != "none":
        given |= {"enable_auto_tool_choice": True, "tool_call_parser": tool}
    if reasoning and reasoning != "none":
        given["reasoning_parser"] = reasoning
    return given


def worker_environment(context: LaunchContext) -> dict[str, str]:
    """For the replicas and vLLM's workers. The cards are not here: Ray sets them for each actor."""
    environment = {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_ENGINE_READY_TIMEOUT_S": "1800",
        "OMP_NUM_THREADS": "1",
    }
    if not on_gpus(context):
        # vLLM for the CPU binds a replica to cores of its own and refuses when they do not suffice for all.
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    if is_local(context.model):
        environment["HF_HUB_OFFLINE"] = "1"
    if context.cache_dir:
        environment["VLLM_CACHE_ROOT"] = context.cache_dir
    return environment


def seat(context: LaunchContext, slot: ReplicaSlot) -> dict[str, Any]:
    """What the launcher must know of one replica (``cluster.Cluster``): what differs from card to card."""
    found: dict[str, Any] = {"cards": list(slot.gpu_uuids)}
    if slot.gpu_uuids and context.tensor_parallel_size * context.pipeline_parallel_size > 1:
        found["env"] = dict(NCCL_DEFAULT if slot.nccl_env is None else slot.nccl_env)
    if slot.argv_prefix:
        found["prefix"] = list(slot.argv_prefix)
    return found


def is_local(model: ModelSpec) -> bool:
    return model.source.startswith("/")
