"""The profiles that rigpanel ships: the quad-3090 guide's three models, and Gemma for any machine.

Context lengths are those that fit: weights and cache counted by hand for 23.55 GiB per card at utilization 0.90, with
1.0-1.9 GiB per card for what vLLM takes besides. ``docs/seed-corrections.md`` puts each beside the guide's own line.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from apps.profiles.models import Device, Engine


@dataclass(frozen=True, slots=True)
class ShippedProfile:
    slug: str
    name: str
    model_slug: str
    description: str
    engine: str = Engine.VLLM
    device: str = Device.GPU
    replicas: int = 1
    tensor_parallel_size: int = 1
    members_may_switch: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def values(self) -> dict[str, Any]:
        """For ``profile_create`` and ``profile_update``; the model comes from the catalogue."""
        return {
            "name": self.name,
            "description": self.description,
            "engine": self.engine,
            "device": self.device,
            "replicas": self.replicas,
            "tensor_parallel_size": self.tensor_parallel_size,
            "members_may_switch": self.members_may_switch,
            "options": dict(self.options),
        }


def _vllm(max_model_len: int) -> dict[str, Any]:
    """32 sequences are plenty for a team and cost far fewer captured graphs than the default of 256."""
    return {"max_model_len": max_model_len, "gpu_memory_utilization": 0.9, "max_num_seqs": 32}


SHIPPED_PROFILES = (
    ShippedProfile(
        slug="gemma-3-270m-cpu",
        name="Gemma 3 270M on the CPU",
        model_slug="gemma-3-270m",
        description="A tiny real model for any machine: real tokens, not good ones. Needs the starter engine.",
        engine=Engine.LLAMA_CPP,
        device=Device.CPU,
        members_may_switch=True,
        # The context is shared by the slots: four of 4,096 tokens.
        options={"context_tokens": 16384, "parallel": 4},
    ),
    ShippedProfile(
        slug="mixtral-8x22b-tp4",
        name="Mixtral 8x22B",
        model_slug="mixtral-8x22b-instruct-awq",
        tensor_parallel_size=4,
        description=(
            "The whole rig for one large mixture of experts: 17.2 GiB of weights per GPU leave cache for 40 to "
            "57 thousand tokens, so 32,768 fit and the native 65,536 do not. "
            "The quantization is read from the model: an explicit --quantization awq meant a slow kernel in older vLLM."
        ),
        options=_vllm(32768),
    ),
    ShippedProfile(
        slug="r1-distill-70b-tp4",
        name="DeepSeek R1 Distill 70B",
        model_slug="deepseek-r1-distill-llama-70b-awq",
        tensor_parallel_size=4,
        description=(
            "Reasoning with a long context: 9.3 GiB of weights per GPU leave cache for 132 to 143 thousand tokens. "
            "131,072 would fit once with no margin; 98,304 leave room for a second reader."
        ),
        options=_vllm(98304),
    ),
    ShippedProfile(
        slug="qwen25-coder-32b-2xtp2",
        name="Qwen2.5 Coder 32B, two replicas",
        model_slug="qwen2-5-coder-32b-instruct-awq",
        replicas=2,
        tensor_parallel_size=2,
        description=(
            "For many at once: two replicas, each on its own NVLink pair, behind one address. Each has cache for 84 to "
            "92 thousand tokens, that is 2.6 to 2.8 full contexts of 32,768. "
            "This is what replaces the guide's “serve run” line."
        ),
        options=_vllm(32768),
    ),
    ShippedProfile(
        slug="qwen25-coder-32b-tp4",
        name="Qwen2.5 Coder 32B",
        model_slug="qwen2-5-coder-32b-instruct-awq",
        tensor_parallel_size=4,
        description=(
            "For one fast reader of long prompts: one replica over all four cards, with cache for 242 to 257 thousand "
            "tokens. Part of the exchange goes over PCIe; two replicas give more tokens in total."
        ),
        options=_vllm(32768),
    ),
)
