"""Ray itself under the launcher: a head and a raylet for each replica's seat, children that die with it.

Runs in Ray's own Python, within ``launcher.py``; ``say`` writes a line of that program's log.
"""

# ruff: noqa: T201 - standard output is the launcher's log

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
from typing import Any

from apps.engines.ray_serve.status import PLACE
from apps.engines.ray_serve.workspace import Workspace

END_SECONDS = 8.0
CPUS = 64  # Ray's CPUs only count; they bind nothing, and its own actors must not run out of them
OBJECT_STORE_BYTES = 256 * 1024 * 1024  # requests and answers pass through it, weights do not
PR_SET_PDEATHSIG = 1


class Failed(Exception):
    """Ray or the application cannot serve; the message is for people."""


def say(text: str) -> None:
    for line in text.splitlines() or [""]:
        print(f"[rigpanel] {line}", flush=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Cluster:
    """Ray's head and raylets, one raylet for each replica's seat.

    A seat has ``cards`` (their ids; none on the CPU), and may have ``env`` for all that runs on them and a ``prefix``,
    the words that bind it to the cards' NUMA node.
    """

    def __init__(self, workspace: Workspace, seats: list[dict[str, Any]]) -> None:
        self.workspace = workspace
        self.seats = seats
        self.ports = {name: free_port() for name in ("gcs", "dashboard", "serve", "grpc", "client")}
        self.metrics_ports = [free_port() for _ in seats]
        self.processes: dict[int, asyncio.subprocess.Process] = {}
        self.environment = {
            **os.environ,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(workspace.token_file),
            # Fixed ports unless told: a second Ray on the host's network would miss them.
            "AUTOSCALER_METRIC_PORT": str(free_port()),
            "DASHBOARD_METRIC_PORT": str(free_port()),
        }

    def arguments(self, index: int) -> list[str]:
        gpus = self.seats[index]["cards"]
        head = ["--head", "--port", str(self.ports["gcs"]), "--dashboard-host", "127.0.0.1"]
        head += ["--dashboard-port", str(self.ports["dashboard"]), "--include-dashboard", "true"]
        head += ["--ray-client-server-port", str(self.ports["client"])]
        return [
            *self.seats[index].get("prefix", ()),
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block"),
            *(head if index == 0 else ["--address", f"127.0.0.1:{self.ports['gcs']}"]),
            *("--node-ip-address", "127.0.0.1"),
            # The kernel's ephemeral ports, which engine ports stay out of; a fixed range is one more to keep free.
            *("--min-worker-port", "0", "--max-worker-port", "0"),
            *("--dashboard-agent-listen-port", str(free_port())),
            *("--metrics-export-port", str(self.metrics_ports[index])),
            *("--num-cpus", str(CPUS), "--num-gpus", str(len(gpus))),
            *("--resources", json.dumps({PLACE: 1, f"{PLACE}_{index}": 1})),
            *("--object-store-memory", str(OBJECT_STORE_BYTES)),
            *("--temp-dir", str(self.workspace.directory)),
            *("--include-log-monitor", "false", "--disable-usage-stats"),
            *("--log-style", "record", "--log-color", "false"),
        ]

    async def start(self, index: int) -> None:
        seat = self.seats[index]
        environment = {**self.environment, **seat.get("env", {}), "CUDA_VISIBLE_DEVICES": ",".join(seat["cards"])}
        with open(self.workspace.directory / f"start-{index}.log", "ab") as output:
            self.processes[index] = await asyncio.create_subprocess_exec(
                *self.arguments(index),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=asyncio.subprocess.STDOUT,
                env=environment,
                preexec_fn=die_with_parent,
            )

    def start_log(self, index: int) -> str:
        """The end of what ``ray start`` and the servers behind it said."""
        texts = [self.workspace.tail(self.workspace.directory / f"start-{index}.log")]
        if index == 0:
            for name in ("gcs_server.err", "gcs_server.out", "raylet.err", "dashboard.err"):
                texts.append(self.workspace.tail(self.workspace.logs / name, 1500))
        return "\n".join(text for text in texts if text)

    async def keep_raylets(self) -> None:
        """Start a raylet again that ended; raise Failed when the head did."""
        while True:
            for index, process in list(self.processes.items()):
                if process.returncode is None:
                    continue
                if index == 0:
                    raise Failed(f"Ray's head ended with code {process.returncode}.\n{self.start_log(0)}")
                say(f"the raylet of replica {index} ended with code {process.returncode}; starting it again")
                await asyncio.sleep(2)
                await self.start(index)
            await asyncio.sleep(0.5)

    async def stop(self) -> None:
        """Raylets first, the head last; what is left after the grace is killed."""
        for order in (sorted(self.processes)[1:], sorted(self.processes)[:1]):
            living = [self.processes[i] for i in order if self.processes[i].returncode is None]
            for process in living:
                with contextlib.suppress(ProcessLookupError):
                    process.terminate()
            if living:
                await asyncio.wait([asyncio.create_task(p.wait()) for p in living], timeout=END_SECONDS)
            for process in living:
                if process.returncode is None:
                    with contextlib.suppress(ProcessLookupError):
                        process.kill()
                    await process.wait()
