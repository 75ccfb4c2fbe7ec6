"""What all of the panel's processes hold together when idle, process by process.

    python benchmarks/memory.py [--seconds 60] [--page] [--json]

PSS counts a page that several processes share once in all, RSS counts it in each; both from
``/proc/PID/smaps_rollup``. ``--page`` leaves a browser on the rig page meanwhile, with both of its sockets.
Engines are not the panel's; none runs here.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._figures import parser
from tests.panel import NAMES, OWNER, PASSWORD, Panel

AIM_MB = 450.0
GPUSTACK_SERVER_MB = 603.0  # RSS of GPUStack's server alone when idle, measured on the same kind of machine


def held_mb(pid: int) -> tuple[float, float, int]:
    """PSS and RSS in megabytes (10^6), and the number of threads."""
    fields = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, _, value = line.partition(":")
        fields[name] = int(value.split()[0]) * 1024 / 1e6
    return fields["Pss"], fields["Rss"], len(list(Path(f"/proc/{pid}/task").iterdir()))


@contextlib.contextmanager
def open_page(url: str) -> Iterator[None]:
    from playwright.sync_api import sync_playwright

    from benchmarks.page_weight import ARGUMENTS, CHROMIUM, sign_in

    with sync_playwright() as driver:
        page = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS).new_page()
        sign_in(page, url, OWNER, PASSWORD)
        yield


def measure(seconds: float, page: bool) -> dict[str, Any]:
    panel = Panel().start()
    try:
        with open_page(panel.url) if page else contextlib.nullcontext():
            time.sleep(seconds)
            rows = {name: held_mb(pid) for name in NAMES if (pid := panel.pid(name)) is not None}
        counted = {stat.pid for stat in panel.members()}
        missed = counted - {panel.pid(name) for name in NAMES}
        if missed:
            raise SystemExit(f"not in the table: {missed}")
    finally:
        panel.stop()
    return {
        "processes": {n: {"pss_mb": round(p, 1), "rss_mb": round(r, 1), "threads": t} for n, (p, r, t) in rows.items()},
        "pss_mb": round(sum(p for p, _, _ in rows.values()), 1),
        "rss_mb": round(sum(r for _, r, _ in rows.values()), 1),
    }


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--seconds", type=float, default=60.0)
    arguments.add_argument("--page", action="store_true")
    options = arguments.parse_args()
    figures = measure(options.seconds, options.page)
    if options.json:
        print(json.dumps(figures))
        return 0
    print(f"{'process':12} {'PSS MB':>8} {'RSS MB':>8} {'threads':>8}")
    for name, row in figures["processes"].items():
        print(f"{name:12} {row['pss_mb']:8.1f} {row['rss_mb']:8.1f} {row['threads']:8}")
    print(f"{'together':12} {figures['pss_mb']:8.1f} {figures['rss_mb']:8.1f}")
    for name in ("rss_mb", "pss_mb"):
        word = "met" if figures[name] <= AIM_MB else "not met"
        print(f"aim: at most {AIM_MB:.0f} MB, as {name[:3].upper()} {word}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
