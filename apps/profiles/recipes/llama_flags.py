"""Arguments and variables of ``llama-server`` as a profile's options."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from apps.engines.llama_cpp.options import EXTRA_FLAGS, FLAG_OPTIONS, LlamaCppOptions
from apps.engines.protocol import EngineKind
from apps.profiles.recipes.flags import KEY_DROPPED, accepts, is_value, served_names, set_option, unknown
from apps.profiles.recipes.hidden import HIDDEN, is_secret_name
from apps.profiles.recipes.result import Recipe

MODEL = {"-m", "--model", "-hf", "-hfr", "--hf-repo", "-mu", "--model-url"}
NAME = {"-a", "--alias"}
PANEL = {  # flag: (values it takes, why the panel does not need it)
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
VARIABLES = {
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
NEGATIVE = frozenset({"--no-mmap", "--no-jinja"})
TRUE = frozenset({"1", "true", "on", "enabled"})
FALSE = frozenset({"0", "false", "off", "disabled"})
ALL_LAYERS = 99  # people write 99 or 999 for "all of them"


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
        count = _values(flag, following)
        values = inline or args[at : at + count]
        at += 0 if inline else len(values)
        _flag(recipe, flag, values, count)
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


def _values(flag: str, following: str | None) -> int:
    """How many of the next words belong to this flag."""
    if flag in ("-fa", "--flash-attn"):  # older builds: a switch
        return 1 if following is not None and following.lower() in ON_OFF else 0
    if flag in PANEL:
        return PANEL[flag][0]
    extra = SHORT_EXTRA.get(flag, flag)
    if flag != "--mlock" and extra in EXTRA_FLAGS:
        return EXTRA_FLAGS[extra]
    if FLAG_OPTIONS.get(flag) == "embeddings" or flag in ("--mlock", *NEGATIVE):
        return 0
    return 1 if flag.startswith("-") and is_value(following) else 0


def _flag(recipe: Recipe, flag: str, values: list[str], count: int) -> None:
    text = " ".join([flag, *values])
    value = values[0] if values else None
    if not flag.startswith("-"):
        recipe.miss(text, "A word that belongs to no flag.")
    elif flag in PANEL or is_secret_name(flag):
        why = PANEL.get(flag, (1, KEY_DROPPED))[1]
        recipe.leave(f"{flag} {HIDDEN}" if why == KEY_DROPPED else text, why)
    elif len(values) < count or (value is None and flag in (MODEL | NAME)):
        recipe.miss(text, f"{flag} is missing its value.")
    elif flag in MODEL:
        recipe.model = str(value)
        recipe.take(text, "the model")
    elif flag in NAME:
        served_names(recipe, text, [part for part in str(value).split(",") if part])
    elif flag in FLAG_OPTIONS:
        _option(recipe, text, FLAG_OPTIONS[flag], value)
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
        recipe.miss(text, unknown(flag, known))


def _option(recipe: Recipe, text: str, name: str, value: str | None) -> None:
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
    set_option(recipe, text, name, typed)


def _extra(recipe: Recipe, text: str, arguments: list[str]) -> None:
    together = [*recipe.options.get("extra_args", []), *arguments]
    normal, why = accepts(recipe.engine, "extra_args", together)
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
        flag = VARIABLES.get(name_of, "--" + name_of.lower().replace("_", "-"))
        negative = f"--no-{flag.removeprefix('--')}"
        known = negative in NEGATIVE or negative in PANEL or negative in EXTRA_FLAGS
        if known and value in FALSE:
            flags.append(negative)
        elif _values(flag, value) != 0:
            flags += [flag, value]
        elif value.lower() in TRUE:
            flags.append(flag)
        else:
            rest[name] = value
    return flags, rest


assert set(FLAG_OPTIONS.values()) <= set(LlamaCppOptions.model_fields)  # noqa: S101 - two tables of one thing
