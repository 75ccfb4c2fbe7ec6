"""llama.cpp split over two devices through a whole panel: real RPC servers stand in for two of the rig's cards.

The cards are a recording played again, so the panel launches the real engine; the engine's executable is a line
that adds ``--rpc`` and becomes llama-server.
"""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.panel import REPOSITORY, Panel, wait_for

LLAMA = Path(os.environ.get("RIGPANEL_TEST_LLAMA", REPOSITORY / ".engines" / "llama-server")) / "bin"
MODEL = Path(os.environ.get("RIGPANEL_TEST_GGUF", REPOSITORY / ".engines" / "models" / "gemma-3-270m-q4_k_m.gguf"))
SAMPLE = REPOSITORY / "apps" / "hardware" / "samples" / "sim-4x3090.jsonl"

pytestmark = pytest.mark.skipif(
    not ((LLAMA / "ggml-rpc-server").exists() and MODEL.exists()),
    reason=f"needs llama-server with RPC ({LLAMA}) and a model ({MODEL}): make engines",
)


def answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def devices() -> Iterator[str]:
    """Two RPC servers, as llama-server's ``--rpc`` takes them."""
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        ports = [first.getsockname()[1], second.getsockname()[1]]
    running = [
        subprocess.Popen(
            [str(LLAMA / "ggml-rpc-server"), "-H", "127.0.0.1", "-p", str(port), "-t", "1"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for port in ports
    ]
    try:
        for port in ports:
            wait_for(f"an RPC server listens on {port}", lambda port=port: answers(port))  # type: ignore[misc]
        yield ",".join(f"127.0.0.1:{port}" for port in ports)
    finally:
        for process in running:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def split_panel(devices: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Panel]:
    place = tmp_path_factory.mktemp("split")
    program = place / "llama-server"
    program.write_text(f'#!/bin/sh\nexec "{LLAMA}/llama-server" --rpc {devices} "$@"\n')
    program.chmod(0o755)
    (place / "models" / "gemma-3-270m").mkdir(parents=True)
    (place / "models" / "gemma-3-270m" / MODEL.name).symlink_to(MODEL)
    running = Panel(
        RIGPANEL_HARDWARE=f"replay:{SAMPLE}",
        RIGPANEL_LLAMA_SERVER=str(program),
        RIGPANEL_MODELS_DIR=str(place / "models"),
    ).start()
    try:
        yield running
    finally:
        running.stop()


def profile(split_panel: Panel, **options: Any) -> None:
    body = {
        "slug": "split",
        "name": "Split",
        "model": "gemma-3-270m",
        "engine": "llama_cpp",
        "tensor_parallel_size": 2,
        "options": {"context_tokens_per_slot": 512, "parallel": 2, "threads": 1, **options},
    }
    exists = split_panel.api("/profiles/split").status == 200
    answer = (
        split_panel.api("/profiles/split", {"options": body["options"]}, method="PATCH")
        if exists
        else split_panel.api("/profiles", body)
    )
    assert answer.status in (200, 201), answer.text


def serve(split_panel: Panel) -> dict[str, Any]:
    job = split_panel.finished(split_panel.switch("split"))
    assert job["state"] == "succeeded", job
    (deployment,) = split_panel.live()
    assert deployment["simulated"] is False
    (replica,) = deployment["replicas"]
    return dict(replica)


def test_the_layers_lie_as_the_panel_meant_and_it_says_so_when_they_do_not(split_panel: Panel) -> None:
    installed = wait_for("llama-server is found", lambda: split_panel.get("/installs")["items"])
    assert installed[0]["state"] == "ready", installed
    profile(split_panel)
    replica = serve(split_panel)
    assert replica["warnings"] == []
    assert len(replica["gpus"]) == 2
    start = replica["start"]
    assert (start["layers_offloaded"], start["layers_total"]) == (19, 19)
    # Equal cards: half of the 19 layers each, of which the output layer has no cache.
    assert [device["kv_layers"] for device in start["devices"]] == [10.0, 8.0]
    assert all(device["weights_bytes"] > 0 for device in start["devices"])
    answer = split_panel.gateway("/completions", {"model": "gemma-3-270m", "prompt": "Paris is", "max_tokens": 4})
    assert answer.status == 200, answer.text

    profile(split_panel, gpu_layers=5, tensor_split=[3, 1])
    replica = serve(split_panel)
    assert "5 of 19 layers are on the GPUs" in replica["warnings"][0]
    page = split_panel.get("/deployments?live=true")["items"][0]
    assert page["replicas"][0]["warnings"] == replica["warnings"]


def test_what_this_build_does_not_take_is_said_before_anything_is_stopped(split_panel: Panel) -> None:
    profile(split_panel, tensor_split=[1, 1, 1])
    plan = split_panel.get("/profiles/split/plan")
    assert not plan["fits"]
    assert any("3 shares" in problem for problem in plan["problems"]), plan


def test_a_split_that_the_devices_cannot_do_is_diagnosed_with_one_change(split_panel: Panel) -> None:
    profile(split_panel, split_mode="row")
    before = split_panel.serving()
    job = split_panel.finished(split_panel.switch("split"))
    assert job["state"] == "failed"
    assert "cannot be split this way" in job["result"]["summary"], job
    assert job["result"]["suggested_options"] == {"split_mode": "layer"}, job
    assert split_panel.serving() == before  # the old version is back
