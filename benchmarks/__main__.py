"""``make bench``: every published figure, measured here, one script after the other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.panel import OWNER, PASSWORD, REPOSITORY, Panel


def run(name: str, *arguments: str) -> bool:
    print(f"\n=== {name}", flush=True)
    return subprocess.call([sys.executable, f"benchmarks/{name}.py", *arguments], cwd=REPOSITORY) == 0


def main() -> int:
    done = [run("start")]
    with Panel() as panel:
        panel.start()
        done.append(run("page_weight", panel.url, OWNER, PASSWORD))
    # The others start what they need by themselves.
    for script in sorted(Path(__file__).parent.glob("[a-z]*.py")):
        if script.stem not in ("start", "page_weight"):
            done.append(run(script.stem))
    return 0 if all(done) else 1


if __name__ == "__main__":
    raise SystemExit(main())
