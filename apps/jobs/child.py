"""Programs that a job runs: argv without a shell, output line by line, and never left behind."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import psutil

from apps.common.identity import birth_mark, lives
from apps.jobs.runner import JobContext

TERM_GRACE_SECONDS = 5.0
TAIL_LINES = 60
LINE_MAX = 4000


class ChildFailed(Exception):
    """The program ended with another code than 0, or did not end in time (``code`` is None then)."""

    def __init__(self, code: int | None, tail: list[str]) -> None:
        super().__init__(f"exit code {code}")
        self.code = code
        self.tail = tail


def plain_environment() -> dict[str, str]:
    """Ours without what is the panel's own: secrets stay out, and no PYTHONPATH leads back into the panel."""
    drop = ("RIGPANEL_", "DJANGO_", "CELERY_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(drop)}
    for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__"):
        kept.pop(name, None)
    return kept | {
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_NO_INPUT": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONUTF8": "1",
    }


def run(
    context: JobContext,
    argv: Sequence[str],
    *,
    on_line: Callable[[str], None],
    timeout_seconds: float,
    stdin: str = "",
    environment: Mapping[str, str] | None = None,
) -> list[str]:
    """Run to the end; returns the last lines. Raises ChildFailed. What goes to ``stdin`` is seen by nobody else.

    It has a session of its own, so that cancelling ends its whole group; its identity is stored with the job first, so
    that a worker which takes the job over ends what a killed one left running.
    """
    end_leftover(context)
    process = subprocess.Popen(
        list(argv),
        stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**plain_environment(), **(environment or {})},
        start_new_session=True,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    lines: queue.Queue[str | None] = queue.Queue()
    reader = threading.Thread(target=_read, args=(process, lines), daemon=True)
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    deadline = time.monotonic() + timeout_seconds
    try:
        context.save_data(child=[process.pid, birth_mark(process.pid)])
        reader.start()
        if process.stdin is not None:
            with suppress(BrokenPipeError), process.stdin:
                process.stdin.write(stdin)
        while True:
            context.check()
            if time.monotonic() > deadline:
                raise ChildFailed(None, list(tail))
            try:
                line = lines.get(timeout=0.3)
            except queue.Empty:
                continue
            if line is None:
                break
            tail.append(line)
            on_line(line)
        code = process.wait(timeout=30)
    except BaseException:
        end_group(process.pid)
        process.wait()
        raise
    context.save_data(child=None)
    if code != 0:
        raise ChildFailed(code, list(tail))
    return list(tail)


def end_leftover(context: JobContext) -> None:
    """End what an earlier attempt at this job left running, if it is still the same process."""
    child = context.job.data.get("child")
    if not child:
        return
    pid, mark = child
    if lives(int(pid), str(mark)):
        context.log("An earlier attempt was still running; it is ended first.")
        end_group(pid)


def end_group(pid: int) -> None:
    """SIGTERM, some seconds, SIGKILL, to the group that ``pid`` leads."""
    for number, patience in ((signal.SIGTERM, TERM_GRACE_SECONDS), (signal.SIGKILL, TERM_GRACE_SECONDS)):
        try:
            os.killpg(pid, number)
        except (ProcessLookupError, PermissionError):
            return
        until = time.monotonic() + patience
        while time.monotonic() < until:
            if not _group_lives(pid):
                return
            time.sleep(0.05)


def _group_lives(group: int) -> bool:
    for process in psutil.process_iter(["pid", "status"]):
        with suppress(OSError):
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                return True
    return False


def _read(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert process.stdout is not None  # noqa: S101 - it is a pipe
    with suppress(ValueError, OSError):
        for line in process.stdout:
            if text := line.rstrip()[:LINE_MAX]:
                lines.put(text)
    lines.put(None)
