"""Real Ray and real Ray Serve, started, watched and stopped as the panel does it; an echo stands in for the model.

The cards are names that nobody has, which Ray believes: where each worker lies is Ray's own doing all the same.
The same with vLLM in it, through a whole panel, is ``test_ray_serve_llm.py``, for the nightly run.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from apps.engines.protocol import (
    EngineKind,
    EngineLaunch,
    HealthProbe,
    Install,
    LaunchContext,
    ModelSpec,
    ReadinessState,
    ReplicaSlot,
    SharedReport,
)
from apps.engines.ray_serve.adapter import RayServeAdapter
from apps.engines.ray_serve.network import why_not_private
from apps.engines.ray_serve.workspace import session_root
from apps.runners.process import ProcessRunner
from apps.runners.protocol import Handle, LaunchSpec, ProcessState
from tests.panel import ask, free_ports, wait_for

REPOSITORY = Path(__file__).resolve().parents[2]
PYTHON = Path(os.environ.get("RIGPANEL_TEST_RAY", REPOSITORY / ".engines" / "vllm")) / "bin" / "python"
KEY = "real-ray-key"
PAIRS = (("GPU-a", "GPU-b"), ("GPU-c", "GPU-d"))
START_SECONDS = 400.0  # half a minute on a quiet machine
adapter = RayServeAdapter()

pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason=f"needs Ray ({PYTHON}): make engines")


def echo_launch(name: str, port: int, pairs: tuple[tuple[str, ...], ...]) -> EngineLaunch:
    """The adapter's launch with the echo as application; all else is as for a model."""
    slots = tuple(ReplicaSlot(f"{name}-{i}", "127.0.0.1", port + i, KEY, gpu_uuids=p) for i, p in enumerate(pairs))
    context = LaunchContext(
        model=ModelSpec("echo", "/nowhere"),
        options={},
        replicas=slots,
        install=Install(EngineKind.RAY_SERVE, "2.60.0", (str(PYTHON),)),
        tensor_parallel_size=len(pairs[0]),
        nvlinked=True,
    )
    (launch,) = adapter.launch_specs(context)
    argv = [word.replace("ray.serve.llm:build_openai_app", "tests.real.ray_echo:build") for word in launch.argv]
    return replace(launch, argv=tuple(argv))


def living(pids: tuple[int, ...]) -> list[int]:
    """Which of them are more than an entry that nobody has asked for yet."""
    found = []
    for pid in pids:
        try:
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found.append(pid)
        except psutil.NoSuchProcess:
            continue
    return found


class Ray:
    """One launch through the process runner."""

    def __init__(self, runner: ProcessRunner, launch: EngineLaunch, port: int) -> None:
        self.runner, self.base = runner, f"http://127.0.0.1:{port}"
        self.port = port
        self.handle: Handle = runner.launch(
            LaunchSpec(
                launch.launch_id,
                launch.argv,
                launch.env,
                launch.secret_env,
                stop_signals=launch.stop_signals,
                ask_first_seconds=launch.ask_first_seconds,
            )
        )

    @property
    def log(self) -> str:
        return self.runner.logs(self.handle, 0, 4_000_000).text

    def readiness(self) -> ReadinessState:
        status = ask(f"{self.base}{adapter.health_path}", seconds=5).status
        found = adapter.readiness(self.log, HealthProbe(status or None))
        assert found.state is not ReadinessState.FAILED, self.log
        return found.state

    def report(self) -> SharedReport | None:
        return adapter.parse_report(ask(f"{self.base}{adapter.replicas_path}", key=KEY, seconds=5).text)

    def states(self) -> list[str]:
        report = self.report()
        return [one.state for one in report.replicas] if report else []

    def get(self, path: str) -> Any:
        answer = ask(f"{self.base}{path}", key=KEY)
        assert answer.status == 200, answer.text
        return answer.json

    def pids(self) -> tuple[int, ...]:
        return self.runner.observe(self.handle).pids


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessRunner]:
    made = ProcessRunner(tmp_path_factory.mktemp("launches"))
    yield made
    for directory in made.root.glob("*"):
        if (handle := made.recover(directory.name)) is not None:
            made.stop(handle)


@pytest.fixture(scope="module")
def serving(runner: ProcessRunner) -> Ray:
    port = free_ports(2).start
    ray = Ray(runner, echo_launch("pairs", port, PAIRS), port)
    wait_for("Ray serves", lambda: ray.readiness() is ReadinessState.READY, seconds=START_SECONDS)
    return ray


def test_both_replicas_serve_and_requests_reach_both(serving: Ray) -> None:
    assert serving.states() == ["running", "running"]
    seen: set[int] = set()

    def both() -> bool:
        seen.add(serving.get("/v1/who")["pid"])
        return len(seen) == 2

    wait_for("both replicas answered", both)


def test_the_workers_of_a_replica_lie_on_one_pair(serving: Ray) -> None:
    """Ray gives out the lowest free cards of a node; with a raylet for each pair there are no others."""
    found: dict[int, tuple[str, ...]] = {}

    def all_told() -> bool:
        answer = serving.get("/v1/cards")
        found[answer["pid"]] = tuple(sorted(answer["cards"]))
        return len(found) == 2

    wait_for("both replicas told their cards", all_told)
    assert sorted(found.values()) == sorted(PAIRS)


def test_a_stream_comes_through_piece_by_piece(serving: Ray, tmp_path: Path) -> None:
    until = tmp_path / "go-on"
    request = urllib.request.Request(f"{serving.base}/v1/stream?until={until}")
    request.add_header("Authorization", f"Bearer {KEY}")
    with urllib.request.urlopen(request, timeout=120) as stream:
        assert stream.readline() == b"data: first\n"
        until.touch()
        assert b"data: second" in stream.read()


def test_without_the_launchs_key_only_health_answers(serving: Ray) -> None:
    assert ask(f"{serving.base}/health").status == 200
    for path in ("/v1/who", "/metrics", adapter.replicas_path):
        assert ask(f"{serving.base}{path}").status == 401
        assert ask(f"{serving.base}{path}", key="wrong").status == 401


def test_neither_key_nor_token_is_on_a_command_line(serving: Ray) -> None:
    root = session_root(tempfile.gettempdir(), os.getuid())
    tokens = [file.read_text() for file in root.glob("*/token")]
    assert tokens
    lines = [" ".join(psutil.Process(pid).cmdline()) for pid in living(serving.pids())]
    assert not [line for line in lines for secret in (KEY, *tokens) if secret in line]


def test_on_this_machines_network_only_the_door_listens(serving: Ray) -> None:
    if why_not_private():
        assert adapter.check_start(serving.log, ()).warnings, "Ray listens on the host's network, and nothing says so"
        return
    ours = set(serving.pids())
    listening = {
        c.laddr.port for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.pid in ours
    }
    assert listening == {serving.port}
    assert adapter.check_start(serving.log, ()).facts == {"network": "private"}


def test_a_replica_that_is_killed_comes_back_while_the_other_serves(serving: Ray) -> None:
    victim = serving.get("/v1/who")["pid"]
    os.kill(victim, signal.SIGKILL)
    wait_for("its death is told", lambda: sorted(serving.states())[-1:] == ["starting"] or "gone" in serving.states())
    assert "running" in serving.states()
    assert ask(f"{serving.base}/health").status == 200
    assert serving.get("/v1/who")["pid"] != victim
    wait_for("it is back", lambda: serving.states() == ["running", "running"], seconds=START_SECONDS)


def test_stopping_ends_all_of_ray_in_order(serving: Ray, runner: ProcessRunner) -> None:
    before = serving.pids()
    assert len(before) > 10
    seen = runner.stop(serving.handle)
    assert (seen.state, seen.exit_code, seen.pids) == (ProcessState.EXITED, 0, ())
    assert "[rigpanel] application deleted" in serving.log
    assert living(before) == []


def test_of_a_launcher_that_was_killed_the_next_look_leaves_nothing(runner: ProcessRunner) -> None:
    """The kernel ends ``ray start`` with it and what that started; the rest is found by its session and ended."""
    port = free_ports(2).start
    ray = Ray(runner, echo_launch("killed", port, (("GPU-a",),)), port)
    wait_for("Ray's head answers", lambda: "Ray's head answers" in ray.log, seconds=START_SECONDS)
    before = ray.pids()
    assert len(before) > 5
    os.kill(int(ray.handle.engine_pid or 0), signal.SIGKILL)
    wait_for("its death is seen", lambda: runner.observe(ray.handle).state is ProcessState.EXITED)
    seen = runner.stop(ray.handle)
    assert (seen.exit_code, seen.pids) == (-signal.SIGKILL, ())
    assert living(before) == []


def test_a_port_that_is_taken_is_told_at_once(runner: ProcessRunner) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ray = Ray(runner, echo_launch("clash", port, (("GPU-a",),)), port)
        wait_for("it ended", lambda: runner.observe(ray.handle).state is not ProcessState.RUNNING)
        found = adapter.diagnose(ray.log, runner.observe(ray.handle).exit_code)
        assert found.cause == "port_busy"
        assert str(port) in json.dumps(found.summary)
