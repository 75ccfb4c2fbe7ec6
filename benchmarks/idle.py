"""What all of the panel's processes together take of a processor while nothing happens, process by process.

    python benchmarks/idle.py [--seconds 60] [--page] [--engine] [--json]

Processor time from ``/proc/PID/stat`` as a share of one core, and how often each process was woken, from the voluntary
context switches of its threads. On the simulated rig, half a minute after the start. ``--page`` leaves a browser on the
rig page meanwhile; ``--engine`` installs the starter engine, switches to Gemma 3 270M, and counts the engine too.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._figures import machine, parser
from benchmarks.memory import open_page
from benchmarks.switch_latency import PROFILE
from tests.panel import NAMES, Panel

SETTLE_SECONDS = 30.0
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Used:
    """Since the process began."""

    cpu_seconds: float
    wakeups: int


def used(pid: int) -> Used:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    wakeups = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # a thread that has just ended
            for line in (task / "status").read_text().splitlines():
                if line.startswith("voluntary_ctxt_switches"):
                    wakeups += int(line.split()[1])
    return Used((int(fields[11]) + int(fields[12])) / TICKS_PER_SECOND, wakeups)


def serve_gemma(panel: Panel) -> None:
    installed = panel.manage("install", "starter", "--wait")
    if installed.returncode:
        raise SystemExit(installed.stderr)
    ended = panel.finished(panel.switch(PROFILE))
    if ended["state"] != "succeeded":
        raise SystemExit(f"the switch did not succeed: {ended['result']}")


def measure(seconds: float, page: bool, engine: bool) -> dict[str, Any]:
    panel = Panel().start()
    try:
        if engine:
            serve_gemma(panel)
        with open_page(panel.url) if page else contextlib.nullcontext():
            time.sleep(SETTLE_SECONDS)
            pids = {name: pid for name in NAMES if (pid := panel.pid(name)) is not None}
            if engine:
                pids["engine"] = panel.engines()[0].pid
            before, began = {name: used(pid) for name, pid in pids.items()}, time.monotonic()
            time.sleep(seconds)
            after, took = {name: used(pid) for name, pid in pids.items()}, time.monotonic() - began
    finally:
        panel.stop()
    rows = {
        name: {
            "cpu_percent": round(100 * (after[name].cpu_seconds - before[name].cpu_seconds) / took, 2),
            "wakeups_per_second": round((after[name].wakeups - before[name].wakeups) / took, 1),
        }
        for name in pids
    }
    ours = [row for name, row in rows.items() if name != "engine"]
    return {
        "processes": rows,
        "cpu_percent": round(sum(r["cpu_percent"] for r in ours), 2),
        "wakeups_per_second": round(sum(r["wakeups_per_second"] for r in ours), 1),
    }


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--seconds", type=float, default=60.0)
    arguments.add_argument("--page", action="store_true")
    arguments.add_argument("--engine", action="store_true")
    options = arguments.parse_args()
    figures = {**machine(), **measure(options.seconds, options.page, options.engine)}
    if options.json:
        print(json.dumps(figures))
        return 0
    print(f"cores {figures['cores']}, load before {figures['load_before']}")
    print(f"{'process':12} {'CPU %':>8} {'wakeups/s':>10}")
    for name, row in figures["processes"].items():
        print(f"{name:12} {row['cpu_percent']:8.2f} {row['wakeups_per_second']:10.1f}")
    print(f"{'the panel':12} {figures['cpu_percent']:8.2f} {figures['wakeups_per_second']:10.1f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
