"""Flags of the engines, turned into a profile's options one by one; each is accounted for."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from apps.engines.llama_cpp.options import EXTRA_FLAGS, FLAG_OPTIONS, LlamaCppOptions
from apps.engines.options import nearest, normalise_name
from apps.engines.protocol import EngineKind, InvalidOptions
from apps.engines.registry import adapter
from apps.engines.vllm.flags import FlagKind, shipped_flags
from apps.engines.vllm.options import REMOVED, owned_reasons, shipped_model
from apps.profiles.recipes.hidden import HIDDEN, is_secret_name
from apps.profiles.recipes.result import Recipe

NUMBER = re.compile(r"-\d")
KEY_DROPPED = "A secret: it was neither kept nor shown; the panel makes a key of its own for every launch."
VLLM_SHORT = {
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
VLLM_ALIASES = {"kv_cache_memory": "kv_cache_memory_bytes"}  # what vLLM's own log says to use
# vLLM reads 8k and 8K in these, and in the single keys of an object (--hf-overrides.a 8k).
VLLM_UNITS = frozenset(
    {
        *("max_model_len", "max_num_batched_tokens", "max_num_scheduled_tokens", "max_num_queued_tokens"),
        *("kv_cache_memory_bytes", "safetensors_prefetch_block_size"),
    }
)
UNITS = {letter: factor**power for factor, of in ((1000, "kmgt"), (1024, "KMGT")) for power, letter in enumerate(of, 1)}
WITH_UNIT = re.compile(r"(\d{1,12}(?:\.\d{1,12})?)([kmgt])|(\d{1,12})([KMGT])")
KEYS_MAX = 8  # of --hf-overrides.a.b.c
LAYOUT = {
    "tensor_parallel_size": "tensor_parallel_size",
    "pipeline_parallel_size": "pipeline_parallel_size",
    "data_parallel_size": "replicas",
}
VLLM_PANEL = {
    "uvicorn_log_level": "The panel keeps the log.",
    "disable_log_stats": "The panel reads the engine's metrics.",
    "disable_uvicorn_access_log": "The panel keeps the log.",
    "download_dir": "Weights lie where RIGPANEL_MODELS_DIR says.",
}
# Switches of older releases, which today's help does not tell of.
VLLM_BARE = frozenset({"disable_log_requests", "use_v2_block_manager", "enable_reasoning", "calculate_kv_scales"})
LLAMA_MODEL = {"-m", "--model", "-hf", "-hfr", "--hf-repo", "-mu", "--model-url"}
LLAMA_NAME = {"-a", "--alias"}
LLAMA_PANEL = {  # flag: (values it takes, why the panel does not need it)
    "--host": (1, "The panel chooses the address."),
    "--port": (1, "The panel chooses a free port."),
    "--api-key": (1, KEY_DROPPED),
    "--api-key-file": (1, "The panel makes a key of its own for every launch."),
    "--hf-token": (1, KEY_DROPPED),
    "-hft": (1, KEY_DROPPED),
    "-hff": (1, "The catalogue's checkpoint names the file."),
    "--hf-file": (1, "The catalogue's checkpoint names the file."),
    "--metrics": (0, "The panel switches it on."),
    "--slots": (0, "It is on by default."),
    "--no-slots": (0, "The panel reads the engine's metrics."),
    "--props": (0, "Requests come through the panel's gateway."),
    "--jinja": (0, "It is on by default where the template is Jinja."),
    "--ui": (0, "The panel switches llama.cpp's own page off."),
    "--webui": (0, "The panel switches llama.cpp's own page off."),
    "--no-webui": (0, "The panel switches it off by itself."),
    "--no-ui": (0, "The panel switches it off by itself."),
    "--offline": (0, "The panel starts from files on this disk."),
    "-cb": (0, "It is on by default."),
    "--cont-batching": (0, "It is on by default."),
    "-kvo": (0, "It is on by default."),
    "--kv-offload": (0, "It is on by default."),
    "--mmap": (0, "It is on by default."),
    "--warmup": (0, "It is on by default."),
    "--log-file": (1, "The panel keeps the log."),
    "--log-disable": (0, "The panel keeps the log."),
    "-v": (0, "The panel keeps the log at the level that it reads."),
    "--verbose": (0, "The panel keeps the log at the level that it reads."),
    "--log-verbose": (0, "The panel keeps the log at the level that it reads."),
    "--log-verbosity": (1, "The panel keeps the log at the level that it reads."),
    "-lv": (1, "The panel keeps the log at the level that it reads."),
    "--verbosity": (1, "The panel keeps the log at the level that it reads."),
    "-to": (1, "Requests come through the panel's gateway."),
    "--timeout": (1, "Requests come through the panel's gateway."),
    "--api-prefix": (1, "Requests come through the panel's gateway."),
    "--ssl-key-file": (1, "Requests come through the panel's gateway."),
    "--ssl-cert-file": (1, "Requests come through the panel's gateway."),
    "--device": (1, "The panel chooses the cards and pins them when it starts the engine."),
    "-dev": (1, "The panel chooses the cards and pins them when it starts the engine."),
    "--slot-save-path": (1, "The panel gives the engine no folder to write to."),
}
ON_OFF = {"on": "on", "off": "off", "auto": "auto", "1": "on", "0": "off", "true": "on", "false": "off"}
SHORT_EXTRA = {
    "--mlock": "--load-mode",
    "-cmoe": "--cpu-moe",
    "-cram": "--cache-ram",
    "-fit": "--fit",
    "-fitc": "--fit-ctx",
    "-fitt": "--fit-target",
    "-kvu": "--kv-unified",
    "-lm": "--load-mode",
    "-mm": "--mmproj",
    "-ncmoe": "--n-cpu-moe",
    "-nkvo": "--no-kv-offload",
    "-ot": "--override-tensor",
    "-s": "--seed",
    "--temperature": "--temp",
}
# LLAMA_ARG_... whose flag has another name; both stand in llama-server's help.
LLAMA_VARIABLES = {
    "BATCH": "--batch-size",
    "ENDPOINT_METRICS": "--metrics",
    "ENDPOINT_PROPS": "--props",
    "ENDPOINT_SLOTS": "--slots",
    "LOG_VERBOSITY": "--verbosity",
    "N_PARALLEL": "--parallel",
    "ROPE_SCALING_TYPE": "--rope-scaling",
    "THINK": "--reasoning-format",
    "THINK_BUDGET": "--reasoning-budget",
    "UBATCH": "--ubatch-size",
    "UI": "--webui",
}
LLAMA_NEGATIVE = frozenset({"--no-mmap", "--no-jinja"})
TRUE = frozenset({"1", "true", "on", "enabled"})
FALSE = frozenset({"0", "false", "off", "disabled"})
ALL_LAYERS = 99  # people write 99 or 999 for "all of them"


def _accepts(engine: str, name: str, value: Any) -> tuple[Any, str]:
    """(the value in its normal form, "") or (None, the sentence why not)."""
    try:
        return adapter(engine).check({name: value}).get(name), ""
    except InvalidOptions as error:
        return None, error.errors[0].message


def _set(recipe: Recipe, text: str, name: str, value: Any) -> None:
    normal, why = _accepts(recipe.engine, name, value)
    if why:
        recipe.miss(text, f"{name}: {why}")
        return
    before = recipe.options.get(name)
    recipe.options[name] = normal
    shown = normal if isinstance(normal, str) else json.dumps(normal)
    recipe.take(text, f"{name} = {shown}" + (" (the last of several)" if before not in (None, normal) else ""))


def _is_value(word: str | None) -> bool:
    return word is not None and (not word.startswith("-") or bool(NUMBER.match(word)) or word == "-")


def _whole(recipe: Recipe, text: str, field: str, value: str | None) -> None:
    if value is not None and value.isdecimal() and 1 <= int(value[:6]) <= 64 and len(value) <= 3:
        setattr(recipe, field, int(value))
        recipe.take(text, f"{field} = {int(value)}")
    else:
        recipe.miss(text, f"{field}: use a whole number from 1 to 64.")


# -- vLLM -----------------------------------------------------------------------------------------


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
            _vllm_key(recipe, keyed, flag, after)
            continue
        name = normalise_name(flag)
        if not flag.startswith("--"):
            if (match := re.fullmatch(r"-O(\d)", word)) is not None:
                _set(recipe, word, "optimization_level", match[1])
                continue
            name = VLLM_SHORT.get(flag.lstrip("-"), name)
        name = VLLM_ALIASES.get(name, name)
        values: list[str] = [inline] if equals else []
        if not equals and not _is_bare(name):
            while at < len(args) and _is_value(args[at]) and (not values or _takes_many(name)):
                values.append(args[at])
                at += 1
        _vllm_flag(recipe, flag, name, values)
    for one in keyed.values():  # for vLLM too they stand behind everything else and replace the flag itself
        for text in one.texts:
            _set(recipe, text, one.name, one.value)


@dataclass(slots=True)
class _Keyed:
    """An object that is given key by key, and the words that did."""

    name: str
    value: dict[str, Any] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)


def _vllm_key(recipe: Recipe, keyed: dict[str, _Keyed], flag: str, values: list[str]) -> None:
    """``--hf-overrides.a.b 1`` and ``-cc.mode=3``; a + behind the last key adds to a list."""
    text = " ".join([flag, *values])
    head, *keys = flag.split(".")
    name = normalise_name(head) if head.startswith("--") else VLLM_SHORT.get(head.removeprefix("-"), "")
    known = shipped_flags().get(name)
    owned = owned_reasons(shipped_flags())
    adds = keys[-1].endswith("+")
    keys[-1] = keys[-1].removesuffix("+")
    if any(map(is_secret_name, keys)):
        recipe.leave(f"{flag} {HIDDEN}", KEY_DROPPED)
    elif name in owned:
        recipe.leave(text, owned[name][:1].upper() + owned[name][1:] + ".")
    elif known is None or known.kind is not FlagKind.JSON or "" in keys or len(keys) > KEYS_MAX:
        objects = tuple("--" + f.name.replace("_", "-") for f in shipped_flags().values() if f.kind is FlagKind.JSON)
        recipe.miss(text, _unknown(head, objects))
    elif not values:
        recipe.miss(text, f"{flag} is missing its value.")
    else:
        value: Any = values[0].split(",") if adds else _json(values[0])
        for key in reversed(keys):
            value = {key: value}
        # By the flag's spelling, as vLLM does: -sc.a 1 and --speculative-config.b 2 are two objects, the last one stays.
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
    return name in VLLM_BARE or (flag is not None and flag.kind is FlagKind.SWITCH)


def _takes_many(name: str) -> bool:
    flag = shipped_flags().get(name)
    return name == "served_model_name" or (flag is not None and flag.kind is FlagKind.LIST)


def _vllm_flag(recipe: Recipe, flag: str, name: str, values: list[str]) -> None:
    text = " ".join([flag, *values])
    value = values[0] if values else None
    known = shipped_model().model_fields
    owned = owned_reasons(shipped_flags())
    if is_secret_name(name):
        recipe.leave(f"{flag} {HIDDEN}", KEY_DROPPED)
    elif name in LAYOUT:
        _whole(recipe, text, LAYOUT[name], value)
        if name == "data_parallel_size" and recipe.replicas > 1:
            _set(recipe, text, "data_parallel", True)
    elif name in ("model", "model_tag"):
        recipe.model = value or ""
        recipe.take(text, "the model")
    elif name == "served_model_name":
        _served_names(recipe, text, values)
    elif name in VLLM_PANEL:
        recipe.leave(text, VLLM_PANEL[name])
    elif name in owned:
        recipe.leave(text, owned[name][:1].upper() + owned[name][1:] + ".")
    elif name in known:
        if _is_bare(name):
            _set(recipe, text, name, True)
        elif value is None:
            recipe.miss(text, f"{name} is missing its value.")
        else:
            _set(recipe, text, name, values if _takes_many(name) else _typed(name, value))
    elif name.startswith("no_") and name.removeprefix("no_") in known:
        _set(recipe, text, name.removeprefix("no_"), False)
    elif name in REMOVED:
        recipe.miss(text, REMOVED[name])
    else:
        recipe.miss(text, _unknown(flag, tuple("--" + n.replace("_", "-") for n in known)))


def _typed(name: str, value: str) -> Any:
    """JSON objects as such, and numbers with vLLM's units; the option's check then takes text for numbers."""
    flag = shipped_flags().get(name)
    if flag is not None and flag.kind is FlagKind.JSON:
        return _json(value)
    if name == "max_model_len" and (value == "-1" or value.lower() == "auto"):
        return "auto"
    return _with_unit(value) if name in VLLM_UNITS else value


def _json(value: str) -> Any:
    """What the text is as JSON; else a number with a unit, or the text itself."""
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return _with_unit(value)


def _with_unit(value: str) -> int | str:
    """vLLM's own reading: 8k is 8000, 8K is 8192, and 1.5 goes with small letters only."""
    match = WITH_UNIT.fullmatch(value)
    if match is None:
        return value
    return int(match[3]) * UNITS[match[4]] if match[3] else int(float(match[1]) * UNITS[match[2]])


def _served_names(recipe: Recipe, text: str, values: list[str]) -> None:
    if not values:
        recipe.miss(text, "The name is missing.")
        return
    recipe.served_name = values[0]
    recipe.take(f"--served-model-name {values[0]}", f"served name {values[0]}")
    if len(values) > 1:
        recipe.miss(" ".join(values[1:]), "A profile answers to one name; make aliases of the others.")


def _unknown(flag: str, known: tuple[str, ...]) -> str:
    similar = nearest(flag, known)
    return f"A profile has no such option{f'; the nearest is {similar}' if similar else ''}."


# -- llama.cpp ------------------------------------------------------------------------------------


def read_llama(recipe: Recipe, args: list[str], cards: int = 0) -> None:
    """Arguments after ``llama-server``; ``cards`` is how many the environment named."""
    recipe.engine = EngineKind.LLAMA_CPP
    at = 0
    while at < len(args):
        flag = args[at]
        at += 1
        inline: list[str] = []
        if flag.startswith("--"):  # llama-server takes --ctx_size too
            flag, equals, value = flag.partition("=")
            flag, inline = flag.replace("_", "-"), [value] if equals else []
        following = args[at] if at < len(args) else None
        count = _llama_values(flag, following)
        values = inline or args[at : at + count]
        at += 0 if inline else len(values)
        _llama_flag(recipe, flag, values, count)
    shares = recipe.options.get("tensor_split")
    wanted = len(shares) if shares else cards
    if recipe.device == "gpu" and wanted > 1:
        recipe.tensor_parallel_size = min(wanted, 64)
        recipe.take(
            "--tensor-split" if shares else "visible cards",
            f"tensor_parallel_size = {recipe.tensor_parallel_size}: one share for each card",
        )
    elif recipe.device == "cpu":
        for name in ("gpu_layers", "split_mode", "tensor_split", "main_gpu"):
            recipe.options.pop(name, None)


def _llama_values(flag: str, following: str | None) -> int:
    """How many of the next words belong to this flag."""
    if flag in ("-fa", "--flash-attn"):  # older builds: a switch
        return 1 if following is not None and following.lower() in ON_OFF else 0
    if flag in LLAMA_PANEL:
        return LLAMA_PANEL[flag][0]
    extra = SHORT_EXTRA.get(flag, flag)
    if flag != "--mlock" and extra in EXTRA_FLAGS:
        return EXTRA_FLAGS[extra]
    if FLAG_OPTIONS.get(flag) == "embeddings" or flag in ("--mlock", *LLAMA_NEGATIVE):
        return 0
    return 1 if flag.startswith("-") and _is_value(following) else 0


def _llama_flag(recipe: Recipe, flag: str, values: list[str], count: int) -> None:
    text = " ".join([flag, *values])
    value = values[0] if values else None
    if not flag.startswith("-"):
        recipe.miss(text, "A word that belongs to no flag.")
    elif flag in LLAMA_PANEL or is_secret_name(flag):
        why = LLAMA_PANEL.get(flag, (1, KEY_DROPPED))[1]
        recipe.leave(f"{flag} {HIDDEN}" if why == KEY_DROPPED else text, why)
    elif len(values) < count or (value is None and flag in (LLAMA_MODEL | LLAMA_NAME)):
        recipe.miss(text, f"{flag} is missing its value.")
    elif flag in LLAMA_MODEL:
        recipe.model = str(value)
        recipe.take(text, "the model")
    elif flag in LLAMA_NAME:
        _served_names(recipe, text, [part for part in str(value).split(",") if part])
    elif flag in FLAG_OPTIONS:
        _llama_option(recipe, text, FLAG_OPTIONS[flag], value)
    elif flag == "--mlock":
        _extra(recipe, text, ["--load-mode", "mlock"])
    elif flag == "--no-mmap":
        _extra(recipe, text, ["--load-mode", "none"])
    elif SHORT_EXTRA.get(flag, flag) in EXTRA_FLAGS:
        _extra(recipe, text, [SHORT_EXTRA.get(flag, flag), *values])
    elif flag == "--no-jinja":
        recipe.leave(text, "The panel sets it where the template is one of llama.cpp's names.")
    else:
        known = tuple(f for f in (*FLAG_OPTIONS, *EXTRA_FLAGS) if f.startswith("--"))
        recipe.miss(text, _unknown(flag, known))


def _llama_option(recipe: Recipe, text: str, name: str, value: str | None) -> None:
    typed: Any = value
    if name == "embeddings":
        typed = True
    elif name == "flash_attention":
        typed = ON_OFF.get((value or "on").lower(), value)
    elif value is None:
        recipe.miss(text, f"{name} is missing its value.")
        return
    elif name == "tensor_split":
        typed = [part for part in re.split(r"[,/]", value) if part]
    elif name == "gpu_layers" and value.lstrip("-").isdecimal():
        layers = int(value[:6])
        typed = "auto" if layers == -1 else "all" if layers >= ALL_LAYERS or layers < -1 else layers
        if layers == 0:
            recipe.device = "cpu"
            recipe.take(text, "device = cpu")
            return
    elif name == "parallel" and value == "-1":
        recipe.leave(text, "It is the engine's own choice without it.")
        return
    _set(recipe, text, name, typed)


def _extra(recipe: Recipe, text: str, arguments: list[str]) -> None:
    together = [*recipe.options.get("extra_args", []), *arguments]
    normal, why = _accepts(recipe.engine, "extra_args", together)
    if why:
        recipe.miss(text, why)
    else:
        recipe.options["extra_args"] = normal
        recipe.take(text, f"extra_args: {' '.join(arguments)}")


def environment_flags(env: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """llama.cpp's ``LLAMA_ARG_CTX_SIZE=4096`` as flags, and the variables that are none."""
    flags: list[str] = []
    rest = {}
    for name, value in env.items():
        if not name.startswith("LLAMA_ARG_") or is_secret_name(name):
            rest[name] = value
            continue
        name_of = name.removeprefix("LLAMA_ARG_")
        flag = LLAMA_VARIABLES.get(name_of, "--" + name_of.lower().replace("_", "-"))
        negative = f"--no-{flag.removeprefix('--')}"
        known = negative in LLAMA_NEGATIVE or negative in LLAMA_PANEL or negative in EXTRA_FLAGS
        if known and value in FALSE:
            flags.append(negative)
        elif _llama_values(flag, value) != 0:
            flags += [flag, value]
        elif value.lower() in TRUE:
            flags.append(flag)
        else:
            rest[name] = value
    return flags, rest


assert set(FLAG_OPTIONS.values()) <= set(LlamaCppOptions.model_fields)  # noqa: S101 - two tables of one thing
