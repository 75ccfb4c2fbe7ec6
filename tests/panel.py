"""A whole panel of its own: ``manage.py up`` in a throw-away data directory, driven from outside as people do.

For tests and benchmarks. Nothing here imports Django: it knows the panel by its commands, addresses and processes.
"""

from __future__ import annotations

import http.client
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from apps.runners.processes import all_processes, is_alive, send_signal
from apps.runners.shim import ProcessStat, boot_id, read_stat

REPOSITORY = Path(__file__).resolve().parents[1]
OWNER = "alice@lab.example"
PASSWORD = "correct-horse-42"
NAMES = ("supervisor", "store", "web", "gateway", "control", "verify", "beat", "sampler")
# Generous: the machine may be busy with other things. What is waited for is polled, so a fast machine is fast.
START_SECONDS = 180.0
DEADLINE_SECONDS = 120.0
ENGINE_PORTS = 20
ROW = 32
_rows: list[socket.socket] = []
FINAL = ("succeeded", "failed", "errored", "cancelled")
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    text: str
    headers: dict[str, str]

    @property
    def json(self) -> Any:
        return json.loads(self.text)


def wait_for(what: str, look: Callable[[], Value | None], *, seconds: float = DEADLINE_SECONDS) -> Value:
    """The first true thing that ``look`` returns; an AssertionError that says ``what`` did not come."""
    deadline = time.monotonic() + seconds
    while True:
        found = look()
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.1)


def ask(
    url: str, body: Any = None, *, method: str | None = None, key: str | None = None, seconds: float = 60.0
) -> Answer:
    """One HTTP request; status 0 when nobody answered."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, method=method)
    request.add_header("Content-Type", "application/json")
    if key:
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=seconds) as answer:
            return Answer(answer.status, answer.read().decode(), dict(answer.headers))
    except urllib.error.HTTPError as error:
        return Answer(error.code, error.read().decode(), dict(error.headers))
    except (OSError, http.client.HTTPException) as error:  # the latter when it ends in the middle of an answer
        return Answer(0, str(error), {})


def free_ports(count: int) -> range:
    """A row of free ports below the ephemeral range, for this process alone until it ends.

    That nobody listens there now does not say that nobody will: another test run, or this one, may have given them
    to a panel that has not started an engine yet, or is just down. So a row is marked by a name that the kernel
    forgets with the process.
    """
    assert count <= ROW
    for start in range(20100, 32700 - ROW, ROW):
        mark = socket.socket(socket.AF_UNIX)
        try:
            mark.bind(f"\0rigpanel-test-ports-{start}")
        except OSError:
            mark.close()
            continue
        _rows.append(mark)
        if all(_is_free(port) for port in range(start, start + count)):
            return range(start, start + count)
    raise AssertionError("no row of free ports")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


class Panel:
    """``start`` it, use it, ``stop`` it. ``owner`` False leaves the first account to the printed set-up link.

    ``environment`` adds to its settings or replaces them. ``Panel(owner=False)`` in a ``with`` is stopped at the end.
    """

    def __init__(self, *, owner: bool = True, **environment: str) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="rp-", dir="/tmp"))  # short: it holds unix sockets
        ports = free_ports(ENGINE_PORTS + 2)
        self.port, self.gateway_port = ports[0], ports[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.gateway_url = f"http://127.0.0.1:{self.gateway_port}"
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("RIGPANEL_", "DJANGO_", "PYTEST_", "COV_"))},
            "RIGPANEL_DATA_DIR": str(self.directory / "var"),
            "RIGPANEL_HOST": "127.0.0.1",
            "RIGPANEL_PORT": str(self.port),
            "RIGPANEL_GATEWAY_PORT": str(self.gateway_port),
            "RIGPANEL_ENGINE_PORTS": f"{ports[2]}-{ports[-1]}",
            "RIGPANEL_RIG": "bench-01",
            "RIGPANEL_HARDWARE": "simulated",
            # Said, and empty: what is left out, a .env in the repository would fill in.
            "RIGPANEL_DATABASE_URL": "",
            "RIGPANEL_REDIS_URL": "",
            **environment,
        }
        if owner:
            self.environment |= {"RIGPANEL_ADMIN_EMAIL": OWNER, "RIGPANEL_ADMIN_PASSWORD": PASSWORD}
        self.repository = REPOSITORY  # an upgrade starts the same panel from another one
        self.output = self.directory / "up.log"
        self.process: subprocess.Popen[bytes] | None = None
        self._keys: dict[str, str] = {}

    @property
    def data(self) -> Path:
        return Path(self.environment["RIGPANEL_DATA_DIR"])

    # -- life ---------------------------------------------------------------------------------------

    def __enter__(self) -> Panel:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> Panel:
        """Returns once /readyz says 200; its own words are in the error when it does not."""
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "manage.py", "up"],
                cwd=self.repository,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        process = self.process
        try:
            wait_for("the panel is ready", lambda: process.poll() is not None or self.is_ready(), seconds=START_SECONDS)
            assert process.poll() is None, f"the panel ended with {process.poll()}"
        except AssertionError as error:
            told = f"{error}\nreadyz: {self.readyz().text}\n{self.said()}\n{self.logs()[-6000:]}"
            self.stop()
            raise AssertionError(told) from None
        return self

    def interrupt(self) -> int:
        """Ctrl-C, which goes to the whole foreground group: the panel ends, engines go on. Returns the exit status."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGINT)
        return self.process.wait(DEADLINE_SECONDS)

    def stop(self) -> None:
        """``manage.py down``, where it was ever started; nothing that belongs to this panel may be left."""
        down = None
        if self.process is not None:
            down = self.manage("down")
            self.process.wait(DEADLINE_SECONDS)
        left = self.members()
        for stat in left:
            send_signal(stat, signal.SIGKILL)
        shutil.rmtree(self.directory, ignore_errors=True)
        assert down is None or down.returncode == 0, f"down: {down.stderr}"
        assert not left, f"left behind by down: {[describe(stat) for stat in left]}"

    def said(self) -> str:
        """What ``up`` has printed."""
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def logs(self) -> str:
        """What its processes have logged."""
        files = sorted((self.data / "logs").glob("*.log"))
        return "\n".join(f"== {file.name}\n{file.read_text(errors='replace')}" for file in files)

    def setup_link(self) -> str:
        found = wait_for("a set-up link is printed", lambda: re.search(r"http://\S+/join/\S+", self.said()))
        return found[0]

    def readyz(self) -> Answer:
        return ask(f"{self.url}/readyz", seconds=10)

    def is_ready(self) -> bool:
        return self.readyz().status == 200

    def wait_ready(self) -> None:
        wait_for("/readyz says 200", self.is_ready)

    # -- commands and requests ----------------------------------------------------------------------

    def manage(self, *arguments: str, seconds: float = 300.0, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "manage.py", *arguments],
            cwd=self.repository,
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )

    def key(self, email: str = OWNER) -> str:
        """A key of this person, made once."""
        if email not in self._keys:
            made = self.manage("createkey", email, "--name", "tests")
            assert made.returncode == 0, made.stderr
            self._keys[email] = made.stdout.strip().splitlines()[-1]
        return self._keys[email]

    def people(self, roles: dict[str, str]) -> None:
        """Accounts with these roles and a key for each, in one command: every command takes seconds to start."""
        code = ["from django.core.management import call_command", "from apps.accounts.services import user_create"]
        code.append("from apps.common.actors import PANEL")
        for email, role in roles.items():
            if email != OWNER:
                code.append(f"user_create(email={email!r}, password={PASSWORD!r}, role={role!r}, actor=PANEL)")
            code.append(f"call_command('createkey', {email!r}, name='tests')")
        made = self.manage("shell", "-c", "\n".join(code))
        keys = [line for line in made.stdout.splitlines() if line.startswith("rp-")]
        assert made.returncode == 0, made.stderr
        self._keys |= dict(zip(roles, keys, strict=True))

    def api(self, path: str, body: Any = None, *, method: str | None = None, email: str = OWNER) -> Answer:
        return ask(f"{self.url}/api/v1{path}", body, method=method, key=self.key(email))

    def get(self, path: str) -> Any:
        answer = self.api(path)
        assert answer.status == 200, f"{path}: {answer.status} {answer.text}"
        return answer.json

    def gateway(self, path: str, body: Any = None, *, key: str | None = None, seconds: float = 150.0) -> Answer:
        return ask(f"{self.gateway_url}/v1{path}", body, key=self.key() if key is None else key, seconds=seconds)

    def switch(self, profile: str, **more: Any) -> int:
        """Ask for a switch; returns the job's id."""
        answer = self.api("/switch", {"profile": profile, **more})
        assert answer.status == 202, answer.text
        return int(answer.json["id"])

    def job(self, job_id: int) -> dict[str, Any]:
        found: dict[str, Any] = self.get(f"/jobs/{job_id}")
        return found

    def finished(self, job_id: int, *, seconds: float = DEADLINE_SECONDS) -> dict[str, Any]:
        """The job once it has ended; an unreachable panel is asked again."""

        def look() -> dict[str, Any] | None:
            answer = self.api(f"/jobs/{job_id}")
            return answer.json if answer.status == 200 and answer.json["state"] in FINAL else None

        return wait_for(f"job {job_id} ends", look, seconds=seconds)

    def step_running(self, job_id: int, name: str) -> None:
        """Returns once this step has begun; fails when the job ended before."""

        def look() -> bool:
            job = self.job(job_id)
            step = next((s for s in job["steps"] if s["name"] == name), None)
            begun = step is not None and step["state"] == "running"
            assert begun or job["state"] not in FINAL, f"job {job_id} ended before {name}: {job}"
            return begun

        wait_for(f"step {name} of job {job_id} runs", look)

    def live(self) -> list[dict[str, Any]]:
        """Deployments that have not ended."""
        items: list[dict[str, Any]] = self.get("/deployments?live=true")["items"]
        return items

    def serving(self) -> list[str]:
        """Profiles that are ready, sorted."""
        return sorted(d["profile"] for d in self.live() if d["status"] == "ready")

    # -- processes ----------------------------------------------------------------------------------

    def pid(self, name: str) -> int | None:
        """Of a process of the panel (see NAMES), or None while it does not run."""
        try:
            known = json.loads((self.data / "run" / "processes" / f"{name}.json").read_text())
            stat = read_stat(int(known["pid"]))
        except (OSError, ValueError, KeyError):
            return None
        same = stat is not None and stat.ticks == known["ticks"] and known["boot"] == boot_id() and is_alive(stat)
        return stat.pid if same and stat is not None else None

    def signal(self, name: str, number: signal.Signals) -> int:
        """Signal one process of the panel by name; returns the pid that got it."""
        pid = wait_for(f"{name} runs", lambda: self.pid(name))
        stat = read_stat(pid)
        assert stat is not None
        send_signal(stat, number)
        return pid

    def kill(self, name: str) -> None:
        """``kill -9``, and wait until the supervisor has started another one."""
        before = self.signal(name, signal.SIGKILL)
        wait_for(f"{name} runs again", lambda: self.pid(name) not in (None, before))

    def members(self) -> list[ProcessStat]:
        """Every living process that belongs to this panel, engines included."""
        return [stat for stat in all_processes().values() if is_alive(stat) and self._is_member(stat.pid)]

    def _is_member(self, pid: int) -> bool:
        mark = os.fsencode(str(self.directory))
        try:
            return mark in Path(f"/proc/{pid}/environ").read_bytes() + Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            return False

    def engines(self) -> list[ProcessStat]:
        """Living engine processes (those that listen), found in /proc, not in the database."""
        ports = range(*(int(p) + i for i, p in enumerate(self.environment["RIGPANEL_ENGINE_PORTS"].split("-"))))
        found = []
        for stat in all_processes().values():
            arguments = command_line(stat.pid)
            port = next((b for a, b in itertools.pairwise(arguments) if a == "--port"), "")
            if is_alive(stat) and port.isdecimal() and int(port) in ports:
                found.append(stat)
        return found


def command_line(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def describe(stat: ProcessStat) -> str:
    return f"{stat.pid}: {' '.join(command_line(stat.pid))[:200]}"


def stream(url: str, key: str, body: dict[str, Any], *, seconds: float = 150.0) -> Iterator[dict[str, Any]]:
    """The chunks of a streamed answer, as they come."""
    request = urllib.request.Request(url, json.dumps({**body, "stream": True}).encode())
    request.add_header("Content-Type", "application/json")
    request.add_header("Authorization", f"Bearer {key}")
    with urllib.request.urlopen(request, timeout=seconds) as answer:
        for line in answer:
            if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                yield json.loads(line[6:])
