"""From the click to the first token of a real model, against the same engine started by hand.

    python benchmarks/switch_latency.py [--pairs 7] [--json]

Both sides start from "nothing serves" and end with the first streamed token of the same prompt. *Panel*: the switch is
asked for over the API, and a client that knows nothing asks the gateway until it gets a token: it waits in the
gateway while the model loads. *Bare*: the very command line that the panel used, on another port, asked directly
as soon as its /health says 200. Pairs take turns in one run, so that both see the same machine; the difference is
what the panel costs. Installs the starter engine into a data directory of its own first.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._figures import machine, parser
from tests.panel import Panel, ask, command_line, stream, wait_for

PROFILE = "gemma-3-270m-cpu"
MODEL = "gemma-3-270m"
AIM_SECONDS = 0.5
POLL_SECONDS = 0.005
REQUEST: dict[str, Any] = {"model": MODEL, "prompt": "The capital of France is", "max_tokens": 1, "temperature": 0}


def first_token(url: str, key: str) -> None:
    """Returns when the first piece of an answer has come; asks again while nobody knows the model or listens."""
    while True:
        try:
            next(iter(stream(f"{url}/v1/completions", key, REQUEST)))
            return
        except (OSError, StopIteration):
            time.sleep(POLL_SECONDS)


def panel_seconds(panel: Panel) -> float:
    key = panel.key()
    began = time.perf_counter()
    job = panel.switch(PROFILE)
    first_token(panel.gateway_url, key)
    took = time.perf_counter() - began
    ended = panel.finished(job)
    if ended["state"] != "succeeded":
        raise SystemExit(f"the switch did not succeed: {ended['result']}")
    return took


def bare_seconds(argv: list[str], environment: dict[str, str], url: str, key: str) -> float:
    began = time.perf_counter()
    with subprocess.Popen(
        argv, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as engine:
        try:
            while ask(f"{url}/health", seconds=5).status != 200:
                if engine.poll() is not None:
                    raise SystemExit(f"the bare engine ended with {engine.returncode}")
                time.sleep(POLL_SECONDS)
            first_token(url, key)
            return time.perf_counter() - began
        finally:
            engine.terminate()
            engine.wait(60)


def stop_all(panel: Panel) -> None:
    for deployment in panel.live():
        answer = panel.api(f"/deployments/{deployment['id']}/stop", {})
        panel.finished(int(answer.json["id"]))
    wait_for("no engine runs", lambda: not panel.engines())


def bare_start(panel: Panel) -> tuple[list[str], dict[str, str], str, str]:
    """The command line and environment of the engine that the panel runs now, moved to the next port."""
    (engine,) = panel.engines()
    argv = [word for word in command_line(engine.pid) if word]
    at = argv.index("--port") + 1
    argv[at] = str(int(argv[at]) + 1)
    words = Path(f"/proc/{engine.pid}/environ").read_bytes().decode().split("\0")
    environment = dict(word.partition("=")[::2] for word in words if word)
    return argv, environment, f"http://127.0.0.1:{argv[at]}", environment["LLAMA_API_KEY"]


def measure(pairs: int) -> dict[str, Any]:
    """Seconds of each pair, their differences and medians."""
    panel = Panel().start()
    try:
        installed = panel.manage("install", "starter", "--wait")
        if installed.returncode:
            raise SystemExit(installed.stderr)
        panel_seconds(panel)  # reads the model into the page cache, for both
        bare = bare_start(panel)
        stop_all(panel)
        through: list[float] = []
        direct: list[float] = []

        def one_through() -> None:
            through.append(panel_seconds(panel))
            stop_all(panel)

        def one_direct() -> None:
            direct.append(bare_seconds(*bare))

        order: list[Callable[[], None]] = [one_through, one_direct]
        for _ in range(pairs):
            for take in order:
                time.sleep(1.0)
                take()
            order.reverse()  # neither side always comes first
    finally:
        panel.stop()
    differences = [a - b for a, b in zip(through, direct, strict=True)]
    return {
        "pairs": pairs,
        "panel_seconds": [round(s, 3) for s in through],
        "bare_seconds": [round(s, 3) for s in direct],
        "panel_median_s": round(statistics.median(through), 3),
        "bare_median_s": round(statistics.median(direct), 3),
        "difference_median_s": round(statistics.median(differences), 3),
        "difference_worst_s": round(max(differences), 3),
        "ratio_of_medians": round(statistics.median(through) / statistics.median(direct), 2),
    }


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--pairs", type=int, default=7)
    options = arguments.parse_args()
    figures = {**machine(), **measure(options.pairs)}
    if options.json:
        print(json.dumps(figures))
        return 0
    for name, value in figures.items():
        print(f"{name:22} {value}")
    met = figures["difference_median_s"] <= AIM_SECONDS
    print(f"aim: the panel adds at most {AIM_SECONDS} s ({'met' if met else 'not met'})")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
