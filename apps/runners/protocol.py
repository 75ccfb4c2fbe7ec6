"""How engines are started, found again and stopped: the Runner protocol and its plain values.

A runner never parents an engine to the panel: the engine outlives the worker, the web process
and ``make up``, and is found again by its handle.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

HANDLE_VERSION = 2


class RunnerError(Exception):
    """The runner could not do what was asked; the message says what happened and what to do."""


@dataclass(frozen=True, slots=True)
class LaunchSpec:
    """One engine process (group) to start.

    ``launch_id`` names the launch for ever (letters, digits, ``-``): launching the same id twice
    returns the living first one. ``secret_env`` is handed over by a 0600 file, never by argv, and
    is not kept in the handle or shown anywhere. ``stop_signals`` go to the whole group; with ``ask_first_seconds`` the
    engine's first process alone is asked before that (SIGTERM), and has so long to end the others in order.
    """

    launch_id: str
    argv: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)
    secret_env: dict[str, str] = field(default_factory=dict)
    cwd: str | None = None
    log_max_bytes: int = 8 * 1024 * 1024
    stop_signals: tuple[tuple[str, float], ...] = (("SIGTERM", 20.0), ("SIGKILL", 10.0))
    ask_first_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Handle:
    """Finds a launched engine again after any restart; versioned, stored as JSON on the row.

    ``(boot_id, pid, ticks)`` identify the shim, ``(boot_id, engine_pid, engine_ticks)`` the engine's
    first process, which leads its own session and process group. Ticks count from the boot, so they
    stay the same when the clock is set. ``create_time``, in seconds since the epoch as psutil reports
    it, is all that a handle of version 1 has, and only such a one is judged by it.
    """

    runner: str
    launch_id: str
    directory: str
    pid: int
    create_time: float
    engine_pid: int | None = None
    engine_create_time: float | None = None
    boot_id: str = ""
    ticks: int | None = None
    engine_ticks: int | None = None
    version: int = HANDLE_VERSION

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Handle:
        """Raises RunnerError for a handle written by a newer version."""
        if int(data.get("version", 0)) > HANDLE_VERSION:
            raise RunnerError(
                f"This engine was started by a newer rigpanel (handle version {data.get('version')}); "
                "upgrade this panel or stop the engine with the newer one."
            )
        names = set(cls.__dataclass_fields__)
        return cls(**{k: v for k, v in data.items() if k in names})


class ProcessState(StrEnum):
    RUNNING = "running"
    EXITED = "exited"
    LOST = "lost"  # neither alive nor an exit code on record (power cut, shim killed)


@dataclass(frozen=True, slots=True)
class Observation:
    """What a look at a handle shows; ``pids`` are all living members of the engine's group."""

    state: ProcessState
    exit_code: int | None = None  # negative: ended by that signal, as subprocess says it
    exited_at: float | None = None
    pids: tuple[int, ...] = ()
    memory_rss_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class LogChunk:
    """``text`` from ``offset`` on; ``next_offset`` continues. Offsets count all bytes ever
    written; what the bound has cut away is skipped."""

    text: str
    next_offset: int


@runtime_checkable
class Runner(Protocol):
    name: str

    def launch(self, spec: LaunchSpec) -> Handle:
        """Start it, or return the living launch of the same id. Raises RunnerError; then no engine begins later."""

    def withdraw(self, launch_id: str) -> Handle | None:
        """See to it that this launch does not begin any more, whoever is just starting it; its handle where it has
        begun already (stop that then). Idempotent."""

    def recover(self, launch_id: str) -> Handle | None:
        """Find a launch by its id after a restart that lost the handle; None if never launched."""

    def observe(self, handle: Handle) -> Observation:
        """Look without disturbing. Never raises for a process that is gone."""

    def stop(self, handle: Handle) -> Observation:
        """Stop the whole group by the ladder of signals in the spec; returns how it ended.
        Idempotent. Raises RunnerError if something survived SIGKILL."""

    def logs(self, handle: Handle, offset: int = 0, max_bytes: int = 65536) -> LogChunk:
        """Read the engine's output from ``offset``; a negative offset counts from the end."""

    def forget(self, launch_id: str) -> None:
        """Delete the files of an ended launch. Raises RunnerError while something of it is alive."""


def launch_directory(root: Path, launch_id: str) -> Path:
    """Where a launch keeps its files; refuses ids that could leave ``root``."""
    if not launch_id or not all(c.isalnum() or c == "-" for c in launch_id):
        raise RunnerError(f"A launch id has letters, digits and '-' only, not {launch_id!r}.")
    return root / launch_id
