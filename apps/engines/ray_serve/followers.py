"""Copies the lines that Ray's workers write into files to standard output, where the panel's log is.

Only the standard library and the syntax of Python 3.10: this runs in Ray's own environment.
"""

# ruff: noqa: T201 - standard output is the launcher's log

from __future__ import annotations

import asyncio
import re
from pathlib import Path

LOOK_SECONDS = 0.5
READ_BYTES = 256 * 1024  # of one file in one look: a flood must not hold the others back
# worker-<worker id>-<job id>-<pid>.err; the controller, the proxy, the replicas and vLLM's own workers each have a pair
WORKER_LOG = re.compile(r"worker-[0-9a-f]+-[0-9a-f]+-(\d+)\.(?:out|err)\Z")
MARKER = re.compile(rb"^:(?:job_id|actor_name|task_name):|^:\S+:?$")  # written by Ray for its own log monitor
COLOUR = re.compile(rb"\x1b\[[0-9;]*m")


class LogFollower:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._offsets: dict[str, int] = {}

    async def run(self) -> None:
        while True:
            for line in self.look():
                print(line, flush=True)
            await asyncio.sleep(LOOK_SECONDS)

    def look(self) -> list[str]:
        """Whole lines that are new, each with the pid of who wrote it."""
        lines = []
        for path in sorted(self.folder.glob("worker-*")):
            named = WORKER_LOG.match(path.name)
            if named is None:
                continue
            try:
                with open(path, "rb") as file:
                    file.seek(self._offsets.get(path.name, 0))
                    data = file.read(READ_BYTES)
            except OSError:
                continue
            whole = data.rpartition(b"\n")[0] or (data if len(data) == READ_BYTES else b"")
            self._offsets[path.name] = self._offsets.get(path.name, 0) + len(whole) + (whole != data and whole != b"")
            for raw in whole.split(b"\n"):
                text = COLOUR.sub(b"", raw.rpartition(b"\r")[2] or raw).rstrip()
                if text and not MARKER.match(text):
                    lines.append(f"(pid {named[1]}) {text.decode(errors='replace')}")
        return lines
