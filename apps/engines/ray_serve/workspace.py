"""A folder for one Ray session: its sockets, logs and token.

Not in the data directory: Ray puts unix sockets some sixty characters below it, and their paths end at 107. A
launcher that was killed leaves its folder behind; the next one removes it.

Only the standard library and the syntax of Python 3.10: this runs in Ray's own environment.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

# 107 less what Ray and we put below it: /rigpanel-ray-65534/12345678/session_<date>_<pid>/sockets/plasma_store.1
TEMPORARY_CHARACTERS = 12
OWNER = "owner"  # pid and start ticks of the launcher


@dataclass(frozen=True)
class Workspace:
    directory: Path
    token: str
    private: bool  # a network of its own

    @classmethod
    def make(cls, *, private: bool, root: Path | None = None) -> Workspace:
        root = root or session_root(tempfile.gettempdir(), os.getuid())
        root.mkdir(mode=0o700, exist_ok=True)
        if root.stat().st_uid != os.getuid() or root.is_symlink():
            raise PermissionError(f"{root} belongs to somebody else; remove it, or set TMPDIR.")
        root.chmod(0o700)
        sweep(root)
        directory = Path(tempfile.mkdtemp(prefix="", dir=root))
        (directory / OWNER).write_text(f"{os.getpid()} {_start_ticks(os.getpid())}")
        token = secrets.token_hex(32)
        made = cls(directory, token, private)
        with open(made.token_file, "w", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
            file.write(token)
        return made

    @property
    def token_file(self) -> Path:
        return self.directory / "token"

    @property
    def logs(self) -> Path:
        return self.directory / "session_latest" / "logs"

    @staticmethod
    def tail(path: Path, size: int = 4000) -> str:
        try:
            with open(path, "rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - size))
                return file.read().decode(errors="replace").strip()
        except OSError:
            return ""


def session_root(temporary: str, user: int) -> Path:
    """``/tmp`` where the user's own temporary folder is too deep for Ray's sockets."""
    return Path(temporary if len(temporary) <= TEMPORARY_CHARACTERS else "/tmp") / f"rigpanel-ray-{user}"  # noqa: S108


def sweep(root: Path) -> list[Path]:
    """Remove the folders of launchers that are gone. Returns what was removed."""
    removed = []
    for directory in root.iterdir():
        with contextlib.suppress(OSError, ValueError):
            pid, ticks = (directory / OWNER).read_text().split()
            if _start_ticks(int(pid)) != ticks:
                shutil.rmtree(directory, ignore_errors=True)
                removed.append(directory)
    return removed


def _start_ticks(pid: int) -> str:
    """When a process started, in ticks since boot (proc(5)); empty when it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in (b"Z", b"X") else fields[19].decode()
