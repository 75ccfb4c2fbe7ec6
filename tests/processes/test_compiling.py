"""What small processes load is compiled once, before they start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from rigpanel.processes import LEAN
from tests.panel import REPOSITORY


def test_what_small_processes_load_is_compiled_once(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"PYTHONPYCACHEPREFIX": str(tmp_path / "compiled"), "RIGPANEL_DATA_DIR": str(tmp_path / "data")}

    def begin() -> str:
        code = "from rigpanel import compiling as c; p = c.begin(); print(p and p.wait(120))"
        answer = subprocess.run(
            [sys.executable, "-c", code], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=180
        )
        return answer.stdout.strip() or answer.stderr

    assert begin() == "0", "every module that is named there can be loaded"
    assert begin() == "None", "it was done before"
    made = [path.name for path in (tmp_path / "compiled").rglob(f"*.opt-{LEAN.count('O')}.pyc")]
    assert len(made) > 1000
