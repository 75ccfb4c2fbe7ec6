"""A runner without processes: scripted, in memory, and held to the same contract as the real one."""

from __future__ import annotations

import itertools
import signal
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from apps.runners.protocol import (
    Handle,
    LaunchSpec,
    LogChunk,
    Observation,
    ProcessState,
    RunnerError,
    launch_directory,
)


@dataclass
class FakeScript:
    """How one engine behaves. ``immortal`` survives SIGKILL, as a process stuck in a driver does."""

    output: str = ""
    exit_code: int | None = None  # ends at once with this code
    ignores: tuple[str, ...] = ()  # names of signals
    stop_exit_code: int | None = None  # instead of minus the signal's number
    children: int = 0
    children_survive: bool = False  # the first process ends alone
    memory_rss_bytes: int = 64 * 1024 * 1024
    launch_error: str | None = None
    immortal: bool = False


@dataclass
class _Engine:
    spec: LaunchSpec
    script: FakeScript
    handle: Handle
    leader_alive: bool = True
    child_pids: list[int] = field(default_factory=list)
    exit_code: int | None = None
    exited_at: float | None = None
    recorded: bool = True
    log: bytearray = field(default_factory=bytearray)
    log_start: int = 0
    signals: list[str] = field(default_factory=list)


class FakeRunner:
    """``scripts`` by launch id; without one an engine runs until it is stopped."""

    name = "fake"

    def __init__(self, root: object = None, scripts: dict[str, FakeScript] | None = None) -> None:
        self.scripts = scripts if scripts is not None else {}
        self.engines: dict[str, _Engine] = {}
        self.withdrawn: set[str] = set()
        self._pids = itertools.count(100_000)
        self._lock = threading.Lock()

    def launch(self, spec: LaunchSpec) -> Handle:
        launch_directory(Path("/"), spec.launch_id)  # for its check of the id
        with self._lock:
            if spec.launch_id in self.engines:
                return self.engines[spec.launch_id].handle
            if spec.launch_id in self.withdrawn:
                raise RunnerError(f"Launch {spec.launch_id} was given up before it began; start it anew.")
            script = self.scripts.get(spec.launch_id, FakeScript())
            if script.launch_error is not None:
                raise RunnerError(script.launch_error)
            handle = Handle(
                runner=self.name,
                launch_id=spec.launch_id,
                directory="",
                pid=next(self._pids),
                create_time=time.time(),
                engine_pid=next(self._pids),
                engine_create_time=time.time(),
            )
            engine = _Engine(spec, script, handle)
            engine.child_pids = [next(self._pids) for _ in range(script.children)]
            self.engines[spec.launch_id] = engine
        self.emit(spec.launch_id, script.output)
        if script.exit_code is not None:
            self.end(spec.launch_id, script.exit_code)
        return handle

    def withdraw(self, launch_id: str) -> Handle | None:
        self.withdrawn.add(launch_id)
        return self.recover(launch_id)

    def recover(self, launch_id: str) -> Handle | None:
        engine = self.engines.get(launch_id)
        return None if engine is None else engine.handle

    def observe(self, handle: Handle) -> Observation:
        engine = self._engine(handle)
        if engine is None:
            return Observation(ProcessState.LOST)
        pids = tuple(engine.child_pids)
        memory = engine.script.memory_rss_bytes if pids or engine.leader_alive else None
        if engine.leader_alive:
            leader = int(handle.engine_pid or 0)
            return Observation(ProcessState.RUNNING, pids=(leader, *pids), memory_rss_bytes=memory)
        if not engine.recorded:
            return Observation(ProcessState.LOST, pids=pids, memory_rss_bytes=memory)
        return Observation(ProcessState.EXITED, engine.exit_code, engine.exited_at, pids, memory)

    def stop(self, handle: Handle) -> Observation:
        engine = self._engine(handle)
        if engine is None:
            return Observation(ProcessState.LOST)
        for name, _ in engine.spec.stop_signals:
            if not engine.leader_alive and not engine.child_pids:
                break
            engine.signals.append(name)
            number = -int(signal.Signals[name])
            if engine.script.immortal or (name in engine.script.ignores and name != "SIGKILL"):
                continue
            engine.child_pids = []
            if engine.leader_alive:
                graceful = engine.script.stop_exit_code if name != "SIGKILL" else None
                self.end(handle.launch_id, number if graceful is None else graceful)
        if engine.leader_alive or engine.child_pids:
            raise RunnerError(f"Launch {handle.launch_id} survived every signal, SIGKILL included.")
        return self.observe(handle)

    def logs(self, handle: Handle, offset: int = 0, max_bytes: int = 65536) -> LogChunk:
        engine = self._engine(handle)
        if engine is None:
            return LogChunk("", max(0, offset))
        end = engine.log_start + len(engine.log)
        begin = max(engine.log_start, min(end + offset if offset < 0 else offset, end))
        data = bytes(engine.log[begin - engine.log_start :][:max_bytes])
        return LogChunk(data.decode(errors="replace"), begin + len(data))

    def forget(self, launch_id: str) -> None:
        engine = self.engines.get(launch_id)
        if engine is not None and (engine.leader_alive or engine.child_pids):
            raise RunnerError(f"Launch {launch_id} is still running; stop it first.")
        self.engines.pop(launch_id, None)
        self.withdrawn.discard(launch_id)

    # -- what a test makes happen -----------------------------------------------------------

    def emit(self, launch_id: str, text: str) -> None:
        """The engine prints; the oldest output goes when the bound is reached."""
        engine = self.engines[launch_id]
        engine.log += text.encode()
        excess = len(engine.log) - engine.spec.log_max_bytes
        if excess > 0:
            del engine.log[:excess]
            engine.log_start += excess

    def end(self, launch_id: str, exit_code: int) -> None:
        """The engine's first process ends by itself; negative is a signal."""
        engine = self.engines[launch_id]
        engine.leader_alive = False
        engine.exit_code = exit_code
        engine.exited_at = time.time()
        if not engine.script.children_survive:
            engine.child_pids = []

    def lose(self, launch_id: str) -> None:
        """The engine is gone and nobody wrote down how, as after a power cut."""
        engine = self.engines[launch_id]
        engine.leader_alive = False
        engine.child_pids = []
        engine.recorded = False

    def _engine(self, handle: Handle) -> _Engine | None:
        engine = self.engines.get(handle.launch_id)
        return engine if engine is not None and engine.handle.pid == handle.pid else None
