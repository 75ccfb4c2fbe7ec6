"""Who belongs to an engine: one pass over /proc, and signals that cannot hit a stranger."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from apps.runners import shim
from apps.runners.shim import ProcessStat

DEAD_STATES = ("Z", "X")


def all_processes() -> dict[int, ProcessStat]:
    """Every process that this user's view of /proc shows, zombies included."""
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit() and (stat := shim.read_stat(int(name))) is not None:
            found[stat.pid] = stat
    return found


def with_descendants(roots: Iterable[int], processes: dict[int, ProcessStat]) -> set[int]:
    """The roots and everybody below them, whatever session they moved to."""
    children: dict[int, list[int]] = {}
    for process in processes.values():
        children.setdefault(process.parent, []).append(process.pid)
    found: set[int] = set()
    waiting = list(roots)
    while waiting:
        pid = waiting.pop()
        if pid not in found:
            found.add(pid)
            waiting.extend(children.get(pid, ()))
    return found


def is_alive(process: ProcessStat) -> bool:
    return process.state not in DEAD_STATES


def memory_rss_bytes(processes: Iterable[ProcessStat]) -> int | None:
    """Sum of resident pages; shared pages count in each process that maps them."""
    total = None
    page = os.sysconf("SC_PAGE_SIZE")
    for process in processes:
        with contextlib.suppress(OSError, ValueError, IndexError):
            pages = int(Path(f"/proc/{process.pid}/statm").read_bytes().split()[1])
            total = (total or 0) + pages * page
    return total


@dataclass(frozen=True, slots=True)
class Activity:
    """What these processes have done so far, taken together. ``stopped``: who is stopped by a signal (SIGSTOP, Ctrl-Z);
    one that a debugger holds is not. ``read_bytes``: by system calls and from disks, 0 where we may not look."""

    pids: tuple[int, ...]
    stopped: tuple[int, ...]
    cpu_seconds: float
    read_bytes: int
    memory_rss_bytes: int | None


def activity(pids: Sequence[int]) -> Activity:
    """Whoever is gone is left out (proc(5): 14 utime, 15 stime, in ticks)."""
    there, ticks, read = [], 0, 0
    for pid in pids:
        stat = shim.read_stat(pid)
        if stat is None:
            continue
        there.append(stat)
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        with contextlib.suppress(OSError, ValueError):
            lines = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
            read += int(lines.get("rchar", 0)) + int(lines.get("read_bytes", 0))
    return Activity(
        pids=tuple(stat.pid for stat in there),
        stopped=tuple(stat.pid for stat in there if stat.state == "T"),
        cpu_seconds=ticks / os.sysconf("SC_CLK_TCK"),
        read_bytes=read,
        memory_rss_bytes=memory_rss_bytes(there),
    )


def waits_for_a_disk(pids: Iterable[int]) -> bool:
    """Whether a thread of theirs sleeps uninterruptibly: a slow disk, a network share that hangs, a driver."""
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").glob("*/stat"):
            with contextlib.suppress(OSError, IndexError):
                if task.read_bytes().rpartition(b")")[2].split()[0] == b"D":
                    return True
    return False


def send_signal(process: ProcessStat, number: signal.Signals) -> None:
    """Signal exactly this process: the descriptor pins it, then its start time is compared, so a
    pid that was given away in between is not hit. Silent when it is gone."""
    with contextlib.suppress(OSError):
        descriptor = os.pidfd_open(process.pid)
        try:
            if shim.start_ticks(process.pid) == process.ticks:
                signal.pidfd_send_signal(descriptor, number)
        finally:
            os.close(descriptor)


def signal_group(group: int, members: Iterable[ProcessStat], number: signal.Signals) -> None:
    """Signal the whole process group in one act, so that nobody forks in between, and each
    member outside of it alone."""
    inside = [p for p in members if p.group == group]
    if inside:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, number)
    for process in members:
        if process.group != group:
            send_signal(process, number)


def wait_for_an_end(members: Iterable[ProcessStat], seconds: float) -> None:
    """Return as soon as one of them has ended, at the latest after ``seconds``."""
    poller = select.poll()
    descriptors = []
    try:
        for process in members:
            descriptors.append(os.pidfd_open(process.pid))
            poller.register(descriptors[-1], select.POLLIN)
    except ProcessLookupError:
        seconds = min(seconds, 0.005)  # one is gone already; never no time at all, whoever waits here looks in a loop
    except OSError:
        pass  # a kernel without them, or no descriptors left: then just the time
    else:
        poller.poll(seconds * 1000)
        seconds = 0.001
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    time.sleep(seconds)


def let_go_on(members: Iterable[ProcessStat]) -> None:
    """A process that is stopped (SIGSTOP, Ctrl-Z) gets no signal but SIGKILL before it is continued."""
    for process in members:
        if process.state == "T":
            send_signal(process, signal.SIGCONT)


def has_foreign_environment(pid: int, marker: str) -> bool:
    """True for a process whose environment is readable and lacks ``marker`` (``NAME=value``).

    Programs that rename themselves overwrite the memory this reads (vLLM's workers do); what
    cannot be read, or no longer looks like an environment, does not count as foreign.
    """
    try:
        content = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False
    return b"=" in content and marker.encode() not in content.split(b"\0")
