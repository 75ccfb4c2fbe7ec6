"""The starter engine from the real package index: installed, repaired, asked for a token."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from apps.catalog.selectors import model_get, weights_path
from apps.common.actors import COMMAND_LINE
from apps.installs import starter
from apps.installs.selectors import install_for
from apps.installs.services import install_request
from apps.jobs.models import Job, JobState
from apps.jobs.runner import job_claim
from apps.profiles.services import load_shipped

pytestmark = [pytest.mark.real, pytest.mark.django_db(transaction=True)]


def install(rig: Any, name: str = "starter") -> Job:
    job = install_request(name=name, actor=COMMAND_LINE, rig=rig)
    context = job_claim(job.pk)
    assert context is not None
    context.run()
    job.refresh_from_db()
    assert job.state == JobState.SUCCEEDED, job.summary
    return job


def test_the_starter_installs_repairs_itself_and_its_server_answers(rig: Any, settings: Any, tmp_path: Path) -> None:
    settings.INSTALLS_DIR = tmp_path / "installs"
    settings.MODELS_DIR = tmp_path / "models"
    load_shipped()
    install(rig)
    found = install_for("bench-01", "llama_cpp")
    assert found is not None
    assert starter.pinned_version() in found.version
    gguf = weights_path(model_get("gemma-3-270m"), "bench-01")
    assert gguf is not None
    assert Path(gguf).stat().st_size == starter.MODEL_BYTES

    # What a killed install leaves: half of a model, and an environment without its packages' marker.
    with Path(gguf).open("r+b") as file:
        file.truncate(1000)
    (starter.folder() / "rigpanel.lock").unlink()
    again = install(rig)
    assert Path(gguf).stat().st_size == starter.MODEL_BYTES
    assert again.steps.get(name="environment").detail == "already there"
    third = install(rig)
    assert third.steps.get(name="packages").detail == "already there"
    assert third.steps.get(name="model").detail == "already there"

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [*found.command, "--model", gguf, "--host", "127.0.0.1", "--port", str(port), "--ctx-size", "512"]
    server = subprocess.Popen(
        command, env=os.environ | {"LLAMA_API_KEY": "test"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                    assert answer.status == 200
                    break
            except OSError:
                assert server.poll() is None, "the server ended"
                assert time.monotonic() < deadline, "the server did not come up"
                time.sleep(0.2)
    finally:
        server.terminate()
        assert server.wait(timeout=30) == 0


@pytest.mark.skipif(platform.machine() != "x86_64", reason="its wheel is for x86_64")
def test_llama_server_is_installed_by_the_job_beside_it_and_tells_its_flags(
    rig: Any, settings: Any, tmp_path: Path
) -> None:
    settings.INSTALLS_DIR = tmp_path / "installs"
    job = install(rig, "llama-server")
    found = install_for("bench-01", "llama_cpp")
    assert found is not None
    assert found.name.startswith("llama-server-0.")
    assert "--tensor-split" in (found.flags or [])
    assert (found.size_bytes or 0) > 100_000_000
    assert "can be used on bench-01" in job.summary


@pytest.mark.nightly
@pytest.mark.skipif(platform.machine() != "x86_64", reason="vLLM's CPU build is for x86_64")
def test_vllm_for_the_cpu_is_installed_by_the_job_with_ray_beside_it(rig: Any, settings: Any, tmp_path: Path) -> None:
    settings.INSTALLS_DIR = tmp_path / "installs"
    job = install(rig, "vllm")
    vllm, ray = install_for("bench-01", "vllm"), install_for("bench-01", "ray_serve")
    assert vllm is not None
    assert ray is not None
    assert vllm.version.startswith("0.32.0")
    assert "max_model_len" in (vllm.flags or {})
    assert ray.version == "2.60.0"
    assert ray.path == vllm.path
    assert job.steps.get(name="packages").state == "done"
