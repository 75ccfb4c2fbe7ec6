"""How long until somebody gets an answer again, and what a switch costs beside doing it by hand.

    python benchmarks/recovery.py [--deaths 7] [--pairs 15] [--json]

On the simulated rig with simulated engines that load for 0.3 s, so that what is left is the panel's own share.

*Death*: from ``kill -9`` of the serving engine to the next answer, for a client that asks again and again.
*Adoption*: eight engines run while the panel is killed whole (``kill -9`` of everything but the engines, the supervisor
included); from ``make up`` to a rig whose ``/readyz`` is 200, which lists the same eight processes as serving, and
whose gateway answers from both deployments. Beside it: the start of the same panel with no engine.
*Switch*: from the click to the first answer of the other model, beside a bare SIGTERM of the one process and start of
the other's very command line, asked as soon as its ``/health`` says 200.
"""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from apps.runners.processes import send_signal
from benchmarks._figures import machine, parser
from tests.panel import NAMES, Panel, ask, command_line, wait_for

POLL_SECONDS = 0.005
AIM_RIGHT_AGAIN_SECONDS = 10.0
POLICY = {"restarts": 100, "backoff_seconds": 0}


def profile(panel: Panel, slug: str, **more: Any) -> None:
    model = "gemma-3-270m" if more.get("device") == "cpu" else "gpt-oss-20b"  # whose heads divide by 4
    body = {"slug": slug, "name": slug, "model": model, "engine": "simulated", "served_name": slug, **more}
    body["options"] = {"load_seconds": 0.3, **more.get("options", {})}
    answer = panel.api("/profiles", body)
    if answer.status != 201:
        raise SystemExit(answer.text)
    panel.api(f"/profiles/{slug}/restarts", POLICY, method="PUT")


def answered(panel: Panel, model: str) -> None:
    """Returns with the first answer; asks again while there is none."""
    body = {"model": model, "prompt": "Hello", "max_tokens": 1}
    deadline = time.monotonic() + 60
    while (answer := panel.gateway("/completions", body)).status != 200:
        if time.monotonic() > deadline:
            raise SystemExit(f"{model} does not answer: {answer.status} {answer.text[:300]}")
        time.sleep(POLL_SECONDS)


def switched(panel: Panel, slug: str) -> float:
    began = time.perf_counter()
    job = panel.switch(slug)
    answered(panel, slug)
    took = time.perf_counter() - began
    done = panel.finished(job)
    if done["state"] != "succeeded":
        raise SystemExit(f"the switch to {slug} did not succeed: {done['result']}")
    return took


def deaths(panel: Panel, count: int) -> list[float]:
    switched(panel, "one")
    found = []
    for _ in range(count):
        (engine,) = panel.engines()
        began = time.perf_counter()
        send_signal(engine, signal.SIGKILL)
        answered(panel, "one")
        found.append(time.perf_counter() - began)
        wait_for("it serves", lambda: panel.serving() == ["one"])
    return found


def killed_whole(panel: Panel) -> None:
    for name in reversed(NAMES):
        panel.signal(name, signal.SIGKILL)
    assert panel.process is not None
    panel.process.wait(30)


def right_again(panel: Panel, names: list[str]) -> float:
    began = time.perf_counter()
    panel.start()
    wait_for("what served is listed", lambda: panel.serving() == sorted(names))
    for name in names:
        answered(panel, name)
    return time.perf_counter() - began


def adoption(panel: Panel) -> dict[str, float]:
    for slug in ("four-gpu", "four-cpu"):
        switched(panel, slug)
    before = {e.pid for e in panel.engines()}
    if len(before) != 8:
        raise SystemExit(f"{len(before)} engines instead of 8")
    killed_whole(panel)
    with_eight = right_again(panel, ["four-gpu", "four-cpu"])
    if {e.pid for e in panel.engines()} != before:
        raise SystemExit("not the same engines as before")
    for deployment in panel.live():
        panel.finished(int(panel.api(f"/deployments/{deployment['id']}/stop", {}).json["id"]))
    killed_whole(panel)
    return {"with_eight_engines_s": with_eight, "with_none_s": right_again(panel, [])}


def command(panel: Panel) -> tuple[list[str], dict[str, str]]:
    (engine,) = panel.engines()
    words = Path(f"/proc/{engine.pid}/environ").read_bytes().decode().split("\0")
    return [w for w in command_line(engine.pid) if w], dict(w.partition("=")[::2] for w in words if w)


def bare(argv: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    quiet = subprocess.DEVNULL
    engine = subprocess.Popen(argv, env=environment, stdin=quiet, stdout=quiet, stderr=quiet)
    url = f"http://127.0.0.1:{argv[argv.index('--port') + 1]}"
    while ask(f"{url}/health", seconds=5).status != 200:
        time.sleep(POLL_SECONDS)
    model = argv[argv.index("--served-model-name") + 1]
    body = {"model": model, "prompt": "Hello", "max_tokens": 1}
    while ask(f"{url}/v1/completions", body, key=environment["VLLM_API_KEY"]).status != 200:
        time.sleep(POLL_SECONDS)
    return engine


def switches(panel: Panel, pairs: int) -> tuple[list[float], list[float]]:
    commands = {}
    for slug in ("one", "two"):
        switched(panel, slug)
        commands[slug] = command(panel)
    through = []
    for turn in range(pairs):
        through.append(switched(panel, ("one", "two")[turn % 2]))
    for deployment in panel.live():
        panel.finished(int(panel.api(f"/deployments/{deployment['id']}/stop", {}).json["id"]))
    direct = []
    engine = bare(*commands["two"])
    for turn in range(pairs):
        began = time.perf_counter()
        engine.terminate()
        engine.wait(60)
        engine = bare(*commands[("one", "two")[turn % 2]])
        direct.append(time.perf_counter() - began)
    engine.terminate()
    engine.wait(60)
    return through, direct


def percentile(values: list[float], share: float) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[int(share * 100) - 1]


def measure(death_count: int, pairs: int) -> dict[str, float]:
    panel = Panel().start()
    try:
        for slug in ("one", "two"):
            profile(panel, slug, tensor_parallel_size=4)
        profile(panel, "four-gpu", tensor_parallel_size=1, replicas=4)
        profile(panel, "four-cpu", tensor_parallel_size=1, replicas=4, device="cpu")
        adopted = adoption(panel)
        died = deaths(panel, death_count)
        through, direct = switches(panel, pairs)
    finally:
        panel.stop()
    return {
        "death_to_answer_p50_s": statistics.median(died),
        "death_to_answer_worst_s": max(died),
        **{f"right_again_{name}": took for name, took in adopted.items()},
        "switch_p50_s": percentile(through, 0.5),
        "switch_p95_s": percentile(through, 0.95),
        "bare_p50_s": percentile(direct, 0.5),
        "bare_p95_s": percentile(direct, 0.95),
        "overhead_p50_s": percentile(through, 0.5) - percentile(direct, 0.5),
        "overhead_p95_s": percentile(through, 0.95) - percentile(direct, 0.95),
    }


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--deaths", type=int, default=7)
    arguments.add_argument("--pairs", type=int, default=15)
    options = arguments.parse_args()
    figures = machine()
    figures |= {name: round(value, 3) for name, value in measure(options.deaths, options.pairs).items()}
    if options.json:
        print(json.dumps(figures))
        return 0
    for name, value in figures.items():
        print(f"{name:34} {value}")
    met = figures["right_again_with_eight_engines_s"] <= AIM_RIGHT_AGAIN_SECONDS
    print(f"aim: right again within {AIM_RIGHT_AGAIN_SECONDS:.0f} s of a start ({'met' if met else 'not met'})")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
