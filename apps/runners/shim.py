"""The small parent of one engine: starts it, keeps its log bounded, writes down how it ended.

Run as ``python -I -S shim.py LAUNCH_DIRECTORY LOCK_FD``; only the standard library, few imports,
because one of these stays in memory beside every engine (about 9 MB).

Why the engine writes straight into the log file instead of into a pipe read here: a pipe breaks
when its reader is killed, and then the engine dies at its next line (SIGPIPE) or blocks when the
pipe is full. With a file, ``kill -9`` of the shim costs the exit code and nothing else.

How the file stays bounded all the same: the engine's descriptor is ``O_APPEND``, and the shim
gives the oldest blocks back to the filesystem (``FALLOC_FL_PUNCH_HOLE``). The file's length keeps
counting all bytes ever written, so an offset means the same byte for ever. Where a filesystem
refuses holes, the file is truncated to nothing and the bytes cut off are added to ``base``.

The files of a launch, each written with write-then-rename:

``spec.json``     argv, env, cwd, log_max_bytes, stop_signals (0600; no secrets)
``secret.json``   the secret part of the environment (0600; deleted as soon as it is read)
``started.json``  written by the engine's own process before it becomes the engine, so there is
                  no moment in which an engine runs that nobody can find
``withdrawn``     written by whoever gives the launch up before it is on record. The engine's process looks for
                  it after it has written ``started.json``, and whoever wrote it looks for that: one of them sees
                  the other, however late the shim comes
``failed.json``   why it could not be executed at all
``exit.json``     the exit code as ``subprocess`` tells it, and when
``log``           the engine's output; ``log.json`` says what was cut away
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time

LOOK_SECONDS = 1.0
BUSY_LOOK_SECONDS = 0.1
BLOCK_BYTES = 4096  # holes are given back in whole blocks
FALLOC_FL_KEEP_SIZE = 0x01  # linux/falloc.h
FALLOC_FL_PUNCH_HOLE = 0x02
WITHDRAWN = "withdrawn"


def write_json(path: str, value: object, mode: int = 0o600) -> None:
    """Replace ``path`` in one step, so a reader sees the old content or the new, never half."""
    temporary = f"{path}.{os.getpid()}.new"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    try:
        os.write(descriptor, json.dumps(value).encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(temporary, path)


def boot_id() -> str:
    """Changes with every boot: a pid of an earlier boot is nobody's."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return ""


class ProcessStat:
    """One line of /proc/PID/stat. ``ticks`` is when it started, in clock ticks since boot: unlike
    a time of day, it does not move when the clock is set. (No dataclass: the import costs memory.)
    """

    __slots__ = ("group", "parent", "pid", "session", "state", "ticks")

    def __init__(self, pid: int, state: str, parent: int, group: int, session: int, ticks: int) -> None:
        self.pid = pid
        self.state = state
        self.parent = parent
        self.group = group
        self.session = session
        self.ticks = ticks


def read_stat(pid: int) -> ProcessStat | None:
    """``None`` when the process is gone. Fields are counted from behind the name, which may hold
    spaces and brackets (proc(5): 3 state, 4 ppid, 5 pgrp, 6 session, 22 starttime)."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        parent, group, session, ticks = (int(fields[i]) for i in (1, 2, 3, 19))
        return ProcessStat(pid, fields[0].decode(), parent, group, session, ticks)
    except (OSError, IndexError, ValueError):
        return None


def start_ticks(pid: int) -> int | None:
    stat = read_stat(pid)
    return None if stat is None else stat.ticks


def create_time(pid: int) -> float | None:
    """Seconds since the epoch, computed as psutil does: boot time plus start ticks."""
    ticks = start_ticks(pid)
    if ticks is None:
        return None
    with open("/proc/stat", "rb") as file:
        for line in file:
            if line.startswith(b"btime "):
                return float(line.split()[1]) + ticks / os.sysconf("SC_CLK_TCK")
    return None


def session_has_other_members(session: int) -> bool:
    """Whether a living process other than the leader belongs to this session."""
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != session:
            stat = read_stat(int(name))
            if stat is not None and stat.session == session and stat.state not in ("Z", "X"):
                return True
    return False


def read_cut(directory: str) -> tuple[int, int]:
    """(base, start): the offset of the file's first byte, and of the first byte still readable."""
    try:
        with open(os.path.join(directory, "log.json")) as file:
            value = json.load(file)
        return int(value["base"]), int(value["start"])
    except (OSError, ValueError, KeyError):
        return 0, 0


def trim_log(directory: str, max_bytes: int, may_punch: bool = True) -> bool:
    """Cut the log back to half its bound when it has outgrown it; says whether it did.

    Between two looks a flood can exceed the bound for a moment. ``log.json`` is written before
    the bytes go, so a reader never takes a hole for output.
    """
    path = os.path.join(directory, "log")
    try:
        size = os.stat(path).st_size
    except OSError:
        return False
    base, start = read_cut(directory)
    if base + size - start <= max_bytes:
        return False
    keep = max(max_bytes // 2, BLOCK_BYTES)
    position = max(0, (size - keep) // BLOCK_BYTES * BLOCK_BYTES)
    if base + position <= start:
        return False  # a bound smaller than two blocks
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        write_json(os.path.join(directory, "log.json"), {"base": base, "start": base + position})
        begin = max(0, start - base) // BLOCK_BYTES * BLOCK_BYTES
        if not (may_punch and punch_hole(descriptor, begin, position)):
            size = os.fstat(descriptor).st_size
            write_json(os.path.join(directory, "log.json"), {"base": base + size, "start": base + size})
            os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)
    return True


def punch_hole(descriptor: int, begin: int, end: int) -> bool:
    """Give [begin, end) back to the filesystem, keeping the length; False where it refuses."""
    import ctypes  # imported only when a log has outgrown its bound: it costs memory

    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if fallocate is None:
        return False
    fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
    return bool(fallocate(descriptor, mode, begin, end - begin) == 0)


def become_engine(directory: str, spec: dict[str, object], environment: dict[str, str], shim_pid: int) -> None:
    """In the forked child: own session, output to the log, on record, then the engine's program."""
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDONLY)
    log = os.open(os.path.join(directory, "log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(nothing, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    # Ignored signals survive exec: Python ignores SIGPIPE, the shim ignores the stop signals.
    for number in (signal.SIGPIPE, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    own_pid = os.getpid()
    write_json(
        os.path.join(directory, "started.json"),
        {
            "boot_id": boot_id(),
            "shim_pid": shim_pid,
            "shim_create_time": create_time(shim_pid),
            "shim_ticks": start_ticks(shim_pid),
            "engine_pid": own_pid,
            "engine_create_time": create_time(own_pid),
            "engine_ticks": start_ticks(own_pid),
            "started_at": time.time(),
        },
    )
    if os.path.exists(os.path.join(directory, WITHDRAWN)):
        raise RuntimeError("it was given up before it began")
    if spec.get("cwd"):
        os.chdir(str(spec["cwd"]))
    os.umask(0o022)
    argv = [str(part) for part in spec["argv"]]  # type: ignore[attr-defined]
    os.execvpe(argv[0], argv, environment)  # noqa: S606 - an argv list; no shell is the point


def start_engine(directory: str, spec: dict[str, object]) -> int | None:
    """Fork and execute; None when it could not be executed (``failed.json`` says why)."""
    environment = {str(k): str(v) for k, v in spec["env"].items()}  # type: ignore[attr-defined]
    secret_path = os.path.join(directory, "secret.json")
    try:
        with open(secret_path) as file:
            environment.update(json.load(file))
        os.unlink(secret_path)
    except FileNotFoundError:
        pass
    reader, writer = os.pipe()  # closed by a successful exec: an empty read means it runs
    shim_pid = os.getpid()
    engine = os.fork()
    if engine == 0:
        try:
            os.close(reader)
            become_engine(directory, spec, environment, shim_pid)
        except BaseException as error:  # whatever it was, the shim must learn of it
            os.write(writer, str(error).encode()[:2000])
        os._exit(127)
    os.close(writer)
    message = os.read(reader, 4096)
    os.close(reader)
    if not message:
        return engine
    os.waitpid(engine, 0)
    write_json(os.path.join(directory, "failed.json"), {"message": message.decode(errors="replace")})
    return None


def wait_and_trim(engine: int, directory: str, max_bytes: int) -> None:
    """Bound the log until the engine has ended, then write its exit code without reaping it."""
    try:
        descriptor = os.pidfd_open(engine)
    except OSError:
        descriptor = -1
    poller = select.poll()
    if descriptor >= 0:
        poller.register(descriptor, select.POLLIN)
    look = LOOK_SECONDS
    while True:
        poller.poll(int(look * 1000))
        look = BUSY_LOOK_SECONDS if trim_log(directory, max_bytes) else LOOK_SECONDS
        # WNOWAIT leaves the zombie: its pid, which names the session, cannot be given to another
        # process while children of the engine still live in that session.
        ended = os.waitid(os.P_PID, engine, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        if ended is not None:
            break
    code = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
    write_json(os.path.join(directory, "exit.json"), {"exit_code": code, "exited_at": time.time()})
    if descriptor >= 0:
        os.close(descriptor)


def main(directory: str, lock: int) -> None:
    """Leave the launcher's process tree, start the engine, stay until its whole session is gone.

    ``lock`` is an inherited descriptor, or -1 in a systemd unit, which is outside already.
    """
    if lock >= 0:
        os.set_inheritable(lock, False)
        if os.fork():
            os._exit(0)  # the launcher reaps this first process; the second one belongs to nobody
        os.setsid()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the engine is what gets stopped; the shim follows it
    with open(os.path.join(directory, "spec.json")) as file:
        spec = json.load(file)
    engine = start_engine(directory, spec)
    # The lock came from the launcher and is held until there is something to find: a second
    # launch of the same id waits for it even when the first launcher has died meanwhile.
    if lock >= 0:
        os.close(lock)
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, 1)  # tells the launcher, who waits for this end of the pipe
    if engine is None:
        return
    max_bytes = int(spec["log_max_bytes"])
    wait_and_trim(engine, directory, max_bytes)
    while session_has_other_members(engine):
        trim_log(directory, max_bytes)
        time.sleep(LOOK_SECONDS)
    os.waitpid(engine, 0)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
