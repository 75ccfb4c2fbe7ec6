"""What the variables around a command mean for a profile."""

from __future__ import annotations

from apps.profiles.recipes.hidden import HIDDEN, is_secret_name
from apps.profiles.recipes.result import Recipe

CARDS = frozenset({"CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "GGML_VK_VISIBLE_DEVICES"})
OWNED = {
    "CUDA_DEVICE_ORDER": "The panel sets it.",
    "NCCL_P2P_LEVEL": "The panel sets it from the rig's bridges.",
    "NCCL_P2P_DISABLE": "The panel decides it from the rig's bridges.",
    "NCCL_IB_DISABLE": "The panel sets it.",
    "NCCL_CUMEM_ENABLE": "The panel sets it.",
    "OMP_NUM_THREADS": "The panel sets it.",
    "VLLM_HOST_IP": "The panel sets it.",
    "VLLM_PORT": "The panel chooses the ports; this one is vLLM's internal base, not the API's.",
    "VLLM_NO_USAGE_STATS": "The panel sets it.",
    "DO_NOT_TRACK": "The panel sets it.",
    "HF_HUB_OFFLINE": "The panel sets it where the weights are on this disk.",
    "HF_HOME": "Weights lie where RIGPANEL_MODELS_DIR says.",
    "HUGGINGFACE_HUB_CACHE": "Weights lie where RIGPANEL_MODELS_DIR says.",
    "HF_HUB_CACHE": "Weights lie where RIGPANEL_MODELS_DIR says.",
    "HF_HUB_ENABLE_HF_TRANSFER": "Downloads are jobs of the panel.",
    "PATH": "The engine's own install is used.",
    "PYTHONPATH": "The engine's own install is used.",
    "LD_LIBRARY_PATH": "The engine's own install is used.",
    "VIRTUAL_ENV": "The engine's own install is used.",
    "PYTHONUNBUFFERED": "The panel keeps the log.",
    "VLLM_ENGINE_READY_TIMEOUT_S": "The panel sets it.",
    "VLLM_CACHE_ROOT": "The panel's caches are in its data directory.",
    "VLLM_LOGGING_LEVEL": "The panel keeps the log at the level that it reads.",
    "TZ": "It changes nothing that is served.",
}


def read_environment(recipe: Recipe, env: dict[str, str]) -> int:
    """Note every variable; returns how many cards they name (0: nothing said)."""
    cards = 0
    for name, value in env.items():
        if is_secret_name(name):
            recipe.leave(
                f"{name}={HIDDEN}",
                "A secret: it was neither kept nor shown. The panel makes the engine's key itself; a token for "
                "downloads is a setting of the panel.",
            )
        elif name in CARDS:
            named = [part for part in value.split(",") if part.strip()]
            cards = 0 if value in ("all", "void", "none") else len(named)
            recipe.leave(f"{name}={value}", "The panel chooses the cards and pins them when it starts the engine.")
        elif name in OWNED:
            recipe.leave(f"{name}={value}", OWNED[name])
        elif name == "VLLM_CPU_KVCACHE_SPACE":
            recipe.device = "cpu"
            recipe.take(f"{name}={value}", "device = cpu")
            recipe.miss(
                f"{name}={value}", "A profile has no environment of its own: the size itself is not taken over."
            )
        else:
            recipe.miss(
                f"{name}={value}", "A profile has no environment of its own; the engine would start without it."
            )
    return cards
