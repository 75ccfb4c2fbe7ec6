"""Ray Serve with real vLLM replicas, by the panel's own ways: command line, API, gateway. For the nightly run.

Two vLLMs for the CPU and Ray around them take minutes to load on two cores; what Ray does without a model in it is
tested in every run (``test_ray_serve.py``).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.panel import Panel, stream, wait_for

REPOSITORY = Path(__file__).resolve().parents[2]
VENV = Path(os.environ.get("RIGPANEL_TEST_RAY", REPOSITORY / ".engines" / "vllm"))
MODEL = REPOSITORY / ".engines" / "models" / "tiny-llama"
LOAD_SECONDS = 900.0  # 140 s measured with the machine to itself
REPLICA = "ray::ServeReplica:model:LLMServer"

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(not (VENV / "bin" / "ray").exists() or not MODEL.exists(), reason="needs: make engines"),
]


@pytest.fixture(scope="module")
def rayed() -> Iterator[Panel]:
    """A panel that knows this Ray, with a model, and a profile of two replicas on the CPU."""
    running = Panel(RIGPANEL_RAY=str(VENV / "bin" / "ray")).start()
    try:
        model = running.api("/models", {"slug": "tiny", "name": "Tiny Llama", "checkpoint": str(MODEL.resolve())})
        assert model.status == 201, model.text
        for name, options in (("pair", {}), ("too-long", {"hf_overrides": {"max_position_embeddings": 4000000}})):
            length = 512 if name == "pair" else 4000000
            profile = running.api(
                "/profiles",
                {
                    "slug": name,
                    "name": name,
                    "model": "tiny",
                    "engine": "ray_serve",
                    "device": "cpu",
                    "replicas": 2 if name == "pair" else 1,
                    "served_name": "tiny",
                    # In bfloat16, vLLM 0.32 uses AMX without asking the kernel and dies (SIGILL) on CPUs that have it.
                    "options": {"max_model_len": length, "enforce_eager": True, "dtype": "float32", **options},
                },
            )
            assert profile.status == 201, profile.text
        wait_for(
            "Ray is found",
            lambda: any(i["engine"] == "ray_serve" for i in running.get("/installs")["items"]),
            seconds=300,
        )
        yield running
    finally:
        running.stop()


def deployment(panel: Panel) -> dict[str, Any]:
    (only,) = panel.live()
    return only


def chat(panel: Panel) -> Any:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}
    return panel.gateway("/chat/completions", body)


def replica_pids() -> list[int]:
    return [p.pid for p in psutil.process_iter() if " ".join(_words(p)).startswith(REPLICA)]


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def ray_pids() -> list[int]:
    return [p.pid for p in psutil.process_iter() if "rigpanel-ray-" in (line := " ".join(_words(p))) or "ray::" in line]


def test_a_switch_brings_two_replicas_up_behind_the_gateway(rayed: Panel) -> None:
    done = rayed.manage("switch", "pair", "--wait", seconds=LOAD_SECONDS)
    assert done.returncode == 0, done.stderr
    shown = deployment(rayed)
    assert (shown["status"], shown["engine"], shown["layout"]) == ("ready", "ray_serve", "2×CPU")
    assert shown["engine_version"] == "ray_serve vLLM 0.32.0+cpu, Ray 2.60.0"
    assert [r["healthy"] for r in shown["replicas"]] == [True, True]
    answer = chat(rayed)
    assert answer.status == 200, answer.text
    assert answer.json["usage"]["completion_tokens"] > 0


def test_a_chat_streams_through_the_gateway_with_usage(rayed: Panel) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 12, "ignore_eos": True}
    body["stream_options"] = {"include_usage": True}
    chunks = list(stream(f"{rayed.gateway_url}/v1/chat/completions", rayed.key(), body))
    assert len(chunks) > 10, "tokens were held back"
    assert chunks[-1]["usage"]["completion_tokens"] == 12


def test_a_replica_that_is_killed_is_degraded_and_comes_back(rayed: Panel) -> None:
    victim, other = replica_pids()
    os.kill(victim, signal.SIGKILL)
    degraded = wait_for("degraded", lambda: (d := deployment(rayed))["status"] == "degraded" and d, seconds=60)
    assert sorted(r["healthy"] for r in degraded["replicas"]) == [False, True]
    assert "the others serve on" in degraded["status_reason"]
    assert chat(rayed).status == 200
    recovered = wait_for(
        "ready again", lambda: (d := deployment(rayed))["status"] == "ready" and d, seconds=LOAD_SECONDS
    )
    assert [r["condition"] for r in recovered["replicas"]] == ["running", "running"]
    assert other in replica_pids()
    assert chat(rayed).status == 200


def test_a_profile_that_cannot_load_is_diagnosed_and_the_old_one_brought_back(rayed: Panel) -> None:
    job = rayed.finished(rayed.switch("too-long"), seconds=LOAD_SECONDS * 2)
    assert job["state"] == "failed"
    assert job["result"]["cause"] == "kv_cache_too_small", job["result"]
    assert deployment(rayed)["profile"] == "pair"
    assert chat(rayed).status == 200


def test_a_stop_leaves_no_ray_process(rayed: Panel) -> None:
    assert ray_pids()
    done = rayed.manage("stop", "pair", "--wait", seconds=300)
    assert done.returncode == 0, done.stderr
    assert rayed.live() == []
    assert ray_pids() == []
