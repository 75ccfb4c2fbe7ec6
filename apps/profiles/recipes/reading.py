"""A pasted text as profiles: command lines, docker run, compose, llama-swap's file, or the panel's own YAML.

Pure: nothing is run, fetched, or looked up. Every piece of the text is understood, left out with a reason, or named
as not understood; secrets are dropped where they are met.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from apps.profiles.recipes import containers
from apps.profiles.recipes.environment import read_environment
from apps.profiles.recipes.llama_flags import environment_flags, read_llama
from apps.profiles.recipes.own import is_own, read_own
from apps.profiles.recipes.result import Reading, Recipe, RecipeError, short
from apps.profiles.recipes.shell import Command, read_commands, shell_line
from apps.profiles.recipes.vllm_flags import read_vllm
from apps.profiles.recipes.yamls import load_yaml

TEXT_MAX = 64 * 1024
RECIPES_MAX = 40
SHELLS_MAX = 4  # one within another
NOT_TEXT = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
YAML_START = re.compile(r"^(?:---|#.*|\s*|[A-Za-z_\"'][\w.\"'/-]*:(?:\s.*)?)$")
KEY_LINE = re.compile(r"^[A-Za-z_\"'][\w.\"'/-]*:(?:\s|$)")
WRAPPERS = {"sudo": 0, "nohup": 0, "exec": 0, "time": 0, "command": 0, "setsid": 0, "stdbuf": 0, "env": 0, "nice": 1}
VLLM_MODULES = ("vllm.entrypoints.openai.api_server", "vllm.entrypoints.api_server")
SWAP_KEYS = frozenset({"models", "macros"})
SWAP_GLOBAL = "It belongs to llama-swap itself; switching, waiting and logs are the panel's own."
MACRO = re.compile(r"\$\{([A-Za-z0-9_-]{1,64})\}")


def read_recipe(text: str) -> Reading:
    """Everything that a pasted text says. Raises RecipeError with a sentence when it cannot be read at all."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").lstrip("\ufeff")
    if len(text) > TEXT_MAX:
        raise RecipeError(f"The text is too long: at most {TEXT_MAX // 1024} KiB.")
    if NOT_TEXT.search(text):
        raise RecipeError("This is not text: it contains control characters.")
    if not text.strip():
        raise RecipeError("There is nothing to read: paste a command line or a configuration file.")
    reading = Reading()
    if _looks_like_yaml(text):
        _read_yaml(reading, load_yaml(text))
    else:
        for command in read_commands(text):
            _read_command(reading, command)
    if len(reading.recipes) > RECIPES_MAX:
        raise RecipeError(f"The text has more than {RECIPES_MAX} models; paste fewer at once.")
    if not reading.recipes and not reading.notes:
        raise RecipeError("Only comments and assignments were found; paste the line that starts the engine.")
    return reading


def _looks_like_yaml(text: str) -> bool:
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    return bool(lines) and (lines[0].startswith(("---", "{", "%YAML")) or bool(KEY_LINE.match(lines[0])))


# -- commands -------------------------------------------------------------------------------------


def _read_command(reading: Reading, command: Command, recipe: Recipe | None = None, shells: int = 0) -> Recipe | None:
    """One command as a profile, onto ``recipe`` where one is given; ``shells`` is how many are around it."""
    argv, given = command.argv, recipe
    recipe = recipe or Recipe()
    env = dict(command.env)
    if not argv:
        if given is None:
            for name, value in env.items():
                reading.note(f"{name}={value}", "It is put in where a later line names it.")
        return None
    argv = _unwrapped(recipe, argv, env)
    if len(argv) > 1 and argv[0].rsplit("/", 1)[-1] in ("docker", "podman"):
        words = argv[2:] if argv[1] == "container" else argv[1:]
        if words[:1] == ["run"]:
            argv, more = containers.read_docker_run(recipe, words[1:])
            env |= more
            if not argv and given is None:
                reading.recipes.append(recipe) if recipe.engine else reading.notes.extend(recipe.not_understood)
                return None
            argv = _unwrapped(recipe, argv, env)
    if (line := shell_line(argv)) is not None and shells < SHELLS_MAX:
        read = _read_line(reading, Command([line[0]], env, command.unset, command.redirected), recipe, shells + 1)
        for word in line[1]:
            recipe.miss(word, "Only the line after -c is read.")
        if given is None and read is not None:
            reading.recipes.append(_named(recipe))
        elif given is None:
            reading.notes += recipe.not_understood
        return read
    kind, args = _engine_of(argv)
    if not kind:
        text = " ".join(argv)
        if given is not None:
            recipe.miss(text, "It starts neither vLLM nor llama-server.")
        else:
            reading.note(text, "It starts neither vLLM nor llama-server, so it is no profile.")
        return None
    for what in command.redirected:
        recipe.leave(what, "The panel keeps the log.")
    for what in dict.fromkeys(command.unset):
        recipe.miss(what, "Only a shell could know its value; write it out.")
    if kind == "vllm":
        read_environment(recipe, env)
        read_vllm(recipe, args)
    else:
        flags, env = environment_flags(env)
        cards = read_environment(recipe, env)
        read_llama(recipe, [*flags, *args], cards)
    if given is None:
        reading.recipes.append(_named(recipe))
    return recipe


def _read_line(reading: Reading, shell: Command, recipe: Recipe, shells: int) -> Recipe | None:
    """What a shell is given with -c. The first command of it that starts an engine is read onto the recipe; what
    follows is read as if it had been pasted alone."""
    (line,) = shell.argv
    reading.shell_characters += len(line)
    if reading.shell_characters > TEXT_MAX:
        raise RecipeError("The lines that are given to a shell become too long.")
    read = None
    unset = list(shell.unset)
    for what in shell.redirected:
        recipe.leave(what, "The panel keeps the log.")
    for command in read_commands(line, shell.env):
        if command.argv:
            command.env = {**shell.env, **command.env}
        if read is not None or not command.argv:
            _read_command(reading, command, None, shells)
            continue
        command.unset += unset
        read = _read_command(reading, command, recipe, shells)
    return read


def _unwrapped(recipe: Recipe, argv: list[str], env: dict[str, str]) -> list[str]:
    """Without what people put before the program."""
    argv = list(argv)
    for _ in range(8):
        if not argv:
            break
        program = argv[0].rsplit("/", 1)[-1]
        before = list(argv)
        if program in WRAPPERS:
            argv.pop(0)
            while argv and (argv[0].startswith("-") or (program == "env" and "=" in argv[0])):
                word = argv.pop(0)
                if "=" in word and not word.startswith("-"):
                    name, _, env[name] = word.partition("=")
                elif WRAPPERS[program] and word in ("-n", "--adjustment") and argv:
                    argv.pop(0)
        elif program == "numactl":
            argv.pop(0)
            while argv and argv[0].startswith("-"):
                argv.pop(0)
        elif program == "taskset":
            argv = argv[3:] if argv[1:2] in (["-c"], ["--cpu-list"]) else argv[2:]
        elif program in ("uv", "poetry", "pdm", "pixi") and argv[1:2] == ["run"]:
            argv = argv[2:]
        else:
            break
        said = before[: len(before) - len(argv)]
        why = "The panel binds the engine to its cards' node by itself." if program in ("numactl", "taskset") else ""
        recipe.leave(" ".join(said), why or "The panel starts the engine from its own install.")
    return argv


def _engine_of(argv: list[str]) -> tuple[str, list[str]]:
    """("vllm" | "llama", the arguments after the program), or ("", [])."""
    if not argv:
        return "", []
    program = PurePosixPath(argv[0].replace("\\", "/")).name.removesuffix(".exe")
    if program == "vllm" and argv[1:2] == ["serve"]:
        return "vllm", argv[2:]
    if re.fullmatch(r"python[\d.]*", program):
        rest = [word for word in argv[1:] if word not in ("-u", "-O", "-OO")]
        if rest[:1] == ["-m"] and rest[1:2] and rest[1] in VLLM_MODULES:
            return "vllm", rest[2:]
        if rest[:1] == ["-m"] and rest[1:3] in (["vllm", "serve"], ["vllm.entrypoints.cli.main", "serve"]):
            return "vllm", rest[3:]
    if program in ("llama-server", "llama-server-vulkan", "llama-server-cuda"):
        return "llama", argv[1:]
    return "", []


def _named(recipe: Recipe) -> Recipe:
    """A name and a slug to begin with, from what it serves."""
    base = recipe.name or recipe.served_name or PurePosixPath(recipe.model.rstrip("/")).name
    base = re.sub(r"\.gguf\Z", "", base, flags=re.I).partition(":")[0] or "profile"
    recipe.name = short(base)[:200]
    recipe.slug = recipe.slug or re.sub(r"[^a-z0-9]+", "-", base.lower()).strip("-")[:80] or "profile"
    if recipe.slug.isdecimal():
        recipe.slug = f"profile-{recipe.slug}"
    return recipe


# -- files ----------------------------------------------------------------------------------------


def _read_yaml(reading: Reading, data: Any) -> None:
    if is_own(data):
        reading.recipes.append(read_own(data))
    elif containers.is_compose(data):
        containers.other_keys(reading, data, frozenset({"services", "version", "name", "volumes", "networks"}))
        for name, service in data["services"].items():
            _read_service(reading, str(name), service)
    elif isinstance(data, Mapping) and isinstance(data.get("models"), Mapping):
        _read_llama_swap(reading, data)
    else:
        raise RecipeError(
            "This YAML is neither a compose file (services:), nor llama-swap's (models:), nor a profile that the panel "
            "exported (rigpanel_profile:)."
        )


def _read_service(reading: Reading, name: str, service: Any) -> None:
    if not isinstance(service, Mapping):
        reading.note(f"{name}: …", "This service is not described by a mapping.")
        return
    recipe = Recipe()
    (image, entrypoint, command), env = containers.compose_service(recipe, name, service)
    start, words = containers.compose_words(recipe, entrypoint), containers.compose_words(recipe, command)
    argv = containers.serving_argv(image, start.argv, words.argv)
    recipe.name = name
    whole = Command(
        argv, {**env, **start.env, **words.env}, start.unset + words.unset, start.redirected + words.redirected
    )
    if not argv or _read_command(reading, whole, recipe) is None:
        reading.note(f"{name}: {image}", "This service starts neither vLLM nor llama-server, so it is no profile.")
        return
    if image:
        containers.note_image(recipe, image, argv)
    reading.recipes.append(_named(recipe))


def _read_llama_swap(reading: Reading, data: Mapping[Any, Any]) -> None:
    macros = {str(k): str(v) for k, v in (data.get("macros") or {}).items()} if _is_map(data.get("macros")) else {}
    for key in data:
        if str(key) not in SWAP_KEYS:
            reading.note(f"{key}: …", SWAP_GLOBAL)
    for name, entry in data["models"].items():
        recipe = Recipe(name=str(name), served_name=str(name))
        recipe.take(f"{name}:", f"served name {name}")
        if not _is_map(entry) or not isinstance(entry.get("cmd"), str):
            reading.note(f"{name}: …", "This model has no cmd, so it is no profile.")
            continue
        own = {str(k): str(v) for k, v in entry["macros"].items()} if _is_map(entry.get("macros")) else {}
        known = {"PORT": "0", "MODEL_ID": str(name), **macros, **own}
        line = _uncommented(_macros(_uncommented(entry["cmd"]), known))
        commands = [c for c in read_commands(line, script=False) if c.argv]
        if not commands:
            reading.note(f"{name}: cmd", "Its cmd is empty.")
            continue
        for more in commands[1:]:
            recipe.miss(" ".join(more.argv), "Only the first command of a cmd is read.")
        commands[0].env |= containers.environment_of(entry.get("env"))
        _swap_keys(recipe, entry)
        before = recipe.served_name
        if _read_command(reading, commands[0], recipe) is not None:
            recipe.served_name = recipe.served_name or before
            reading.recipes.append(_named(recipe))
        else:
            reading.notes += recipe.not_understood


def _swap_keys(recipe: Recipe, entry: Mapping[Any, Any]) -> None:
    for key, value in entry.items():
        text = f"{key}: {value if isinstance(value, str | int | float) else '…'}"
        if key == "name" and isinstance(value, str):
            recipe.name = value
            recipe.take(text, "the profile's name")
        elif key == "description" and isinstance(value, str):
            recipe.description = short(value)
            recipe.take(text, "the description")
        elif key == "ttl":
            recipe.miss(text, "Unloading after idle is a policy of the rig, not part of a profile.")
        elif key == "aliases":
            recipe.miss(text, "A profile answers to one name; make aliases of the others.")
        elif key in ("proxy", "checkEndpoint", "cmdStop", "unlisted", "concurrencyLimit", "useModelName"):
            recipe.leave(text, "The panel's gateway knows how to reach, watch and stop its engines.")
        elif key not in ("cmd", "env", "macros"):
            recipe.miss(text, "A profile has nothing like it.")


def _uncommented(text: str) -> str:
    """Without the lines that begin with #: llama-swap takes them out before and after it puts its macros in."""
    return "\n".join(line.rstrip() for line in text.split("\n") if not line.lstrip().startswith("#"))


def _macros(text: str, known: Mapping[str, str]) -> str:
    """``${name}`` replaced, macros within macros a few levels deep; what is not known stays."""
    for _ in range(5):
        text, before = MACRO.sub(lambda m: known.get(m[1], m[0]), text), text
        if len(text) > TEXT_MAX:
            raise RecipeError("A cmd becomes too long once its macros are put in.")
        if text == before:
            break
    return text


def _is_map(value: Any) -> bool:
    return isinstance(value, Mapping)
