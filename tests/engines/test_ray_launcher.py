"""The launcher as a process, with a fake Ray below it: what it starts, what it gives up on, how it ends."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from apps.engines.protocol import Cause, EngineKind, Install, LaunchContext, ModelSpec, ReplicaSlot
from apps.engines.ray_serve.adapter import PACKAGE_ROOT, RayServeAdapter
from apps.runners.process import ProcessRunner
from apps.runners.protocol import Handle, LaunchSpec, ProcessState
from tests.engines.contexts import free_port
from tests.panel import ask, wait_for

KEY = "launcher-key"
adapter = RayServeAdapter()


class Launcher:
    def __init__(self, runner: ProcessRunner, folder: Path, scenario: str) -> None:
        self.runner, self.port, self.folder = runner, free_port(), folder
        slots = tuple(
            ReplicaSlot(
                f"launcher-{i}",
                "127.0.0.1",
                self.port + i,
                KEY,
                gpu_uuids=cards,
                argv_prefix=("env", f"BOUND={i}"),
            )
            for i, cards in enumerate((("GPU-a", "GPU-b"), ("GPU-c", "GPU-d")))
        )
        context = LaunchContext(
            model=ModelSpec("echo", "/nowhere"),
            options={},
            replicas=slots,
            install=Install(EngineKind.RAY_SERVE, "fake", (sys.executable,)),
            tensor_parallel_size=2,
        )
        (launch,) = adapter.launch_specs(context)
        environment = launch.env | {
            "PYTHONPATH": f"{PACKAGE_ROOT}:{Path(__file__).with_name('fake_ray')}",
            "FAKE_RAY": scenario,
            "TMPDIR": str(folder),
        }
        launch = replace(launch, env=environment)
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
        return self.runner.logs(self.handle, 0, 1_000_000).text

    def states(self) -> list[str]:
        report = adapter.parse_report(ask(f"http://127.0.0.1:{self.port}{adapter.replicas_path}", key=KEY).text)
        return [one.state for one in report.replicas] if report else []

    def serves(self) -> bool:
        return "[rigpanel] ready" in self.log and self.states() == ["running", "running"]

    def exit_code(self) -> int | None:
        wait_for("it ends", lambda: self.runner.observe(self.handle).state is not ProcessState.RUNNING)
        return self.runner.observe(self.handle).exit_code

    def raylets(self) -> dict[str, int]:
        """Pid by the cards that it sees."""
        found = {}
        for file in self.session().glob("node-*.json"):
            node = json.loads(file.read_text())
            if Path(f"/proc/{node['node_id']}").exists():
                found[node["env"]["CUDA_VISIBLE_DEVICES"]] = int(node["node_id"])
        return found

    def session(self) -> Path:
        """The folder of this launch's Ray."""
        pids = {str(pid) for pid in self.runner.observe(self.handle).pids}
        (folder,) = [
            owner.parent
            for owner in Path("/tmp").glob(f"rigpanel-ray-{os.getuid()}/*/owner")
            if owner.read_text().split()[0] in pids
        ]
        return folder


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[ProcessRunner]:
    made = ProcessRunner(tmp_path / "launches")
    yield made
    for directory in made.root.glob("*"):
        if (handle := made.recover(directory.name)) is not None:
            made.stop(handle)


def test_every_raylet_has_its_own_cards_settings_and_node(runner: ProcessRunner, tmp_path: Path) -> None:
    ray = Launcher(runner, tmp_path, "RUNNING")
    wait_for("it serves", ray.serves)
    seen = [json.loads(file.read_text())["env"] for file in ray.session().glob("node-*.json")]
    assert sorted(seen, key=str) == [
        {"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b", "NCCL_P2P_LEVEL": "NVL", "BOUND": "0"},
        {"CUDA_VISIBLE_DEVICES": "GPU-c,GPU-d", "NCCL_P2P_LEVEL": "NVL", "BOUND": "1"},
    ]
    session = ray.session()
    seen_end = runner.stop(ray.handle)
    assert (seen_end.exit_code, seen_end.pids) == (0, ())
    assert "[rigpanel] application deleted" in ray.log
    assert not session.exists()


def test_a_raylet_that_ends_is_started_again(runner: ProcessRunner, tmp_path: Path) -> None:
    ray = Launcher(runner, tmp_path, "RUNNING")
    wait_for("it serves", ray.serves)
    victim = ray.raylets()["GPU-c,GPU-d"]
    os.kill(victim, signal.SIGKILL)
    wait_for("another one is there", lambda: ray.raylets().get("GPU-c,GPU-d", victim) != victim)
    wait_for("it serves again", ray.serves)
    assert "the raylet of replica 1 ended" in ray.log


@pytest.mark.parametrize(
    ("scenario", "cause", "said"),
    [
        ("DEPLOY_FAILED", Cause.CRASHED, "it broke"),
        ("INFEASIBLE", Cause.UNSUPPORTED_SPLIT, '{"GPU": 2.0}'),
        ("dies", Cause.CRASHED, "Ray's head ended with code 1"),
    ],
)
def test_what_cannot_come_up_ends_with_a_reason(
    runner: ProcessRunner, tmp_path: Path, scenario: str, cause: Cause, said: str
) -> None:
    ray = Launcher(runner, tmp_path, scenario)
    assert ray.exit_code() == 1
    found = adapter.diagnose(ray.log, 1)
    assert (found.cause, said in found.summary) == (cause, True), ray.log
    assert runner.observe(ray.handle).pids == ()
