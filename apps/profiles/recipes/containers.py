"""``docker run`` and compose: what is served in a container, as a profile of the panel, which uses none."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from apps.profiles.recipes.result import Reading, Recipe
from apps.profiles.recipes.shell import ASSIGNMENT, Command, read_commands, shell_line

# docker run's flags that take a value, as ``docker run --help`` lists them; the others are switches. The last line
# holds their older names.
WITH_VALUE = frozenset(
    {
        *("-a", "-c", "-e", "-h", "-l", "-m", "-p", "-u", "-v", "-w", "--add-host", "--annotation", "--attach"),
        *("--blkio-weight", "--blkio-weight-device", "--cap-add", "--cap-drop", "--cgroup-parent", "--cgroupns"),
        *("--cidfile", "--cpu-count", "--cpu-percent", "--cpu-period", "--cpu-quota", "--cpu-rt-period"),
        *("--cpu-rt-runtime", "--cpu-shares", "--cpus", "--cpuset-cpus", "--cpuset-mems", "--detach-keys", "--device"),
        *("--device-cgroup-rule", "--device-read-bps", "--device-read-iops", "--device-write-bps"),
        *("--device-write-iops", "--dns", "--dns-option", "--dns-search", "--domainname", "--entrypoint", "--env"),
        *("--env-file", "--expose", "--gpus", "--group-add", "--health-cmd", "--health-interval", "--health-retries"),
        *("--health-start-interval", "--health-start-period", "--health-timeout", "--hostname", "--io-maxbandwidth"),
        *("--io-maxiops", "--ip", "--ip6", "--ipc", "--isolation", "--kernel-memory", "--label", "--label-file"),
        *("--link", "--link-local-ip", "--log-driver", "--log-opt", "--mac-address", "--memory", "--mount", "--name"),
        *("--memory-reservation", "--memory-swap", "--memory-swappiness", "--network", "--network-alias"),
        *("--oom-score-adj", "--pid", "--pids-limit", "--platform", "--publish", "--pull", "--restart", "--runtime"),
        *("--security-opt", "--shm-size", "--stop-signal", "--stop-timeout", "--storage-opt", "--sysctl", "--tmpfs"),
        *("--ulimit", "--user", "--userns", "--uts", "--volume", "--volume-driver", "--volumes-from", "--workdir"),
        *("--dns-opt", "--net", "--net-alias"),
    }
)
WHY = {
    "--gpus": "The panel chooses the cards and pins them when it starts the engine.",
    "--device": "The panel chooses the cards and pins them when it starts the engine.",
    "--runtime": "The panel starts engines without containers.",
    "-p": "The panel chooses a free port.",
    "--publish": "The panel chooses a free port.",
    "-v": "The panel starts engines without containers; weights lie where RIGPANEL_MODELS_DIR says.",
    "--volume": "The panel starts engines without containers; weights lie where RIGPANEL_MODELS_DIR says.",
    "--mount": "The panel starts engines without containers; weights lie where RIGPANEL_MODELS_DIR says.",
    "--restart": "Starting again is the panel's to arrange.",
    "--env-file": "Files are not read; paste what matters of it.",
}
DOLLAR = "\x00"  # pasted text has none
NO_CONTAINER = "The panel starts engines without containers."
IMAGES = (
    (re.compile(r"(?:^|/)vllm-(?:openai|cpu)[\w-]*(?=[:@]|$)|(?:^|/)vllm/vllm"), ("vllm", "serve")),
    (re.compile(r"(?:^|/)llama\.cpp[\w-]*(?::[\w.-]*server[\w.-]*)?(?=[:@]|$)"), ("llama-server",)),
)
COMPOSE_PANEL = {
    "ports": "The panel chooses a free port.",
    "expose": "The panel chooses a free port.",
    "volumes": WHY["-v"],
    "deploy": WHY["--gpus"],
    "devices": WHY["--gpus"],
    "gpus": WHY["--gpus"],
    "runtime": NO_CONTAINER,
    "restart": WHY["--restart"],
    "healthcheck": "The panel watches the engine's health by itself.",
    "env_file": WHY["--env-file"],
    "depends_on": "The panel starts what a profile needs.",
}
NO_MEANING = ("shm_size", "ipc", "networks", "network_mode", "container_name", "ulimits", "labels", "logging", "user")


def serving_argv(image: str, entrypoint: list[str], command: list[str]) -> list[str]:
    """What the container runs, as if it were typed; empty for an image that serves no model we know."""
    if entrypoint:
        return [*entrypoint, *command]
    if command and (command[0] in ("vllm", "llama-server", "python", "python3") or shell_line(command)):
        return command
    for pattern, program in IMAGES:
        if pattern.search(image):
            return [*program, *command]
    return []


def read_docker_run(recipe: Recipe, args: list[str]) -> tuple[list[str], dict[str, str]]:
    """(argv, environment) of ``docker run``'s arguments; its own flags are noted on the recipe."""
    env: dict[str, str] = {}
    entrypoint: list[str] = []
    at = 0
    while at < len(args) and args[at].startswith("-"):
        flag, equals, value = args[at].partition("=")
        if not flag.startswith("--") and len(args[at]) > 2:
            switches, flag, equals, value = _cluster(args[at])
            for switch in switches:
                recipe.leave(switch, NO_CONTAINER)
        at += 1
        if not equals and flag in WITH_VALUE:
            value, at = (args[at] if at < len(args) else ""), at + 1
        if not flag:
            continue
        if flag in ("-e", "--env"):
            match = ASSIGNMENT.match(value)
            env[match[1] if match else value] = match[2] if match else ""
        elif flag == "--entrypoint":
            entrypoint = [value] if value else []
        else:
            recipe.leave(f"{flag} {value}".strip(), WHY.get(flag, NO_CONTAINER))
            if flag == "--gpus" and (match := re.search(r"device=([\d,]+)", value)):
                env.setdefault("CUDA_VISIBLE_DEVICES", match[1])
    if at >= len(args):
        return [], env
    image = args[at]
    argv = serving_argv(image, entrypoint, args[at + 1 :])
    if argv:
        note_image(recipe, image, argv)
    else:
        recipe.miss(image, "This image is neither vLLM's nor llama.cpp's server.")
    return argv, env


def _cluster(word: str) -> tuple[list[str], str, str, str]:
    """``-dp 80:80``, ``-it``, ``-eA=1``: the switches, then the flag with a value ("" where there is none), "=" if its
    value stands in the same word, and that value."""
    letters = [f"-{letter}" for letter in word[1:]]
    first = next((n for n, letter in enumerate(letters) if letter in WITH_VALUE), None)
    if first is None:
        return [word], "", "", ""
    value = word[first + 2 :]
    return letters[:first], letters[first], "=" if value else "", value.removeprefix("=")


def note_image(recipe: Recipe, image: str, argv: list[str]) -> None:
    if shell_line(argv):
        recipe.leave(image, NO_CONTAINER)
    else:
        recipe.take(image, f"the engine {argv[0]}")


def is_compose(data: Any) -> bool:
    return isinstance(data, Mapping) and isinstance(data.get("services"), Mapping)


def compose_service(recipe: Recipe, name: str, service: Mapping[Any, Any]) -> tuple[Any, dict[str, str]]:
    """(image, entrypoint, command) and environment of one service; every other key is noted."""
    for key, value in service.items():
        if key in ("image", "command", "entrypoint", "environment"):
            continue
        text = f"{key}: {value if isinstance(value, str | int | float) else '…'}"
        if key in COMPOSE_PANEL:
            recipe.leave(text, COMPOSE_PANEL[key])
        elif key in NO_MEANING:
            recipe.leave(text, NO_CONTAINER)
        else:
            recipe.miss(text, f"The service {name} sets it; a profile has nothing like it.")
    return (
        (str(service.get("image", "")), service.get("entrypoint"), service.get("command")),
        environment_of(service.get("environment")),
    )


def compose_words(recipe: Recipe, value: Any) -> Command:
    """A ``command`` or ``entrypoint`` as compose takes it: a list, or a line that no shell sees."""
    if isinstance(value, list):
        for part in value:
            if isinstance(part, Mapping | list):
                recipe.miss(str(part), "A word of a command cannot be a list or a mapping.")
        return Command([str(part).replace("$$", "$") for part in value if not isinstance(part, Mapping | list)])
    if not isinstance(value, str):
        return Command()
    # $$ is compose's way to write a dollar sign; until the words are cut it must not look like a variable.
    commands = read_commands(value.replace("$$", DOLLAR), script=False)
    first = next((command for command in commands if command.argv), Command())
    for command in commands:
        command.argv = [word.replace(DOLLAR, "$") for word in command.argv]
        if command is not first:
            text = " ".join([*command.argv, *(f"{n}={v}" for n, v in command.env.items() if not command.argv)])
            recipe.miss(text, "Compose starts one program; what follows it would need a shell.")
    return first


def environment_of(value: Any) -> dict[str, str]:
    """A mapping, or a list of ``NAME=value``; what is neither is no environment."""
    if isinstance(value, Mapping):
        return {str(k): "" if v is None else str(v) for k, v in value.items()}
    if isinstance(value, list):
        pairs = (str(item).partition("=") for item in value)
        return {name: text for name, _, text in pairs}
    return {}


def other_keys(reading: Reading, data: Mapping[Any, Any], known: frozenset[str]) -> None:
    for key in data:
        if str(key) not in known and not str(key).startswith("x-"):
            reading.note(f"{key}: …", "It belongs to no profile.")
