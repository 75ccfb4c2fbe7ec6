"""What must hold before the panel starts. Each failure is one sentence with what to do."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
import urllib.request
from collections.abc import Collection
from pathlib import Path

import redis
from django.conf import settings
from django.db import DatabaseError, connection
from django.db.migrations.loader import MigrationLoader
from redis.backoff import NoBackoff
from redis.retry import Retry

from rigpanel.processes import control_socket, end_processes, process_names, running

STORE_WAIT_SECONDS = 10.0
# The supervisor closes descriptors from 5 on when it starts anew after a hang-up; this one must stay open.
LOCK_DESCRIPTOR = 4


class NotStarted(Exception):
    """The panel cannot start; the message says why and what to do."""


def take_lock() -> int:
    """Of two starts with one data directory only one gets this; it is kept until the process ends."""
    path = Path(settings.DATA_DIR) / "run" / "up.lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + 3.0
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except OSError:
            # One that was just told to end may need another moment.
            if time.monotonic() > deadline or running("supervisor") is not None:
                os.close(descriptor)
                raise NotStarted(
                    f"rigpanel already runs with the data directory {settings.DATA_DIR}. "
                    "Open it in the browser, or stop it first with `make down`."
                ) from None
            time.sleep(0.1)


def keep_lock_through_exec(descriptor: int) -> None:
    if descriptor != LOCK_DESCRIPTOR:
        os.dup2(descriptor, LOCK_DESCRIPTOR, inheritable=True)
    else:
        os.set_inheritable(descriptor, True)


def end_leftovers() -> list[str]:
    """What a killed supervisor left running, ended before new ones start. Engines are not among these."""
    left = end_processes(process_names())
    control_socket().unlink(missing_ok=True)  # the next supervisor would find it stale, and wait
    return left


def check_ports(names: Collection[str]) -> None:
    """Those of the processes that will be started."""
    if "web" in names:
        _check_port(settings.HOST, settings.PORT, "RIGPANEL_PORT", "the panel")
    if "gateway" in names:
        _check_port(settings.HOST, settings.GATEWAY_PORT, "RIGPANEL_GATEWAY_PORT", "the gateway")


def _check_port(host: str, port: int, setting: str, what: str) -> None:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror:
        raise NotStarted(f"RIGPANEL_HOST is {host!r}, which is not an address of this machine.") from None
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
            # Binding alone succeeds beside a listener on some address families; listening does not.
            probe.listen(1)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                by = " by another rigpanel" if _is_rigpanel(host, port) else ""
                raise NotStarted(
                    f"Port {port} on {host}, meant for {what}, is taken{by}. "
                    f"Stop what uses it, or choose another port with {setting}, for example {setting}={port + 1}."
                ) from None
            if error.errno == errno.EADDRNOTAVAIL:
                raise NotStarted(f"RIGPANEL_HOST is {host}, which is not an address of this machine.") from None
            if error.errno == errno.EACCES:
                raise NotStarted(f"This user may not open port {port}; choose one above 1023 with {setting}.") from None
            raise NotStarted(
                f"Port {port} on {host} cannot be opened: {error.strerror}. Choose another with {setting}."
            ) from None


def _is_rigpanel(host: str, port: int) -> bool:
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)  # noqa: S104
    request = urllib.request.Request(f"http://{shown}:{port}/healthz", headers={"Host": "127.0.0.1"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never through a proxy
    with contextlib.suppress(Exception), opener.open(request, timeout=1) as response:
        return "rigpanel" in str(json.load(response).get("service", ""))
    return False


def check_store() -> None:
    """A Redis that was named must answer; the embedded one must find its socket's place free."""
    if not settings.STORE_EMBEDDED:
        client = redis.Redis.from_url(settings.REDIS_URL, socket_connect_timeout=3, socket_timeout=3)
        try:
            client.ping()
        except redis.RedisError as error:
            raise NotStarted(
                f"RIGPANEL_REDIS_URL leads to a Redis that does not answer: {_first_line(error)}"
            ) from None
        finally:
            client.close()
        return
    path = settings.STORE_SOCKET
    if not path.exists():
        return
    # Of a killed panel the socket is there and nobody listens: no reason to try again for four seconds.
    client = redis.Redis(unix_socket_path=str(path), socket_timeout=3, retry=Retry(NoBackoff(), 0))
    try:
        client.ping()
        # It holds our data directory's socket and was not in the list of leftovers: end it cleanly,
        # its append-only file is what the next one reads.
        with contextlib.suppress(redis.RedisError):
            client.shutdown()
        deadline = time.monotonic() + STORE_WAIT_SECONDS
        while path.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
    except redis.RedisError:
        pass
    finally:
        client.close()
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise NotStarted(
            f"The old socket {path} cannot be removed: {error.strerror}. Remove it and start again."
        ) from None


def check_database() -> None:
    """It must answer, and must not come from a newer rigpanel."""
    try:
        connection.ensure_connection()
        loader = MigrationLoader(connection, ignore_no_migrations=True)
    except DatabaseError as error:
        which = f"The database in {settings.DATA_DIR}" if connection.vendor == "sqlite" else "The PostgreSQL database"
        raise NotStarted(f"{which} cannot be used: {_first_line(error)}") from None
    known = known_migrations(loader)
    unknown = [f"{a}.{n}" for a, n in loader.applied_migrations if a in loader.migrated_apps and (a, n) not in known]
    if unknown:
        raise NotStarted(
            f"The database was used by a newer rigpanel (it knows {unknown[0]}, this one does not). "
            "Use that version again, or restore a backup made with this one."
        )


def known_migrations(loader: MigrationLoader) -> set[tuple[str, str]]:
    """App and name of all that ``migrate`` of this version records as applied."""
    return set(loader.disk_migrations) | {old for m in loader.disk_migrations.values() for old in m.replaces}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
