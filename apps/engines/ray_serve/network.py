"""A network of its own for Ray, and who listens wider than loopback where that is not permitted.

Ray 2.60 binds its GCS, raylets and agents to every interface whatever ``--node-ip-address`` says (measured). In a
network namespace that has nothing but ``lo`` that does no harm. Sockets keep the namespace in which they were made: a
listener opened before ``enter_private_network`` is reached from outside, while connections made after it end inside.
So one process is the only door, and no bridge, route or relay through the filesystem is needed.

Only the standard library and the syntax of Python 3.10: this also runs in Ray's own environment.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000  # linux/sched.h
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 0x1  # linux/sockios.h, linux/if.h
TRY_SECONDS = 20
LISTEN = "0A"  # the state column of /proc/net/tcp


def enter_private_network() -> None:
    """Move this process, and all it will start, into a network namespace with only ``lo``.

    Without the right to make one, a user namespace gives it; this user stays the same user in there. Call it before the
    first thread starts. Raises OSError where the kernel or a policy says no.
    """
    uid, gid = os.getuid(), os.getgid()
    try:
        _unshare(CLONE_NEWNET)
    except PermissionError:
        _unshare(CLONE_NEWUSER | CLONE_NEWNET)
        Path("/proc/self/setgroups").write_text("deny")  # user_namespaces(7): before gid_map
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = struct.pack("16sh14x", b"lo", 0)
        _, flags = struct.unpack("16sh14x", fcntl.ioctl(control, SIOCGIFFLAGS, request))
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | IFF_UP))


def _unshare(flags: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)  # os.unshare came with Python 3.12
    if libc.unshare(flags) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


@lru_cache(maxsize=1)
def why_not_private() -> str:
    """Empty where a private network can be made, else the system's words.

    Tried once, in a process that ends at once: some policies permit the namespace and then forbid to bring its ``lo``
    up, and a program with threads cannot try it on itself.
    """
    try:
        tried = subprocess.run(
            [sys.executable, "-I", "-S", __file__], capture_output=True, text=True, timeout=TRY_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if tried.returncode == 0:
        return ""
    return (tried.stderr.strip().rpartition("\n")[2] or f"code {tried.returncode}")[:300]


def ray_network_warnings(*, private: bool) -> tuple[str, ...]:
    """What a person should know before Ray starts here. ``private``: it will be given a network of its own if possible;
    it is not where weights are still to be downloaded."""
    if not private:
        return (
            "The weights are not on this rig yet, so Ray gets no network of its own, and some of its ports listen on "
            "all interfaces, guarded by its token. Download them first, or keep a firewall before this machine.",
        )
    why = why_not_private()
    if not why:
        return ()
    return (
        f"Ray cannot have a network of its own here ({why}), so some of its ports listen on all interfaces, guarded by "
        "its token. Permit user namespaces for this user, or keep a firewall before this machine.",
    )


@dataclass(frozen=True)
class Listener:
    """A socket that accepts connections from other machines."""

    port: int
    process: str


def wide_listeners(pids: Collection[int], proc: Path = Path("/proc")) -> list[Listener]:
    """Listening sockets of these processes that are bound wider than loopback, by port."""
    owners = {}
    for pid in pids:
        for inode in _socket_inodes(proc / str(pid)):
            owners[inode] = _name(proc / str(pid))
    found = set()
    for table in ("tcp", "tcp6"):
        for address, port, inode in _listening(proc / "self" / "net" / table):
            if inode in owners and not _is_loopback(address):
                found.add(Listener(port, owners[inode]))
    return sorted(found, key=lambda one: (one.port, one.process))


def wide_words(listeners: Iterable[Listener]) -> str:
    """One sentence for people, or nothing."""
    by_process: dict[str, list[int]] = {}
    for one in listeners:
        by_process.setdefault(one.process, []).append(one.port)
    if not by_process:
        return ""
    parts = [f"{name} on {', '.join(map(str, ports))}" for name, ports in sorted(by_process.items())]
    return (
        f"Ray listens on all network interfaces: {'; '.join(parts)}. Its token keeps strangers out of most of it; "
        "a firewall keeps them out of all of it."
    )


def _listening(table: Path) -> Iterable[tuple[str, int, str]]:
    try:
        lines = table.read_text().splitlines()[1:]
    except OSError:
        return
    for line in lines:
        columns = line.split()
        if len(columns) > 9 and columns[3] == LISTEN:
            address, _, port = columns[1].rpartition(":")
            yield address, int(port, 16), columns[9]


def _is_loopback(address: str) -> bool:
    """``address`` is as the kernel prints it: words of four bytes in host order."""
    words = [bytes.fromhex(address[at : at + 8])[::-1] for at in range(0, len(address), 8)]
    if len(words) == 1:
        return words[0][0] == 127
    plain = b"".join(words)
    return plain == b"\0" * 15 + b"\1" or (plain[:12] == b"\0" * 10 + b"\xff\xff" and plain[12] == 127)


def _socket_inodes(process: Path) -> Iterable[str]:
    try:
        descriptors = list((process / "fd").iterdir())
    except OSError:
        return
    for descriptor in descriptors:
        try:
            target = os.readlink(descriptor)
        except OSError:
            continue
        if target.startswith("socket:["):
            yield target[8:-1]


def _name(process: Path) -> str:
    """``gcs_server``, ``raylet``, or the Python file that runs (``dashboard.py``)."""
    try:
        words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return "a process"
    first = words[0].partition(" ")[0].rpartition("/")[2] or "a process"
    script = next((w.rpartition("/")[2] for w in words[1:] if w.endswith(".py") and " " not in w), "")
    return script or first


if __name__ == "__main__":
    enter_private_network()
