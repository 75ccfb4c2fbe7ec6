"""Arguments of ``vllm serve`` as a profile's options."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

from apps.engines.options import normalise_name
from apps.engines.protocol import EngineKind
from apps.engines.vllm.flags import FlagKind, shipped_flags
from apps.engines.vllm.options import REMOVED, owned_reasons, shipped_model
from apps.profiles.recipes.flags import KEY_DROPPED, is_value, served_names, set_option, set_size, unknown
from apps.profiles.recipes.hidden import HIDDEN, is_secret_name
from apps.profiles.recipes.result import Recipe
from apps.profiles.recipes.yamls import DEPTH_MAX

SHORT = {
    "tp": "tensor_parallel_size",
    "pp": "pipeline_parallel_size",
    "dp": "data_parallel_size",
    "q": "quantization",
    "O": "optimization_level",
    "ep": "enable_expert_parallel",
    "ac": "attention_config",
    "cc": "compilation_config",
    "dc": "diffusion_config",
    "sc": "speculative_config",
    "asc": "api_server_count",
    "dcp": "decode_context_parallel_size",
    "pcp": "prefill_context_parallel_size",
    "dpa": "data_parallel_address",
    "dpb": "data_parallel_backend",
    "dpe": "data_parallel_external_lb",
    "dph": "data_parallel_hybrid_lb",
    "dpl": "data_parallel_size_local",
    "dpm": "data_parallel_multi_port_external_lb",
    "dpn": "data_parallel_rank",
    "dpp": "data_parallel_rpc_port",
    "dpr": "data_parallel_start_rank",
    "n": "nnodes",
    "r": "node_rank",
}
ALIASES = {"kv_cache_memory": "kv_cache_memory_bytes"}  # what vLLM's own log says to use
# vLLM reads 8k and 8K in these, and in the single keys of an object (--hf-overrides.a 8k).
IN_UNITS = frozenset(
    {
        *("max_model_len", "max_num_batched_tokens", "max_num_scheduled_tokens", "max_num_queued_tokens"),
        *("kv_cache_memory_bytes", "safetensors_prefetch_block_size"),
    }
)
UNITS = {letter: factor**power for factor, of in ((1000, "kmgt"), (1024, "KMGT")) for power, letter in enumerate(of, 1)}
WITH_UNIT = re.compile(r"(\d{1,12}(?:\.\d{1,12})?)([kmgt])|(\d{1,12})([KMGT])")
TOO_DEEP = f"It is nested more than {DEPTH_MAX} deep."
KEYS_MAX = 8  # of --hf-overrides.a.b.c
LAYOUT = {
    "tensor_parallel_size": "tensor_parallel_size",
    "pipeline_parallel_size": "pipeline_parallel_size",
    "data_parallel_size": "replicas",
}
PANEL = {
    "uvicorn_log_level": "The panel keeps the log.",
    "disable_log_stats": "The panel reads the engine's metrics.",
    "disable_uvicorn_access_log": "The panel keeps the log.",
    "download_dir": "Weights lie where RIGPANEL_MODELS_DIR says.",
}
# Switches of older releases, which today's help does not tell of.
BARE = frozenset({"disable_log_requests", "use_v2_block_manager", "enable_reasoning", "calculate_kv_scales"})


def read_vllm(recipe: Recipe, args: list[str]) -> None:
    """Arguments after ``vllm serve``."""
    recipe.engine = EngineKind.VLLM
    at = 0
    keyed: dict[str, _Keyed] = {}
    while at < len(args):
        word = args[at]
        at += 1
        if not word.startswith("-") or word == "-":
            if recipe.model:
                recipe.miss(word, "A word that belongs to no flag.")
            else:
                recipe.model = word
                recipe.take(word, "the model")
            continue
        flag, equals, inline = word.partition("=")
        if "." in flag:  # --hf-overrides.key: its value is what follows, whatever it looks like
            after = [inline] if equals else args[at : at + 1]
            at += 0 if equals else len(after)
            _key(recipe, keyed, flag, after)
            continue
        name = normalise_name(flag)
        if not flag.startswith("--"):
            if (match := re.fullmatch(r"-O(\d)", word)) is not None:
                set_option(recipe, word, "optimization_level", match[1])
                continue
            name = SHORT.get(flag.lstrip("-"), name)
        name = ALIASES.get(name, name)
        values: list[str] = [inline] if equals else []
        if not equals and not _is_bare(name):
            while at < len(args) and is_value(args[at]) and (not values or _takes_many(name)):
                values.append(args[at])
                at += 1
        _flag(recipe, flag, name, values)
    for one in keyed.values():  # for vLLM too they stand behind everything else and replace the flag itself
        for text in one.texts:
            set_option(recipe, text, one.name, one.value)


@dataclass(slots=True)
class _Keyed:
    """An object that is given key by key, and the words that did."""

    name: str
    value: dict[str, Any] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)


def _key(recipe: Recipe, keyed: dict[str, _Keyed], flag: str, values: list[str]) -> None:
    """``--hf-overrides.a.b 1`` and ``-cc.mode=3``; a + behind the last key adds to a list."""
    text = " ".join([flag, *values])
    head, *keys = flag.split(".")
    name = normalise_name(head) if head.startswith("--") else SHORT.get(head.removeprefix("-"), "")
    owned = owned_reasons(shipped_flags())
    adds = keys[-1].endswith("+")
    keys[-1] = keys[-1].removesuffix("+")
    value: Any = None
    if values:
        value = values[0].split(",") if adds else _json(values[0])
    if any(map(is_secret_name, keys)) and not isinstance(value, int | float):
        recipe.leave(f"{flag} {HIDDEN}", KEY_DROPPED)
    elif name in owned:
        recipe.leave(text, owned[name][:1].upper() + owned[name][1:] + ".")
    elif not _is_object(name) or "" in keys or len(keys) > KEYS_MAX:
        objects = tuple("--" + f.name.replace("_", "-") for f in shipped_flags().values() if f.kind is FlagKind.JSON)
        recipe.miss(text, unknown(head, objects))
    elif not values:
        recipe.miss(text, f"{flag} is missing its value.")
    elif _too_deep(values[0]):
        recipe.miss(text, TOO_DEEP)
    else:
        value = _without_secrets(recipe, value)
        for key in reversed(keys):
            value = {key: value}
        # By spelling, as vLLM does: -sc.a 1 and --speculative-config.b 2 are two objects, and the last one stays.
        one = keyed.setdefault(head.replace("_", "-"), _Keyed(name))
        _merge(one.value, value)
        one.texts.append(text)


def _merge(into: dict[str, Any], new: dict[str, Any]) -> None:
    for key, value in new.items():
        old = into.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            _merge(old, value)
        elif isinstance(value, list) and isinstance(old, list):
            into[key] = [*old, *value]
        else:
            into[key] = value


def _is_bare(name: str) -> bool:
    """Whether this flag takes no value, as far as vLLM's help tells."""
    flags = shipped_flags()
    flag = flags.get(name) or flags.get(name.removeprefix("no_"))
    return name in BARE or (flag is not None and flag.kind is FlagKind.SWITCH)


def _takes_many(name: str) -> bool:
    flag = shipped_flags().get(name)
    return name == "served_model_name" or (flag is not None and flag.kind is FlagKind.LIST)


def _is_object(name: str) -> bool:
    flag = shipped_flags().get(name)
    return flag is not None and flag.kind is FlagKind.JSON


def _flag(recipe: Recipe, flag: str, name: str, values: list[str]) -> None:
    text = " ".join([flag, *values])
    value = values[0] if values else None
    known = shipped_model().model_fields
    owned = owned_reasons(shipped_flags())
    if is_secret_name(name):
        recipe.leave(f"{flag} {HIDDEN}", KEY_DROPPED)
    elif name in LAYOUT:
        set_size(recipe, text, LAYOUT[name], value)
        if name == "data_parallel_size" and recipe.replicas > 1:
            set_option(recipe, text, "data_parallel", True)
    elif name in ("model", "model_tag"):
        recipe.model = value or ""
        recipe.take(text, "the model")
    elif name == "served_model_name":
        served_names(recipe, text, values)
    elif name in PANEL:
        recipe.leave(text, PANEL[name])
    elif name in owned:
        recipe.leave(text, owned[name][:1].upper() + owned[name][1:] + ".")
    elif name in known:
        if _is_bare(name):
            set_option(recipe, text, name, True)
        elif value is None:
            recipe.miss(text, f"{name} is missing its value.")
        elif _is_object(name) and _too_deep(value):
            recipe.miss(text, TOO_DEEP)
        else:
            set_option(recipe, text, name, values if _takes_many(name) else _typed(recipe, name, value))
    elif name.startswith("no_") and name.removeprefix("no_") in known:
        set_option(recipe, text, name.removeprefix("no_"), False)
    elif name in REMOVED:
        recipe.miss(text, REMOVED[name])
    else:
        recipe.miss(text, unknown(flag, tuple("--" + n.replace("_", "-") for n in known)))


def _typed(recipe: Recipe, name: str, value: str) -> Any:
    """JSON objects as such, and numbers with vLLM's units; the option's check then takes text for numbers."""
    if _is_object(name):
        return _without_secrets(recipe, _json(value))
    if name == "max_model_len" and (value == "-1" or value.lower() == "auto"):
        return "auto"
    return _with_unit(value) if name in IN_UNITS else value


def _json(value: str) -> Any:
    """What the text is as JSON; else a number with a unit, or the text itself."""
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return _with_unit(value)


def _too_deep(value: str) -> bool:
    depth = deepest = 0
    for char in value:
        depth += (char in "[{") - (char in "]}")
        deepest = max(deepest, depth)
    return deepest > DEPTH_MAX


def _without_secrets(recipe: Recipe, value: Any) -> Any:
    """The value without the keys in it that hold a secret, each of which is noted."""
    if isinstance(value, list):
        return [_without_secrets(recipe, one) for one in value]
    if not isinstance(value, dict):
        return value
    secret = [key for key, one in value.items() if is_secret_name(key) and isinstance(one, str)]
    for key in secret:
        recipe.leave(f"{key} {HIDDEN}", KEY_DROPPED)
    return {key: _without_secrets(recipe, one) for key, one in value.items() if key not in secret}


def _with_unit(value: str) -> int | str:
    """vLLM's own reading: 8k is 8000, 8K is 8192, and 1.5 goes with small letters only."""
    match = WITH_UNIT.fullmatch(value)
    if match is None:
        return value
    return int(match[3]) * UNITS[match[4]] if match[3] else int(float(match[1]) * UNITS[match[2]])
