"""What a profile may set for Ray Serve: vLLM's options, which become the engine's arguments, and two of Serve's own."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator

from apps.engines.vllm.options import OWNED as VLLMS_OWN
from apps.engines.vllm.options import VllmOptions

OWNED = {
    **VLLMS_OWN,
    "num_replicas": "replicas come from the profile's layout",
    "autoscaling_config": "replicas come from the profile's layout, since each needs cards of its own",
    "distributed_executor_backend": "Ray Serve forces Ray's own",
    "placement_group_config": "the panel gives each replica a raylet with its cards",
    "accelerator_type": "Ray knows no RTX 3090; the panel pins the cards instead",
}


class RayServeOptions(VllmOptions):
    """``None`` leaves a choice to Ray, but for the batching of streams, which the panel switches off."""

    max_ongoing_requests: Annotated[int, Field(ge=1, le=100_000)] | None = None  # per replica; more wait at the proxy
    stream_batching_interval_ms: Annotated[int, Field(ge=0, le=10_000)] | None = None

    @field_validator("data_parallel", "enable_sleep_mode")
    @classmethod
    def not_under_ray(cls, value: bool | None) -> None:
        if value:
            raise ValueError("Ray Serve keeps its replicas itself: choose engine vllm for this")


SERVES_OWN = ("max_ongoing_requests", "stream_batching_interval_ms")


def engine_arguments(options: RayServeOptions) -> dict[str, Any]:
    """What was set for vLLM, by the names of its own argument classes."""
    set_ones = options.model_dump(mode="json", exclude_none=True)
    if set_ones.get("max_model_len") == "auto":
        set_ones["max_model_len"] = -1  # the word exists for vLLM's command line alone
    return {name: value for name, value in set_ones.items() if name not in SERVES_OWN}
