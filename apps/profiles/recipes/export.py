"""A profile for use without the panel: as a command line, a systemd unit, a compose service, or YAML to read back."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Any

import yaml

from apps.common.errors import Invalid, NotFound
from apps.engines.protocol import EngineKind, EngineLaunch
from apps.profiles.models import Profile, ProfileVersion
from apps.profiles.preview import previewed_launches, rig_facts
from apps.profiles.recipes.mounts import contained
from apps.profiles.recipes.own import write_own
from apps.rigs.models import Rig

IMAGES = {EngineKind.VLLM: "vllm/vllm-openai:latest", EngineKind.LLAMA_CPP: "ghcr.io/ggml-org/llama.cpp:server-cuda"}
KEY_NAMES = {EngineKind.VLLM: "VLLM_API_KEY", EngineKind.LLAMA_CPP: "LLAMA_API_KEY"}
SUFFIX = {"command": "sh", "systemd": "service", "compose": "compose.yaml", "yaml": "yaml"}


def export(profile: Profile, rig: Rig, form: str) -> tuple[str, str]:
    """(file name, text). Raises NotFound for an unknown form, Invalid where the profile has no such form.

    No key is in it: what an engine started this way should ask for comes from its environment."""
    version = profile.current
    if form == "yaml":
        return f"{profile.slug}.yaml", write_own(own_fields(profile, version))
    if form not in FORMS:
        raise NotFound(f"There is no export as {form[:40]!r}; there is: {', '.join([*FORMS, 'yaml'])}.")
    if version.engine not in KEY_NAMES:
        raise Invalid(
            f"{version.get_engine_display()} is started by the panel in several steps and has no form as {form}; "
            "export it as yaml."
        )
    launches = previewed_launches(version, rig, rig_facts(rig))
    return f"{profile.slug}.{SUFFIX[form]}", FORMS[form](profile, version, launches)


def own_fields(profile: Profile, version: ProfileVersion) -> dict[str, Any]:
    return {
        "slug": profile.slug,
        "name": profile.name,
        "model": version.model.slug,
        "engine": str(version.engine),
        "device": str(version.device),
        "replicas": version.replicas,
        "tensor_parallel_size": version.tensor_parallel_size,
        "pipeline_parallel_size": version.pipeline_parallel_size,
        "served_name": version.served_name,
        "members_may_switch": profile.members_may_switch,
        "description": profile.description,
        "options": version.options,
        "power_limit_watts": version.power_limit_watts,
        "engine_version": version.engine_version,
    }


def _about(profile: Profile, version: ProfileVersion) -> str:
    name = " ".join(profile.name.split())
    key = KEY_NAMES[EngineKind(version.engine)]
    return f"# {name}, version {version.number}, {version.layout}; clients need a key only if {key} is set\n"


def as_command(profile: Profile, version: ProfileVersion, launches: tuple[EngineLaunch, ...]) -> str:
    lines = ["#!/bin/sh\n", _about(profile, version)]
    for launch in launches:
        words = [f"{name}={shlex.quote(value)}" for name, value in sorted(launch.env.items())]
        background = " &" if len(launches) > 1 else ""
        lines.append(" \\\n".join([*words, _folded(launch.argv, shlex.quote)]) + background + "\n")
    if len(launches) > 1:
        lines.append("wait\n")
    return "".join(lines)


def as_systemd(profile: Profile, version: ProfileVersion, launches: tuple[EngineLaunch, ...]) -> str:
    units = []
    for launch in launches:
        number = f" (replica {launch.replica})" if len(launches) > 1 else ""
        file = f"# /etc/systemd/system/{profile.slug}{f'-{launch.replica}' if number else ''}.service\n"
        environment = "".join(f"Environment={_unit_word(f'{k}={v}')}\n" for k, v in sorted(launch.env.items()))
        units.append(
            f"{file}{_about(profile, version)}[Unit]\nDescription={_unit_text(profile.name)}{number}\n"
            "After=network-online.target\nWants=network-online.target\n\n[Service]\n"
            f"{environment}EnvironmentFile=-/etc/{profile.slug}.env\n"
            f"ExecStart={_folded(launch.argv, _unit_word)}\n"
            "Restart=on-failure\nRestartSec=10\nTimeoutStopSec=40\n\n[Install]\nWantedBy=multi-user.target\n"
        )
    return "\n".join(units)


def as_compose(profile: Profile, version: ProfileVersion, launches: tuple[EngineLaunch, ...]) -> str:
    engine = EngineKind(version.engine)
    services: dict[str, Any] = {}
    for launch in launches:
        argv, mounts = contained(_arguments(launch.argv))
        port = argv[argv.index("--port") + 1]
        argv[argv.index("--host") + 1] = "0.0.0.0"  # noqa: S104 - inside the container; only loopback is published
        cards = [c for c in launch.env.get("CUDA_VISIBLE_DEVICES", "").split(",") if c]
        service: dict[str, Any] = {
            "image": IMAGES[engine] if cards else IMAGES[engine].replace("server-cuda", "server"),
            "command": [_dollars(part) for part in argv],
            "environment": {
                **{k: _dollars(v) for k, v in sorted(launch.env.items()) if k not in NOT_INSIDE},
                KEY_NAMES[engine]: f"${{{KEY_NAMES[engine]}:-}}",
            },
            "ports": [f"127.0.0.1:{port}:{port}"],
            "ipc": "host",
            "restart": "unless-stopped",
        }
        if mounts:
            service["volumes"] = [f"{_dollars(f'{host}:{inside}')}:ro" for host, inside in mounts.items()]
        if cards:
            devices = [{"driver": "nvidia", "device_ids": cards, "capabilities": ["gpu"]}]
            service["deploy"] = {"resources": {"reservations": {"devices": devices}}}
        services[profile.slug if len(launches) == 1 else f"{profile.slug}-{launch.replica}"] = service
    return _about(profile, version) + yaml.safe_dump(
        {"services": services}, sort_keys=False, allow_unicode=True, width=10**6
    )


# The container sees only its own cards, by its own numbers, and has its own network.
NOT_INSIDE = frozenset({"CUDA_VISIBLE_DEVICES", "VLLM_HOST_IP", "VLLM_CACHE_ROOT"})
FORMS: dict[str, Callable[[Profile, ProfileVersion, tuple[EngineLaunch, ...]], str]] = {
    "command": as_command,
    "systemd": as_systemd,
    "compose": as_compose,
}


def _arguments(argv: tuple[str, ...]) -> list[str]:
    """What follows the program: the image brings that itself."""
    start = next(i for i, part in enumerate(argv) if part in ("serve", "--model"))
    return list(argv[start:] if argv[start] == "--model" else argv[start + 1 :])


def _folded(argv: tuple[str, ...], quote: Callable[[str], str]) -> str:
    lines: list[list[str]] = [[]]
    for part in argv:
        if part.startswith("--") and lines[-1]:
            lines.append([])
        lines[-1].append(quote(part))
    return " \\\n  ".join(" ".join(words) for words in lines)


def _dollars(text: str) -> str:
    """Compose puts variables in where it sees a dollar sign."""
    return text.replace("$", "$$")


def _unit_text(text: str) -> str:
    return " ".join(text.split()).replace("%", "%%")


def _unit_word(text: str) -> str:
    """One word of a unit file (systemd.service(5), "Command lines", and specifiers in systemd.unit(5))."""
    text = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$").replace("\n", "\\n")
    return f'"{text}"' if not text or any(c in text for c in " \t';\"\\") else text
