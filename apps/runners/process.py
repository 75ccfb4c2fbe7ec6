"""Starts engines as plain processes behind a shim (see ``shim.py``), without any service manager.

Everything is on disk: any process that has the same root and the same user can find an engine,
read its log and stop it, whoever launched it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from apps.runners import processes, shim
from apps.runners.protocol import (
    Handle,
    LaunchSpec,
    LogChunk,
    Observation,
    ProcessState,
    RunnerError,
    launch_directory,
)
from apps.runners.shim import ProcessStat

SHIM_START_SECONDS = 30.0  # a cold disk can take seconds to load Python
EXIT_RECORD_SECONDS = 3.0  # how long the shim may take to write down what it saw
POLL_SECONDS = 0.05
LAUNCH_MARKER = "RIGPANEL_LAUNCH_ID"

# What an engine inherits from whoever launches it. An allow-list, because the panel's own
# environment holds its database password and the owner's first password.
INHERITED_ENVIRONMENT = (
    *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "TMPDIR", "XDG_CACHE_HOME", "XDG_RUNTIME_DIR"),
    *("LANG", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH", "CUDA_HOME", "HF_HOME", "HF_ENDPOINT"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"),
    *("http_proxy", "https_proxy", "no_proxy"),
    # Where others share the host's GPUs, NVLink multicast may be ruled out for the whole machine.
    *("NCCL_NVLS_ENABLE", "TORCH_SYMM_MEM_DISABLE_MULTICAST", "NVSHMEM_DISABLE_NVLS"),
)


class StillStarting(RunnerError):
    """Nobody can tell yet whether an engine begins there."""


class ProcessRunner:
    """``root`` holds one directory per launch; it is created 0700."""

    name = "process"

    def __init__(self, root: Path) -> None:
        self.root = Path(root).absolute()

    # -- starting ---------------------------------------------------------------------------

    def launch(self, spec: LaunchSpec) -> Handle:
        """Start it. A launch that is already on record, living or ended, is returned as it is:
        a task delivered twice must not start a second engine. One that takes too long is withdrawn."""
        directory = launch_directory(self.root, spec.launch_id)
        try:
            with self._locked(directory) as lock:
                existing = self.recover(spec.launch_id)
                if existing is not None:
                    return existing
                if (directory / shim.WITHDRAWN).exists():
                    raise RunnerError(f"Launch {spec.launch_id} was given up before it began; start it anew.")
                environment = self._environment(spec)
                _check_executable(spec, environment)
                for stale in ("failed.json", "exit.json", "log", "log.json", "shim.log"):
                    (directory / stale).unlink(missing_ok=True)
                _write(directory / "spec.json", _spec_record(spec, environment))
                _write(directory / "secret.json", spec.secret_env)
                self._start_shim(spec.launch_id, directory, lock)
        except StillStarting:
            if (begun := self.withdraw(spec.launch_id)) is not None:
                self.stop(begun)
            raise
        handle = self.recover(spec.launch_id)
        if handle is None:
            (directory / "secret.json").unlink(missing_ok=True)
            raise RunnerError(f"{spec.argv[0]} could not be started: {_why_not(directory)}")
        return handle

    def _environment(self, spec: LaunchSpec) -> dict[str, str]:
        inherited = {k: v for k, v in os.environ.items() if k in INHERITED_ENVIRONMENT}
        return {**inherited, **spec.env, LAUNCH_MARKER: spec.launch_id}

    def _start_shim(self, launch_id: str, directory: Path, lock: int) -> None:
        """Returns when ``started.json`` or ``failed.json`` is there, or the shim has died. Raises StillStarting."""
        with open(directory / "shim.log", "wb", opener=_private) as errors:
            try:
                process = subprocess.Popen(
                    [sys.executable, "-I", "-S", shim.__file__, str(directory), str(lock)],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    pass_fds=(lock,),
                    start_new_session=True,
                    cwd="/",
                    env={"LC_CTYPE": "C.UTF-8"},
                )
            except OSError as error:
                raise RunnerError(f"The engine's shim could not be started with {sys.executable}: {error}.") from error
        # The shim forks at once; what is waited for is the end of the pipe, which the second
        # process closes when the engine runs or cannot run.
        try:
            process.communicate(timeout=SHIM_START_SECONDS)
        except subprocess.TimeoutExpired as error:
            process.kill()  # where even Python hangs; the second process, which has no name yet, ends by itself
            process.stdout.close()  # type: ignore[union-attr]
            raise StillStarting(
                f"The engine's shim did not answer within {SHIM_START_SECONDS:.0f} s; "
                "the machine is overloaded or its disk hangs. Look at the host, then try again."
            ) from error

    @contextlib.contextmanager
    def _locked(self, directory: Path) -> Iterator[int]:
        """Hold this launch's lock. The file may be deleted by ``forget`` while we wait for it,
        so after getting the lock the path must still lead to the same file. A shim that hangs keeps it, when the
        launcher is long dead: then StillStarting is raised."""
        deadline = time.monotonic() + SHIM_START_SECONDS
        while True:
            try:
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except FileNotFoundError:
                continue  # forgotten between the two lines
            except OSError as error:
                raise RunnerError(
                    f"The runner cannot write to {directory}: {error.strerror}. "
                    "Give this user the right to write there, or free some space."
                ) from error
            try:
                _lock(descriptor, deadline, directory.name)
                try:
                    same = os.path.samestat(os.fstat(descriptor), os.stat(directory / "lock"))
                except FileNotFoundError:
                    same = False
                if same:
                    yield descriptor
                    return
            finally:
                os.close(descriptor)

    def withdraw(self, launch_id: str) -> Handle | None:
        directory = launch_directory(self.root, launch_id)
        # Where nothing can be written, no shim can put its engine on record either, and then it does not begin.
        with contextlib.suppress(OSError):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            (directory / shim.WITHDRAWN).touch(mode=0o600)
        with contextlib.suppress(OSError):
            (directory / "secret.json").unlink(missing_ok=True)
        return self.recover(launch_id)

    # -- finding ----------------------------------------------------------------------------

    def recover(self, launch_id: str) -> Handle | None:
        """From ``started.json``, which the engine's own process wrote before it began."""
        directory = launch_directory(self.root, launch_id)
        started = _read(directory / "started.json")
        if started is None or (directory / "failed.json").exists():
            return None
        return Handle(
            runner=self.name,
            launch_id=launch_id,
            directory=str(directory),
            pid=int(started["shim_pid"]),
            create_time=float(started["shim_create_time"] or 0.0),
            engine_pid=int(started["engine_pid"]),
            engine_create_time=float(started["engine_create_time"] or 0.0),
            boot_id=str(started["boot_id"]),
            ticks=started["shim_ticks"],
            engine_ticks=started["engine_ticks"],
        )

    def observe(self, handle: Handle) -> Observation:
        """``EXITED`` or ``LOST`` with ``pids`` means that the engine's first process is gone but
        children of it live on (a half-dead multi-process engine): ``stop`` ends them."""
        directory = Path(handle.directory)
        members = self._members(handle)
        pids = tuple(sorted(p.pid for p in members))
        memory = processes.memory_rss_bytes(members)
        if handle.engine_pid in pids:
            if self._shim(handle) is None:
                self._bound_log_instead_of_shim(directory)
            return Observation(ProcessState.RUNNING, pids=pids, memory_rss_bytes=memory)
        record = self._exit_record(handle)
        if record is None:
            return Observation(ProcessState.LOST, pids=pids, memory_rss_bytes=memory)
        return Observation(
            ProcessState.EXITED,
            exit_code=int(record["exit_code"]),
            exited_at=float(record["exited_at"]),
            pids=pids,
            memory_rss_bytes=memory,
        )

    def _bound_log_instead_of_shim(self, directory: Path) -> None:
        spec = _read(directory / "spec.json")
        if spec is not None:
            with contextlib.suppress(OSError):
                shim.trim_log(str(directory), int(spec["log_max_bytes"]))

    def _exit_record(self, handle: Handle) -> dict[str, Any] | None:
        """The engine is not alive; its shim may be about to write why."""
        path = Path(handle.directory) / "exit.json"
        deadline = time.monotonic() + EXIT_RECORD_SECONDS
        while True:
            record = _read(path)
            if record is not None or time.monotonic() > deadline:
                return record
            process = self._shim(handle)
            if process is None:
                return _read(path)  # it may have written between our two looks
            processes.wait_for_an_end([process], POLL_SECONDS)

    def _shim(self, handle: Handle) -> ProcessStat | None:
        """The living shim."""
        process = self._identified(handle, handle.pid, handle.ticks, handle.create_time, "shim")
        return process if process is not None and processes.is_alive(process) else None

    def _identified(
        self, handle: Handle, pid: int | None, ticks: int | None, created: float | None, who: str
    ) -> ProcessStat | None:
        """The process of that pid if it is still the same one, a zombie included, else None.

        Boot and start ticks decide, since a time of day moves when the clock is set. A handle of
        version 1 has neither: the record of its launch has, and only where that is missing or
        speaks of another process does the create time decide alone.
        """
        if pid is None:
            return None
        stat = shim.read_stat(pid)
        if stat is None:
            return None
        if handle.boot_id:
            return stat if handle.boot_id == shim.boot_id() and ticks == stat.ticks else None
        if created is None:
            return None
        started = _read(Path(handle.directory) / "started.json")
        if started is not None and started[f"{who}_pid"] == pid and started[f"{who}_create_time"] == created:
            same = started["boot_id"] == shim.boot_id() and started[f"{who}_ticks"] == stat.ticks
        else:
            seen = shim.create_time(pid)
            same = seen is not None and abs(seen - created) < 0.02  # two clock ticks
        return stat if same else None

    def _members(self, handle: Handle) -> list[ProcessStat]:
        """Every living process of the engine's session, and their descendants in other sessions.

        A session's number is its leader's pid, and the kernel does not give that pid away while
        the session has members. So a leader that is not ours proves the number was reused.
        """
        session = handle.engine_pid
        if session is None:
            return []
        seen = processes.all_processes()
        leader = self._identified(handle, session, handle.engine_ticks, handle.engine_create_time, "engine")
        in_session = [p.pid for p in seen.values() if p.session == session]
        if leader is None:
            if session in seen or not self._recorded_in_this_boot(handle):
                return []
            marker = f"{LAUNCH_MARKER}={handle.launch_id}"
            in_session = [pid for pid in in_session if not processes.has_foreign_environment(pid, marker)]
        ours = processes.with_descendants(in_session, seen)
        return [seen[pid] for pid in sorted(ours) if pid in seen and processes.is_alive(seen[pid])]

    def _recorded_in_this_boot(self, handle: Handle) -> bool:
        if handle.boot_id:
            return handle.boot_id == shim.boot_id()
        started = _read(Path(handle.directory) / "started.json")
        return started is not None and started["boot_id"] == shim.boot_id()

    # -- stopping ---------------------------------------------------------------------------

    def stop(self, handle: Handle) -> Observation:
        """Works without the shim too; then the exit code is unknown and the answer is ``LOST``."""
        spec = _read(Path(handle.directory) / "spec.json")
        ladder = spec["stop_signals"] if spec else LaunchSpec(handle.launch_id, ()).stop_signals
        self._ask_first(handle, float(spec.get("ask_first_seconds", 0.0)) if spec else 0.0)
        for signal_name, wait_seconds in ladder:
            members = self._members(handle)
            if not members:
                break
            processes.signal_group(int(handle.engine_pid or 0), members, signal.Signals[signal_name])
            processes.let_go_on(members)
            deadline = time.monotonic() + float(wait_seconds)
            while (members := self._members(handle)) and time.monotonic() < deadline:
                processes.wait_for_an_end(members, POLL_SECONDS)
        survivors = self._members(handle)
        if survivors:
            names = ", ".join(str(p.pid) for p in survivors)
            raise RunnerError(
                f"Processes {names} of launch {handle.launch_id} survived every signal, SIGKILL included. "
                "They are probably stuck in the GPU driver: look at the kernel log, and reboot if they "
                "do not go away."
            )
        return self.observe(handle)

    def _ask_first(self, handle: Handle, seconds: float) -> None:
        """SIGTERM to the engine's first process alone; returns when all are gone, it is gone, or the time is over."""
        deadline = time.monotonic() + seconds
        asked = False
        while time.monotonic() < deadline:
            first = next((p for p in self._members(handle) if p.pid == handle.engine_pid), None)
            if first is None:
                return
            if not asked:
                processes.send_signal(first, signal.SIGTERM)
                processes.let_go_on([first])
                asked = True
            processes.wait_for_an_end([first], POLL_SECONDS)

    # -- reading and forgetting -------------------------------------------------------------

    def logs(self, handle: Handle, offset: int = 0, max_bytes: int = 65536) -> LogChunk:
        directory = Path(handle.directory)
        return read_log(directory, offset, max_bytes)

    def forget(self, launch_id: str) -> None:
        directory = launch_directory(self.root, launch_id)
        if not directory.exists():
            return
        with self._locked(directory):
            handle = self.recover(launch_id)
            members = self._members(handle) if handle is not None else []
            if members:
                raise RunnerError(f"Launch {launch_id} is still running (pid {members[0].pid}); stop it first.")
            shutil.rmtree(directory, ignore_errors=True)


def read_log(directory: Path, offset: int, max_bytes: int) -> LogChunk:
    """Read from a launch's ``log`` by stable offsets; see ``shim.py`` for how it is bounded."""
    for _ in range(3):  # once more when the log was cut while we read
        base, start = shim.read_cut(str(directory))
        try:
            with open(directory / "log", "rb") as file:
                end = base + file.seek(0, os.SEEK_END)
                begin = max(start, min(end + offset if offset < 0 else offset, end))
                file.seek(begin - base)
                data = file.read(max(0, max_bytes))
        except FileNotFoundError:
            return LogChunk("", max(0, offset))
        if shim.read_cut(str(directory)) == (base, start):
            break
    data = _whole_characters(data)
    # Engines print what model files say, and a NUL is no text to a database.
    return LogChunk(data.decode(errors="replace").replace("\x00", "\ufffd"), begin + len(data))


def _whole_characters(data: bytes) -> bytes:
    """Leave a multi-byte character that is cut at the end for the next read."""
    for back in range(1, min(4, len(data))):
        byte = data[-back]
        if byte & 0xC0 == 0x80:
            continue
        length = 4 if byte >= 0xF0 else 3 if byte >= 0xE0 else 2 if byte >= 0xC0 else 1
        return data[:-back] if length > back else data
    return data


def _lock(descriptor: int, deadline: float, launch_id: str) -> None:
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise StillStarting(
                    f"Launch {launch_id} is being started for {SHIM_START_SECONDS:.0f} s already; "
                    "the machine is overloaded or its disk hangs. Look at the host, then try again."
                ) from None
        time.sleep(POLL_SECONDS)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _check_executable(spec: LaunchSpec, environment: dict[str, str]) -> None:
    if not spec.argv:
        raise RunnerError(f"Launch {spec.launch_id} has an empty command line.")
    if spec.cwd is not None and not Path(spec.cwd).is_dir():
        raise RunnerError(f"The working directory {spec.cwd} does not exist.")
    program = spec.argv[0]
    if "/" not in program:
        if shutil.which(program, path=environment.get("PATH", os.defpath)) is None:
            raise RunnerError(
                f"There is no program {program!r} on the PATH. Install the engine, or name its full path."
            )
        return
    path = Path(spec.cwd or "/") / program
    if not path.is_file():
        raise RunnerError(
            f"There is no program {program}. The engine's install was moved or deleted: install it again."
        )
    if not os.access(path, os.X_OK):
        raise RunnerError(f"{program} is not executable for this user. Check its permissions (chmod +x).")


def _spec_record(spec: LaunchSpec, environment: dict[str, str]) -> dict[str, Any]:
    return {
        "launch_id": spec.launch_id,
        "argv": list(spec.argv),
        "env": environment,
        "cwd": spec.cwd,
        "log_max_bytes": spec.log_max_bytes,
        "stop_signals": [list(step) for step in spec.stop_signals],
        "ask_first_seconds": spec.ask_first_seconds,
    }


def _why_not(directory: Path) -> str:
    failed = _read(directory / "failed.json")
    if failed is not None:
        (directory / "started.json").unlink(missing_ok=True)
        return f"{failed['message']}."
    with contextlib.suppress(OSError):
        last = (directory / "shim.log").read_text(errors="replace").strip().rpartition("\n")[2]
        if last:
            return f"its shim ended early ({last})."
    return "its shim ended early without a word."


def _read(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _write(path: Path, value: object) -> None:
    try:
        shim.write_json(str(path), value)
    except OSError as error:
        raise RunnerError(
            f"The runner cannot write to {path.parent}: {error.strerror}. "
            "Give this user the right to write there, or free some space."
        ) from error
