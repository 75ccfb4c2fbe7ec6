"""The systemd runner's command line, exactly; no systemd is needed for that."""

from __future__ import annotations

from pathlib import Path

import pytest

from apps.runners import shim
from apps.runners.process import ProcessRunner
from apps.runners.protocol import Runner, RunnerError
from apps.runners.registry import choose_runner
from apps.runners.systemd import SystemdRunner, start_command


def test_the_unit_runs_the_shim_and_carries_no_secret() -> None:
    command = start_command(
        "launch-7", Path("/var/lib/rigpanel/launches/launch-7"), user=True, python="/usr/bin/python3"
    )
    assert command == (
        "systemd-run",
        "--user",
        "--unit=rigpanel-engine-launch-7",
        "--description=rigpanel engine launch-7",
        "--collect",
        "--quiet",
        "--service-type=exec",
        "--property=KillMode=process",
        "--property=OOMPolicy=continue",
        "--property=StandardOutput=append:/var/lib/rigpanel/launches/launch-7/shim.log",
        "--property=StandardError=append:/var/lib/rigpanel/launches/launch-7/shim.log",
        "--",
        "/usr/bin/python3",
        "-I",
        "-S",
        shim.__file__,
        "/var/lib/rigpanel/launches/launch-7",
        "-1",
    )


def test_root_starts_units_of_the_system() -> None:
    assert start_command("a", Path("/x"), user=False, python="p")[1] == "--system"


def test_auto_and_process_mean_the_process_runner(tmp_path: Path) -> None:
    assert choose_runner("auto", tmp_path).name == "process"
    assert isinstance(choose_runner("process", tmp_path), ProcessRunner)


def test_a_machine_without_systemd_is_told_so(tmp_path: Path) -> None:
    runner = SystemdRunner(tmp_path)
    assert isinstance(runner, Runner)
    assert runner.available() == (runner.unavailable_because() is None)
    if not runner.available():
        with pytest.raises(RunnerError, match="RIGPANEL_RUNNER is systemd, but"):
            choose_runner("systemd", tmp_path)


def test_an_unknown_runner_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunnerError, match="no runner 'docker'"):
        choose_runner("docker", tmp_path)
