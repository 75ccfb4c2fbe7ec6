"""Launch contexts for the engines' tests: the four cards of the rig and the three seed models."""

from __future__ import annotations

import socket
from typing import Any

from apps.engines.protocol import EngineKind, EngineLaunch, Install, LaunchContext, ModelSpec, ReplicaSlot

CARDS = tuple(f"GPU-0000000{n}-1111-2222-3333-444444444444" for n in range(4))
CARD_BYTES = 25_287_458_816  # 24,116 MiB: what CUDA reports of a 3090

MIXTRAL = ModelSpec(
    served_name="mixtral-8x22b",
    source="/models/mixtral-8x22b-instruct-awq",
    architecture="MixtralForCausalLM",
    weights_bytes=73_662_922_752,
    kv_bytes_per_token=229_376,
    max_context_tokens=65_536,
    tool_parser="mistral",
)
R1_DISTILL = ModelSpec(
    served_name="deepseek-r1-distill-llama-70b",
    source="/models/deepseek-r1-distill-llama-70b-awq",
    architecture="LlamaForCausalLM",
    weights_bytes=39_767_785_472,
    kv_bytes_per_token=327_680,
    max_context_tokens=131_072,
    reasoning_parser="deepseek_r1",
)
CODER = ModelSpec(
    served_name="qwen2.5-coder-32b",
    source="/models/Qwen2.5-Coder-32B-Instruct-AWQ",
    architecture="Qwen2ForCausalLM",
    weights_bytes=19_328_804_864,
    kv_bytes_per_token=262_144,
    max_context_tokens=32_768,
    tool_parser="hermes",
)
GEMMA = ModelSpec(
    served_name="gemma-3-270m",
    source="/models/gemma-3-270m-q4_k_m.gguf",
    chat_template="gemma",
    max_context_tokens=32_768,
)

INSTALLS = {
    EngineKind.VLLM: Install(EngineKind.VLLM, "0.33.0", ("/opt/vllm/bin/vllm", "serve")),
    EngineKind.RAY_SERVE: Install(EngineKind.RAY_SERVE, "2.60.0", ("/opt/ray/bin/python",)),
    EngineKind.LLAMA_CPP: Install(EngineKind.LLAMA_CPP, "b11434", ("/opt/llama/bin/llama-server",)),
}


def slots(cards_per_replica: int, replicas: int = 1) -> tuple[ReplicaSlot, ...]:
    made = []
    for number in range(replicas):
        indices = tuple(range(number * cards_per_replica, (number + 1) * cards_per_replica))
        made.append(
            ReplicaSlot(
                launch_id=f"launch-{number}",
                host="127.0.0.1",
                port=28100 + number,
                api_key=f"secret-key-{number}",
                gpu_indices=indices,
                gpu_uuids=tuple(CARDS[i] for i in indices),
                gpu_memory_total_bytes=(CARD_BYTES,) * len(indices),
            )
        )
    return tuple(made)


def context(model: ModelSpec, install: Install, options: dict[str, Any], **changes: Any) -> LaunchContext:
    given: dict[str, Any] = {"replicas": slots(0), **changes}
    return LaunchContext(model=model, options=options, install=install, **given)


def written(launches: tuple[EngineLaunch, ...]) -> str:
    """Launches as a golden file shows them: secrets by name only, one argument pair to a line."""
    blocks = []
    for launch in launches:
        lines = [f"# {launch.launch_id}, replica {launch.replica}"]
        lines += [f"{name}={value}" for name, value in sorted(launch.env.items())]
        lines += [f"{name}=(secret)" for name in sorted(launch.secret_env)]
        line = ""
        for part in launch.argv:
            if part.startswith("--") and line:
                lines.append(line)
                line = "  " + part
            else:
                line = f"{line} {part}" if line else part
        lines.append(line)
        lines.append("stop: " + ", ".join(f"{name} {seconds:g} s" for name, seconds in launch.stop_signals))
        blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
