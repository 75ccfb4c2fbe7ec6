"""The ledger's first place: a file per gateway process to which every request adds a line when it begins and one
when it ends.

A line is one ``write`` to a local file, microseconds; the database is filled from it elsewhere (``ledger.py``), so no
request waits for the database and a killed process loses nothing that had happened. The writer holds a lock
(``flock``) on its file for as long as it lives: the kernel lets go of it when the process dies, however it dies, and
that is how a reader knows that nothing will follow. Numbers, the served name and the path are written; never a word of
a prompt.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import socket
import time
from collections import deque
from functools import lru_cache
from pathlib import Path

import structlog

from apps.gateway.observer import Exchange

log = structlog.get_logger(__name__)
SUFFIX = ".spool"
DRAFT_SUFFIX = ".draft"
SEGMENT_BYTES_MAX = 16 * 1024 * 1024
# While the disk takes nothing, lines wait in memory: this many are some tens of MB and hours of a team's use.
WAITING_LINES_MAX = 100_000
RETRY_S = 1.0
TEXT_LENGTH_MAX = 200


class Segment:
    """One file: open, locked, and open until the last of its requests has ended."""

    def __init__(self, folder: Path) -> None:
        self.name = f"{socket.gethostname()[:60]}-{os.getpid()}-{time.time_ns()}-{secrets.token_hex(3)}"
        self.lines = 0  # the number of the last opened request
        self.written_bytes = 0
        self.promised_bytes = 0  # with what waits for room on the disk
        self.running = 0
        self._torn = False
        draft = folder / f"{self.name}{DRAFT_SUFFIX}"
        self._fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            # Locked before it has the name that readers look for: an unlocked file is one whose writer is dead.
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            draft.rename(folder / f"{self.name}{SUFFIX}")
        except OSError:
            self.close()
            draft.unlink(missing_ok=True)
            raise

    def write(self, line: bytes) -> None:
        """Raises OSError when the line is not (wholly) there; a torn one is closed off before the next."""
        data = b"\n" + line if self._torn else line
        written = os.write(self._fd, data)
        self.written_bytes += written
        self._torn = written < len(data) and not (self._torn and written == 0)
        if written < len(data):
            raise OSError(28, "No space left on device")  # ENOSPC: the disk took a part

    def close(self) -> None:
        os.close(self._fd)


class Spool:
    """What this process writes. All of it belongs to the event loop's thread."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lost_lines = 0
        self.names: deque[str] = deque(maxlen=50)  # of this process's last files
        self._segment: Segment | None = None
        self._waiting: deque[tuple[Segment, bytes]] = deque()
        self._retry_at = 0.0
        self._trouble = ""

    @property
    def trouble(self) -> str:
        """Why lines are not on disk at the moment; empty when all are."""
        return self._trouble

    @property
    def waiting_lines(self) -> int:
        return len(self._waiting)

    def position(self) -> tuple[str, int]:
        """The present file's name and length; empty before the first request."""
        return ("", 0) if self._segment is None else (self._segment.name, self._segment.written_bytes)

    def opened(self, exchange: Exchange, model: str) -> tuple[Segment, int] | None:
        """Write that a request for this (served) model begins. The mark goes to ``closed``; None: there is no file."""
        segment = self._current()
        if segment is None:
            self.lost_lines += 1
            return None
        segment.lines += 1
        segment.running += 1
        task = f',"task":{_text(exchange.task)}' if exchange.task else ""
        self._put(
            segment,
            f'{{"o":{segment.lines},"at":{exchange.began_at:.3f},"user":{exchange.user_id},"key":{exchange.key_id},'
            f'"model":{_text(model)},"path":{_text(exchange.path)}{task}}}\n',
        )
        return segment, segment.lines

    def refused(self, minute: int, user_id: int, key_id: int, model: str, code: str, count: int) -> None:
        """Write how often requests of a key were refused in a minute (its beginning in POSIX time)."""
        segment = self._current()
        if segment is None:
            self.lost_lines += 1
            return
        self._put(
            segment,
            f'{{"r":{count},"at":{minute},"user":{user_id},"key":{key_id},"model":{_text(model)},"code":{_text(code)}}}\n',
        )

    def closed(self, mark: tuple[Segment, int], exchange: Exchange, model: str) -> None:
        segment, number = mark
        self._put(
            segment,
            f'{{"c":{number},"model":{_text(model)},"dep":{_number(exchange.deployment_id)},'
            f'"ver":{_number(exchange.version_id)},"in":{_number(exchange.tokens_in)},'
            f'"out":{_number(exchange.tokens_out)},"cached":{_number(exchange.tokens_cached)},'
            f'"ttft":{_milliseconds(exchange.first_token_s)},"wait":{_milliseconds(exchange.waited_s)},'
            f'"ms":{_milliseconds(exchange.duration_s)},"status":{_number(exchange.status)},'
            f'"outcome":{_text(exchange.outcome)}}}\n',
        )
        segment.running -= 1
        self._let_go(segment)

    def flush(self) -> bool:
        """Try again to write what the disk did not take. True when nothing is left."""
        while self._waiting:
            segment, line = self._waiting[0]
            try:
                segment.write(line)
            except OSError as error:
                self._fail(error)
                return False
            self._waiting.popleft()
            self._let_go(segment)
        if self._trouble:
            log.info("the usage ledger is written again", lost_lines=self.lost_lines)
            self._trouble = ""
        return True

    def close(self) -> None:
        """At the process's end. What has not ended by now is found without a closing line."""
        self.flush()
        if self._segment is not None:
            self._segment.close()
            self._segment = None

    # -- inside -----------------------------------------------------------------------------------

    def _current(self) -> Segment | None:
        segment = self._segment
        if segment is not None and segment.written_bytes < SEGMENT_BYTES_MAX:
            return segment
        if segment is None and self._trouble and time.monotonic() < self._retry_at:
            return None
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._segment = Segment(self.folder)
            self.names.append(self._segment.name)
        except OSError as error:
            self._fail(error)
            return segment  # rather a long file than none
        if segment is not None:
            self._let_go(segment)
        return self._segment

    def _put(self, segment: Segment, line: str) -> None:
        data = line.encode()
        segment.promised_bytes += len(data)
        if not self._waiting:
            try:
                segment.write(data)
            except OSError as error:
                self._fail(error)
            else:
                return
        elif time.monotonic() >= self._retry_at and self.flush():
            segment.promised_bytes -= len(data)
            return self._put(segment, line)
        if len(self._waiting) < WAITING_LINES_MAX:
            self._waiting.append((segment, data))
        else:
            self.lost_lines += 1

    def _let_go(self, segment: Segment) -> None:
        """Close a file that was rotated away from once nothing more will be written to it."""
        done = segment is not self._segment and segment.running == 0
        if done and not any(waiting is segment for waiting, _ in self._waiting):
            with contextlib.suppress(OSError):
                segment.close()

    def _fail(self, error: OSError) -> None:
        self._retry_at = time.monotonic() + RETRY_S
        reason = error.strerror or str(error)
        if not self._trouble:
            log.error(
                "the usage ledger cannot be written; requests are served and their lines wait in memory",
                folder=str(self.folder),
                reason=reason,
            )
        self._trouble = reason


# Written by hand: json.dumps of a dictionary takes four times as long (measured), twice for each request.
@lru_cache(maxsize=1024)
def _text(text: str) -> str:
    return json.dumps(text[:TEXT_LENGTH_MAX])


def _number(value: int | None) -> str:
    return "null" if value is None else str(value)


def _milliseconds(seconds: float | None) -> str:
    return "null" if seconds is None else str(round(seconds * 1000))
