"""A whole panel on two real NVIDIA cards: a model over both, then one on each, of which one dies and comes back alone.

``panel_pair.py OUT``, like ``panel_switch.py``. Writes OUT/pair.jsonl: what the panel sees of cards and links, each
job's steps, predicted against actual memory of both layouts, and the statuses after the death.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.gpu.panel_switch import START_SECONDS, add_profile, cards, deployments, models, run, told
from tests.panel import Panel, command_line

QUESTION = {"prompt": "def main():", "max_tokens": 8, "temperature": 0}
BACK_WITHIN_SECONDS = 200.0


def drive(panel: Panel, fact: Any) -> None:
    fact("cards", items=cards(panel))
    (rig,) = panel.get("/rigs")["items"]
    fact("rig", **panel.get(f"/rigs/{rig['slug']}"))
    catalogue = models(panel)
    add_profile(panel, fact, "pair", catalogue["coder-32b-awq"], {}, tensor_parallel_size=2)
    add_profile(panel, fact, "twins", catalogue["qwen-7b-bf16"], {"enforce_eager": True}, replicas=2)
    for slug in ("pair", "twins"):
        told(panel, fact, panel.finished(panel.switch(slug), seconds=START_SECONDS))
        deployments(panel, fact)
        fact("answer", slug=slug, status=panel.gateway("/completions", {"model": slug, **QUESTION}).status)
    killed = min(e.pid for e in panel.engines() if "twins" in command_line(e.pid))
    os.kill(killed, signal.SIGKILL)
    began, last = time.monotonic(), ""
    while time.monotonic() - began < BACK_WITHIN_SECONDS:
        (now,) = [d["status"] for d in panel.live() if d["profile"] == "twins"]
        status = panel.gateway("/completions", {"model": "twins", **QUESTION}).status
        if f"{now} {status}" != last:
            fact("after the death", seconds=round(time.monotonic() - began, 1), deployment=now, answer=status)
        if now == "ready" and "degraded" in last:
            break
        last = f"{now} {status}"
    deployments(panel, fact)
    for job in panel.get("/jobs?kind=restart")["items"]:
        told(panel, fact, panel.job(job["id"]))


if __name__ == "__main__":
    run(drive, "pair.jsonl")
