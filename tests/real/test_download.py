"""Gemma downloaded from a local hub through the panel, its worker killed on the way, and served by llama.cpp."""

from __future__ import annotations

from pathlib import Path

from tests.factories.hub import COMMIT, Hub
from tests.panel import Panel, wait_for

MIB = 2**20


def test_a_download_survives_its_worker_and_the_model_is_served(panel: Panel, hub: Hub) -> None:
    gemma = Path(panel.data) / "models" / "gemma-3-270m" / "gemma-3-270m-q4_k_m.gguf"
    hub.add("lab/gemma-gguf", {"gemma-3-270m-Q4_K_M.gguf": gemma, "README.md": b"# Gemma"})
    made = panel.api(
        "/models", {"slug": "lab-gemma", "name": "Lab Gemma", "hf_repo": "lab/gemma-gguf", "chat_template": "gemma"}
    )
    assert made.status == 201, made.text
    hub.bytes_per_second = 40 * MIB
    asked = panel.api("/models/lab-gemma/download", {"quantization": "Q4_K_M"})
    assert asked.status == 202, asked.text
    job = asked.json["id"]
    folder = Path(panel.data) / "models" / "lab-gemma" / COMMIT[:12]
    part = folder / "gemma-3-270m-Q4_K_M.gguf.part"
    wait_for("some of it arrived", lambda: part.exists() and part.stat().st_size > 40 * MIB)
    panel.kill("control")
    hub.bytes_per_second = 0
    done = panel.finished(job)
    assert done["state"] == "succeeded", done
    assert hub.ranges(), "it was carried on, not begun again"
    assert all(int(r.removeprefix("bytes=").rstrip("-")) > 0 for r in hub.ranges())
    (weights,) = panel.get("/models/lab-gemma")["weights"]
    assert (weights["revision"], weights["quantization"], weights["kind"]) == (COMMIT, "Q4_K_M", "gguf")

    profile = {
        "slug": "lab-gemma-cpu",
        "name": "Lab Gemma",
        "model": "lab-gemma",
        "engine": "llama_cpp",
        "device": "cpu",
        "served_name": "lab-gemma",
        "options": {"context_tokens": 512, "parallel": 1},
    }
    assert panel.api("/profiles", profile).status == 201
    switched = panel.finished(panel.switch("lab-gemma-cpu"))
    assert switched["state"] == "succeeded", switched
    answer = panel.gateway(
        "/completions", {"model": "lab-gemma", "prompt": "The capital of France is", "max_tokens": 4}
    )
    assert answer.json["choices"][0]["text"]
    refused = panel.api("/weights/delete", {"place": f"lab-gemma/{COMMIT[:12]}"})
    assert refused.status == 409, refused.text
    (deployment,) = [d for d in panel.live() if d["profile"] == "lab-gemma-cpu"]
    panel.finished(panel.api(f"/deployments/{deployment['id']}/stop", {}).json["id"])
    deleted = panel.api("/weights/delete", {"place": f"lab-gemma/{COMMIT[:12]}"})
    assert deleted.status == 202, deleted.text
    assert panel.finished(deleted.json["id"])["state"] == "succeeded"
    assert not folder.exists()
