"""A whole panel on a real NVIDIA card: two sleepers, switched by the API, asked through the gateway.

``panel_switch.py OUT``, run by a Python that has the panel's packages. RIGPANEL_VLLM starts vLLM; the models' folders
lie under RIGPANEL_GPU_MODELS (no weights needed). Writes OUT/panel.jsonl: each job's steps, predicted against actual
memory, and the time from the click to the first streamed token.
"""

from __future__ import annotations

import json
import os
import sys
import time
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from tests.panel import Panel, stream, wait_for  # noqa: E402

GIB = 1 << 30
BUDGET_GIB = 23.07
MODELS = Path(os.environ.get("RIGPANEL_GPU_MODELS", "/opt/models"))
START_SECONDS = 400.0
BEGAN = time.monotonic()


def run(drive: Callable[[Panel, Any], None], file_name: str) -> None:
    """Start a panel and drive it; every fact becomes a line of OUT/``file_name``."""
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    file = (out / file_name).open("a", buffering=1)

    def fact(kind: str, **values: Any) -> None:
        line = json.dumps({"t": round(time.monotonic() - BEGAN, 1), "kind": kind, **values}, default=str)
        file.write(line + "\n")
        print(line[:1200], flush=True)

    panel = Panel(RIGPANEL_HARDWARE="nvml", RIGPANEL_VLLM=os.environ["RIGPANEL_VLLM"]).start()
    try:
        drive(panel, fact)
    finally:
        (out / "up.log").write_text(panel.said())
        panel.stop()


def cards(panel: Panel) -> list[dict[str, Any]]:
    """The rig's cards, as soon as they are known, and vLLM with them."""

    def seen() -> Any:
        (rig,) = panel.get("/rigs")["items"]
        return panel.get(f"/rigs/{rig['slug']}")["gpus"]

    found: list[dict[str, Any]] = wait_for("the cards are known", seen)
    wait_for(
        "vLLM is found", lambda: [i for i in panel.get("/installs")["items"] if i["engine"] == "vllm"], seconds=300
    )
    return found


def models(panel: Panel) -> dict[str, str]:
    """Catalogue slugs of the two packed models by their folders' names."""
    coder = "qwen2-5-coder-32b-instruct-awq"
    changed = panel.api(f"/models/{coder}", {"checkpoint": str(MODELS / "coder-32b-awq")}, method="PATCH")
    assert changed.status == 200, changed.text
    made = panel.api(
        "/models",
        {
            "slug": "qwen-seven",
            "name": "Qwen 7B",
            "checkpoint": str(MODELS / "qwen-7b-bf16"),
            "weights_bytes": 15_231_233_024,
            "layers": 28,
            "hidden_size": 3584,
            "attention_heads": 28,
            "kv_heads": 4,
            "head_dim": 128,
            "intermediate_size": 18944,
            "vocab_size": 152064,
            "max_context_tokens": 32768,
            "kv": {"kind": "gqa_full", "layers": 28, "kv_heads": 4, "head_dim": 128},
        },
    )
    assert made.status == 201, made.text
    return {"coder-32b-awq": coder, "qwen-7b-bf16": "qwen-seven"}


def add_profile(panel: Panel, fact: Any, slug: str, model: str, options: dict[str, Any], **layout: int) -> None:
    """One with the memory of a 24 GB card on each of its cards; its plan is told."""
    total = cards(panel)[0]["memory_total_bytes"]
    body = {
        "slug": slug,
        "name": slug,
        "model": model,
        "engine": "vllm",
        "served_name": slug,
        "options": {
            "load_format": "dummy",
            "gpu_memory_utilization": round(BUDGET_GIB * GIB / total, 4),
            "max_model_len": 8192,
            "max_num_seqs": 32,
            "max_num_batched_tokens": 2048,
            **options,
        },
        **layout,
    }
    made = panel.api("/profiles", body)
    assert made.status == 201, made.text
    plan = panel.get(f"/profiles/{slug}/plan")
    fact("plan", slug=slug, problems=plan["problems"], warnings=plan.get("warnings"), lines=plan["command_lines"])


def drive(panel: Panel, fact: Any) -> None:
    fact("started")
    fact("cards", items=cards(panel))
    fact("installs", items=panel.get("/installs")["items"])
    catalogue = models(panel)
    for slug, folder in (("coder", "coder-32b-awq"), ("seven", "qwen-7b-bf16")):
        add_profile(panel, fact, slug, catalogue[folder], {"enforce_eager": True, "enable_sleep_mode": True})
        told(panel, fact, panel.finished(panel.switch(slug), seconds=START_SECONDS))
        deployments(panel, fact)
    for turn in range(8):
        target = ("coder", "seven")[turn % 2]
        clicked = time.monotonic()
        job = panel.switch(target)
        token = first_token(panel, target) - clicked
        done = panel.finished(job)
        fact("switch", to=target, click_to_first_token=round(token, 3), state=done["state"])
        if turn in (0, 7):
            told(panel, fact, done)


def first_token(panel: Panel, name: str) -> float:
    """When the first chunk of an answer through the gateway came; asks again while the name is not held yet."""
    body = {"model": name, "prompt": "def main():", "max_tokens": 4, "temperature": 0}
    while True:
        try:
            for chunk in stream(f"{panel.gateway_url}/v1/completions", panel.key(), body):
                if chunk.get("choices"):
                    return time.monotonic()
        except urllib.error.HTTPError as error:
            if error.code not in (404, 503):
                raise
        time.sleep(0.005)


def deployments(panel: Panel, fact: Any) -> None:
    for deployment in panel.live():
        fact("deployment", **{k: deployment.get(k) for k in ("profile", "status", "boot", "sleep")})


def told(panel: Panel, fact: Any, job: dict[str, Any]) -> None:
    fact("job", id=job["id"], state=job["state"], result=job["result"], steps=job["steps"])
    if job["state"] != "succeeded":
        fact("log", text=panel.get(f"/jobs/{job['id']}/log"))
        raise SystemExit(1)


if __name__ == "__main__":
    run(drive, "panel.jsonl")
