"""How long ``make up`` takes until ``/readyz`` says 200, cold and warm, and what all processes hold when idle.

    python benchmarks/start.py [--json] [--warm-only] [--rounds 3]

*Cold* is a fresh copy of the tracked files without environment or data: it includes making the environment and
installing every dependency from the configured index. *Warm* is every later ``make up`` on the same data, the
median of the rounds, with the processor time that all processes had taken by then. Memory is read from
``/proc/PID/smaps_rollup`` after half a minute of idling: PSS counts a page that several processes share once in all,
RSS counts it in each.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._figures import machine, parser
from benchmarks.idle import used
from tests.panel import NAMES, REPOSITORY, Panel, wait_for

AIM_MEMORY_MB = 450
IDLE_SECONDS = 30


def copy_of_the_tracked_files(target: Path) -> None:
    names = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, check=True).stdout.split(
        b"\0"
    )
    for name in filter(None, names):
        source = REPOSITORY / os.fsdecode(name)
        if source.is_file():
            (target / os.fsdecode(name)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / os.fsdecode(name))


def make_up(panel: Panel, place: Path) -> float:
    """Start it there; the seconds until everything was well."""
    started = time.monotonic()
    with panel.output.open("ab") as output:
        process = panel.process = subprocess.Popen(
            ["make", "--no-print-directory", f"PYTHON={getattr(sys, '_base_executable', sys.executable)}", "up"],
            cwd=place,
            env=panel.environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )

    def ready() -> bool:
        if process.poll() is not None:
            raise SystemExit(f"make up ended by itself:\n{panel.said()}")
        return panel.is_ready()

    wait_for("readiness", ready, seconds=600)
    return time.monotonic() - started


def memory_mb(panel: Panel) -> dict[str, dict[str, float]]:
    found = {}
    for name in NAMES:
        pid = panel.pid(name)
        if not pid:
            continue
        fields = {}
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
            key, _, value = line.partition(":")
            fields[key] = int(value.split()[0]) * 1024 / 1e6
        found[name] = {"pss": round(fields["Pss"], 1), "rss": round(fields["Rss"], 1)}
    found["together"] = {k: round(sum(m[k] for m in found.values()), 1) for k in ("pss", "rss")}
    return found


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--warm-only", action="store_true", help="in this checkout, with the environment it has")
    arguments.add_argument("--rounds", type=int, default=3)
    options = arguments.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="rp-bench-", dir="/tmp"))
    panel = Panel(owner=False)
    place = REPOSITORY
    figures = machine()
    try:
        if not options.warm_only:
            place = folder / "clone"
            copy_of_the_tracked_files(place)
        seconds = make_up(panel, place)
        figures["cold_seconds" if not options.warm_only else "first_start_seconds"] = round(seconds, 1)
        warm, processor = [], []
        for _ in range(options.rounds):
            panel.interrupt()
            seconds = make_up(panel, place)
            warm.append(round(seconds, 2))
            pids = [pid for name in NAMES if (pid := panel.pid(name)) is not None]
            processor.append(round(sum(used(pid).cpu_seconds for pid in pids), 2))
        figures["warm_seconds"] = statistics.median(warm)
        figures["warm_rounds"] = warm
        figures["warm_cpu_seconds"] = statistics.median(processor)
        time.sleep(IDLE_SECONDS)
        figures["memory_mb"] = memory_mb(panel)
    finally:
        panel.stop()
        shutil.rmtree(folder, ignore_errors=True)
    if options.json:
        print(json.dumps(figures))
        return 0
    for name, value in figures.items():
        if name != "memory_mb":
            print(f"{name:22} {value}")
    for name, values in figures["memory_mb"].items():
        print(f"memory {name:15} PSS {values['pss']:6.1f} MB   RSS {values['rss']:6.1f} MB")
    print(f"aim: together at most {AIM_MEMORY_MB} MB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
