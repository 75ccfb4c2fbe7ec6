"""Starts engines as transient systemd units, outside the cgroup of whoever launches them.

For a panel that is itself a systemd service: stopping that service ends every process of its
cgroup, the process runner's shims included. A transient unit has a cgroup of its own.

The unit runs the same shim as the process runner, so logs, exit codes and handles are the same
files, and observing, reading and stopping are inherited; only starting differs. The command line
is a pure function and tested; the runner as a whole was not run against a live systemd, because
there was none where it was written.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from apps.runners import shim
from apps.runners.process import POLL_SECONDS, SHIM_START_SECONDS, ProcessRunner, StillStarting
from apps.runners.protocol import RunnerError

UNIT_PREFIX = "rigpanel-engine-"


def start_command(launch_id: str, directory: Path, *, user: bool, python: str) -> tuple[str, ...]:
    """The ``systemd-run`` line of one launch; its ids are safe in a unit name as they are.

    The engine's environment and its secret go by files of the launch (0600), never by
    ``--setenv``, which everybody may read with ``systemctl show``. ``KillMode=process``: when the
    shim is killed, the engine in the same cgroup must live on. ``Type=exec``: systemd-run itself
    fails when the shim cannot be executed.
    """
    return (
        "systemd-run",
        "--user" if user else "--system",
        f"--unit={UNIT_PREFIX}{launch_id}",
        f"--description=rigpanel engine {launch_id}",
        "--collect",
        "--quiet",
        "--service-type=exec",
        "--property=KillMode=process",
        "--property=OOMPolicy=continue",
        f"--property=StandardOutput=append:{directory / 'shim.log'}",
        f"--property=StandardError=append:{directory / 'shim.log'}",
        "--",
        *(python, "-I", "-S", shim.__file__, str(directory), "-1"),
    )


class SystemdRunner(ProcessRunner):
    """``user``: units of this user's own manager (needs lingering), else of the system's (root)."""

    name = "systemd"

    def __init__(self, root: Path, user: bool | None = None) -> None:
        super().__init__(root)
        self.user = os.geteuid() != 0 if user is None else user

    def available(self) -> bool:
        return self.unavailable_because() is None

    def unavailable_because(self) -> str | None:
        """Half a sentence, or None when units can be started here."""
        if not Path("/run/systemd/system").is_dir():
            return "this machine does not run systemd"
        if shutil.which("systemd-run") is None:
            return "there is no systemd-run on the PATH"
        if self.user and not os.environ.get("XDG_RUNTIME_DIR"):
            return "this user has no systemd session (run: loginctl enable-linger)"
        return None

    def _start_shim(self, launch_id: str, directory: Path, lock: int) -> None:
        command = start_command(launch_id, directory, user=self.user, python=sys.executable)
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SHIM_START_SECONDS, check=False)
        except OSError as error:
            raise RunnerError(f"systemd-run did not start a unit: {error}.") from error
        except subprocess.TimeoutExpired as error:
            raise StillStarting(f"systemd-run did not start a unit: {error}.") from error
        if done.returncode != 0 and "already" not in done.stderr:  # perhaps the manager only answered too late
            raise StillStarting(f"systemd-run did not start a unit: {done.stderr.strip() or done.returncode}.")
        # A unit that is there already was started by a launcher that died before its shim was up.
        deadline = time.monotonic() + SHIM_START_SECONDS
        while not any((directory / name).exists() for name in ("started.json", "failed.json")):
            if time.monotonic() > deadline:
                raise StillStarting(
                    f"The unit {UNIT_PREFIX}{launch_id} did not start its engine; see {directory}/shim.log."
                )
            time.sleep(POLL_SECONDS)
