"""Starts one of the panel's processes so that it cannot outlive its supervisor.

Run as ``python -I -S child.py SUPERVISOR_PID SIGNAL NAME_FILE PROGRAM ARG…``. Only the standard
library, because it runs before every process; then it becomes the program.

Killing the supervisor with SIGKILL would leave its children running and holding ports. The kernel
can send each of them a signal in that case (prctl(2), PR_SET_PDEATHSIG), and keeps the promise
through exec. Engines are not started from here: they outlive all of this.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    supervisor_pid, death_signal, name_file, *argv = sys.argv[1:]
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from apps.runners.shim import boot_id, start_ticks

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, int(death_signal), 0, 0, 0) != 0:
        print(f"prctl: {os.strerror(ctypes.get_errno())}", file=sys.stderr)  # noqa: T201
    if os.getppid() != int(supervisor_pid):
        sys.exit("The supervisor is gone already.")  # it died before the kernel was asked
    draft = Path(f"{name_file}.new")
    draft.write_text(json.dumps({"pid": os.getpid(), "ticks": start_ticks(os.getpid()), "boot": boot_id()}))
    draft.replace(name_file)
    try:
        os.execvp(argv[0], argv)  # noqa: S606
    except OSError as error:
        sys.exit(f"{argv[0]} cannot be started: {error.strerror}.")


if __name__ == "__main__":
    main()
