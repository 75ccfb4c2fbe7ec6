"""Finding engines that people installed themselves: configured ones, PATH, and usual environments.

Runs on the rig's worker, never in a request: ``vllm --version`` alone imports for tens of seconds.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
from django.conf import settings
from django.db import transaction

from apps.audit.services import record
from apps.common.actors import PANEL
from apps.common.realtime import page_changed
from apps.engines.llama_cpp.options import help_flags
from apps.engines.vllm.flags import HELP_ARGUMENTS, flags_to_dict, parse_help
from apps.installs.models import EngineInstall, InstallState
from apps.installs.ray_environment import python_of, ray_version
from apps.jobs.child import plain_environment

log = structlog.get_logger(__name__)
VERSION_TIMEOUT_SECONDS = 120
# The program of each engine that the panel can start, and what comes between it and the flags.
PROGRAMS = {"vllm": ("vllm", ("serve",)), "llama_cpp": ("llama-server", ()), "ray_serve": ("ray", ())}
HELP = {"llama_cpp": ("--help",), "vllm": HELP_ARGUMENTS}
VENV_FOLDERS = ("~/venvs", "~/.virtualenvs", "~/.venvs", "/opt/venvs")


@dataclass(frozen=True, slots=True)
class Found:
    engine: str
    name: str
    executable: Path


def candidates() -> Iterator[Found]:
    """Executables that exist, configured ones first; one per real file."""
    seen: set[Path] = set()
    for engine, (program, _) in PROGRAMS.items():
        configured = str(settings.ENGINE_EXECUTABLES.get(engine) or "")
        places: list[tuple[str, str | None]] = [
            (f"{program} (configured)", str(Path(configured).expanduser()) if configured else None),
            (f"{program} (PATH)", shutil.which(program)),
        ]
        for folder in VENV_FOLDERS:
            root = Path(folder).expanduser()
            if root.is_dir():
                places += [(f"{program} ({folder}/{v.name})", str(v / "bin" / program)) for v in sorted(root.iterdir())]
        for name, place in places:
            if not place:
                continue
            executable = Path(place)
            if not executable.is_file() or not os.access(executable, os.X_OK):
                if name.endswith("(configured)"):
                    log.warning("a configured engine is not an executable file", engine=engine, path=place)
                continue
            real = executable.resolve()
            if real not in seen:
                seen.add(real)
                yield Found(engine, name[:80], executable)


def version_of(executable: Path) -> tuple[str, str]:
    """(version, problem): one of them is empty."""
    try:
        answer = subprocess.run(
            [str(executable), "--version"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=VERSION_TIMEOUT_SECONDS,
            env=plain_environment(),
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "", f"It did not tell its version within {VERSION_TIMEOUT_SECONDS} s."
    except OSError as error:
        return "", f"It cannot be started: {error.strerror or error}."
    return parse_version(answer.stdout, answer.returncode)


def version_on_disk(found: Found) -> str:
    """Of vLLM, from the metadata beside it: asked for its version it imports for half a minute. Empty where it is not
    one plain environment."""
    if found.engine != "vllm":
        return ""
    metadata = list(found.executable.parent.parent.glob("lib/python3*/site-packages/vllm-[0-9]*.dist-info"))
    return metadata[0].name.removeprefix("vllm-").removesuffix(".dist-info")[:80] if len(metadata) == 1 else ""


def flags_of(engine: str, executable: Path, version: str) -> list[str] | dict[str, Any] | None:
    """What the executable's own help names, sorted, and for vLLM what it tells of each; None where it is not asked or
    gives no answer. Builds differ."""
    if engine not in HELP:
        return None
    if engine == "vllm":  # it imports for half a minute before it prints its help: asked once per version
        known = EngineInstall.objects.filter(path=str(executable), version=version).first()
        if known is not None and known.flags:
            return dict(known.flags)
    try:
        answer = subprocess.run(
            [str(executable), *HELP[engine]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=VERSION_TIMEOUT_SECONDS,
            env=plain_environment() | {"COLUMNS": "80"},
            check=False,
        )
    except (subprocess.TimeoutExpired, OSError):
        return None
    if engine == "vllm":
        return flags_to_dict(parse_help(answer.stdout)) or None
    return sorted(help_flags(answer.stdout)) or None


def parse_version(output: str, code: int) -> tuple[str, str]:
    """``version: 11434 (abc)`` of llama-server, ``0.33.0`` of vLLM, in whatever else they print."""
    if code != 0:
        last = next((line for line in reversed(output.splitlines()) if line.strip()), "")
        return "", f"Asked for its version it ended with code {code}: {last.strip()[:200]}"
    found = re.search(r"^version:\s*(\S.*?)\s*$", output, re.MULTILINE) or re.search(
        r"^\s*(?:vllm[ ,v]*)?(\d+\.\d+(?:\.\S+)?)\s*$", output, re.MULTILINE | re.IGNORECASE
    )
    return (found[1][:80], "") if found else ("", "Its answer holds no version.")


def detect(rig_name: str) -> list[EngineInstall]:
    """Register what is there, and mark what is gone. Returns the rows that changed."""
    changed = []
    found_names = set()
    for found in candidates():
        found_names.add(found.name)
        command = [str(found.executable), *PROGRAMS[found.engine][1]]
        if found.engine == "ray_serve":  # what is started is our launcher, with Ray's Python
            python = python_of(found.executable)
            command = [str(python)] if python else []
            version, problem = ray_version(python)
        else:
            told = version_on_disk(found)
            version, problem = (told, "") if told else version_of(found.executable)
        flags = None if problem else flags_of(found.engine, found.executable, version)
        if found.engine == "vllm" and flags is None and not problem:
            version, problem = version_of(found.executable)  # it printed no help: what does it say when it starts?
        values: dict[str, object] = {
            "engine": found.engine,
            "version": version,
            "command": command,
            "path": str(found.executable),
            "flags": flags,
            "state": InstallState.BROKEN if problem else InstallState.READY,
            "problem": problem[:500],
        }
        changed += _store(rig_name, found.name, values)
    for row in EngineInstall.objects.filter(rig_name=rig_name).exclude(state=InstallState.REMOVED):
        if not row.managed and row.name not in found_names:
            changed += _store(rig_name, row.name, {"state": InstallState.REMOVED, "problem": f"{row.path} is gone."})
        elif row.managed and row.command and not Path(row.command[0]).is_file():
            changed += _store(
                rig_name, row.name, {"state": InstallState.BROKEN, "problem": "Its files are gone; install it again."}
            )
    return changed


def _store(rig_name: str, name: str, values: dict[str, object]) -> list[EngineInstall]:
    with transaction.atomic():
        row = EngineInstall.objects.select_for_update(no_key=True).filter(rig_name=rig_name, name=name).first()
        if row is not None and all(getattr(row, key) == value for key, value in values.items()):
            return []
        row, _ = EngineInstall.objects.update_or_create(rig_name=rig_name, name=name, defaults=values)
        record(
            PANEL,
            "install.detect",
            "install",
            row.pk,
            str(row),
            {"rig": rig_name, "state": row.state, "path": row.path},
        )
        page_changed("install", install=row.pk)
    return [row]
