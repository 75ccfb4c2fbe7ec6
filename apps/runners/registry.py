"""Which runner this machine uses."""

from __future__ import annotations

from pathlib import Path

from apps.runners.process import ProcessRunner
from apps.runners.protocol import Runner, RunnerError
from apps.runners.systemd import SystemdRunner

SETTINGS = ("auto", "process", "systemd")


def choose_runner(setting: str, root: Path) -> Runner:
    """``auto`` is ``process``: it works everywhere. ``systemd`` must be asked for, since it is what
    keeps engines alive when the panel itself runs as a systemd service."""
    if setting in ("auto", "process"):
        return ProcessRunner(root)
    if setting != "systemd":
        raise RunnerError(f"There is no runner {setting!r}; choose one of {', '.join(SETTINGS)}.")
    runner = SystemdRunner(root)
    why_not = runner.unavailable_because()
    if why_not is not None:
        raise RunnerError(f"RIGPANEL_RUNNER is systemd, but {why_not}. Use process, or fix that.")
    return runner
