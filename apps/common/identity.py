"""Who a process is, for others on its host: ``host:pid:mark``, for leases, heartbeats and gateways.

The mark is ``t<boot>-<ticks>``: start ticks since boot with the boot they count in. Unlike a time of day neither
moves when the clock is set, so a stepped clock makes no living worker look dead. Keys of earlier versions end with
the birth time in seconds since the epoch and are still understood.
"""

from __future__ import annotations

import os
import socket

from apps.runners import shim

BOOT_LETTERS = 12  # of the boot id: enough to tell boots of one machine apart, and keys stay short


def birth_mark(pid: int) -> str:
    """What tells this process from every other that ever had its number; empty when it is gone."""
    ticks = shim.start_ticks(pid)
    return "" if ticks is None else f"t{shim.boot_id().replace('-', '')[:BOOT_LETTERS]}-{ticks}"


def process_key() -> str:
    """This process; asked anew each time, so that a forked one does not go by its parent's name."""
    pid = os.getpid()
    return f"{socket.gethostname()}:{pid}:{birth_mark(pid)}"


def lives(pid: int, mark: str) -> bool | None:
    """Whether the process of that number and mark lives here; None for a mark that says nothing."""
    stat = shim.read_stat(pid)
    if stat is None or stat.state in ("Z", "X"):
        return False
    if mark.startswith("t"):
        return mark == birth_mark(pid)
    born = shim.create_time(pid)
    try:
        return born is not None and abs(born - float(mark)) <= 1.0
    except ValueError:
        return None


def is_known_dead(key: str) -> bool:
    """Whether the process is surely gone: it ran on this host, and none with its pid and mark lives here now.

    What follows the mark behind a further colon is passed over. False where this host cannot tell."""
    return _judged(key) is False


def is_known_alive(key: str) -> bool:
    """Whether the process surely lives, frozen or not. False where this host cannot tell."""
    return _judged(key) is True


def is_known_running(key: str) -> bool:
    """Alive, and not stopped by SIGSTOP or a debugger."""
    if not is_known_alive(key):
        return False
    stat = shim.read_stat(int(key.split(":")[1]))
    return stat is not None and stat.state not in ("T", "t")


def _judged(key: str) -> bool | None:
    host, _, rest = key.partition(":")
    pid, _, rest = rest.partition(":")
    if host != socket.gethostname() or not pid.isdecimal():
        return None
    return lives(int(pid), rest.partition(":")[0])
