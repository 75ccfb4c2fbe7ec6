"""A shim that starts late, on a host that thrashes or after its launcher died: what was given up does not begin."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from apps.runners import process, processes, shim, systemd
from apps.runners.process import ProcessRunner
from apps.runners.protocol import LaunchSpec, RunnerError
from tests.runners.test_process import REPOSITORY, wait_until

# Where the real shim is held, as a line of it: by the kernel (SIGSTOP), until somebody lets it go on.
SHIM = Path(shim.__file__).read_text()
BEFORE_ITS_SPEC = '    with open(os.path.join(directory, "spec.json")) as file:\n'
BEFORE_ITS_RECORD = "    own_pid = os.getpid()\n"
AFTER_ITS_RECORD = "    os.umask(0o022)\n"
WHILE_THE_ENGINE_RUNS = "    # The lock came from the launcher"
LAUNCH_ELSEWHERE = """
import sys
from pathlib import Path
from apps.runners import shim
from apps.runners.process import ProcessRunner
from apps.runners.protocol import LaunchSpec
shim.__file__ = sys.argv[2]
ProcessRunner(Path(sys.argv[1])).launch(LaunchSpec("launch-1", tuple(sys.argv[3:])))
"""


class Held:
    """A process of the shim's that stands still."""

    def __init__(self, folder: Path) -> None:
        self.program, self.marks, self.ran = folder / "shim.py", folder / "marks", folder / "ran"
        self.marks.mkdir()
        engine = ("sh", "-c", f"echo > {self.ran}; exec sleep 600")
        self.spec = LaunchSpec("launch-1", engine, stop_signals=(("SIGKILL", 20.0),))

    def at(self, line: str) -> None:
        assert SHIM.count(line) == 1
        stop = (
            f"    open({str(self.marks)!r} + f'/{{os.getpid()}}', 'w').close(); os.kill(os.getpid(), signal.SIGSTOP)\n"
        )
        self.program.write_text(SHIM.replace(line, stop + line))

    @property
    def pids(self) -> list[int]:
        return [int(path.name) for path in self.marks.iterdir()]

    def wait(self) -> None:
        wait_until(lambda: any((stat := shim.read_stat(pid)) is not None and stat.state == "T" for pid in self.pids))

    def let_go_on(self) -> None:
        """And it comes to its end, or to its engine."""
        for pid in self.pids:
            os.kill(pid, signal.SIGCONT)
        wait_until(lambda: self.ran.exists() or not any(map(lives, self.pids)))


def lives(pid: int) -> bool:
    stat = shim.read_stat(pid)
    return stat is not None and processes.is_alive(stat)


@pytest.fixture
def held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    made = Held(tmp_path)
    monkeypatch.setattr(shim, "__file__", str(made.program))
    yield made
    for pid in filter(lives, made.pids):
        os.kill(pid, signal.SIGKILL)


def ended(made: ProcessRunner) -> Iterator[ProcessRunner]:
    yield made
    if (handle := made.recover("launch-1")) is not None:
        made.stop(handle)


@pytest.fixture
def runner(tmp_path: Path, held: Held, monkeypatch: pytest.MonkeyPatch) -> Iterator[ProcessRunner]:
    """Its patience begins when the shim stands still, however slow this machine is."""
    communicate = subprocess.Popen.communicate

    def once_it_stands(popen: Any, *arguments: Any, **named: Any) -> Any:
        held.wait()
        return communicate(popen, *arguments, **named)

    monkeypatch.setattr(subprocess.Popen, "communicate", once_it_stands)
    monkeypatch.setattr(process, "SHIM_START_SECONDS", 0.2)
    yield from ended(ProcessRunner(tmp_path / "launches"))


@pytest.fixture
def units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ProcessRunner]:
    """The systemd runner, with a ``systemd-run`` that starts the unit's command outside as the real one does."""
    tool = tmp_path / "bin" / "systemd-run"
    tool.parent.mkdir()
    tool.write_text('#!/bin/sh\nwhile [ "$1" != -- ]; do shift; done\nshift\nsetsid "$@" >/dev/null 2>&1 &\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent), prepend=os.pathsep)
    monkeypatch.setattr(systemd, "SHIM_START_SECONDS", 0.5)
    yield from ended(systemd.SystemdRunner(tmp_path / "launches", user=True))


@pytest.fixture
def orphan(runner: ProcessRunner, held: Held) -> None:
    """A shim that is held before its engine is on record, and whose launcher was killed."""
    held.at(BEFORE_ITS_RECORD)
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCH_ELSEWHERE, str(runner.root), str(held.program), *held.spec.argv],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    held.wait()
    launcher.kill()
    launcher.wait()


@pytest.mark.parametrize("kind", ["runner", "units"])
@pytest.mark.parametrize("line", [BEFORE_ITS_SPEC, BEFORE_ITS_RECORD], ids=["spec", "record"])
def test_a_shim_that_comes_too_late_starts_no_engine(
    line: str, kind: str, held: Held, request: pytest.FixtureRequest
) -> None:
    runner = request.getfixturevalue(kind)
    held.at(line)
    with pytest.raises(RunnerError, match=r"did not (answer|start)"):
        runner.launch(replace(held.spec, secret_env={"KEY": "s3cret"}))
    held.wait()
    assert not (runner.root / "launch-1" / "secret.json").exists()
    held.let_go_on()
    assert not held.ran.exists()


@pytest.mark.parametrize("line", [AFTER_ITS_RECORD, WHILE_THE_ENGINE_RUNS], ids=["record", "runs"])
def test_an_engine_that_began_just_then_is_stopped(line: str, runner: ProcessRunner, held: Held) -> None:
    held.at(line)
    with pytest.raises(RunnerError, match="did not answer"):
        runner.launch(held.spec)
    handle = runner.recover("launch-1")
    assert handle is not None
    assert runner.observe(handle).pids == ()


def test_an_interpreter_that_hangs_is_ended(
    runner: ProcessRunner, held: Held, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = tmp_path / "python"
    slow.write_text(f'#!/bin/sh\n: > {held.marks}/$$\nkill -STOP $$\nexec {sys.executable} "$@"\n')
    slow.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(slow))
    with pytest.raises(RunnerError, match="did not answer"):
        runner.launch(held.spec)
    wait_until(lambda: held.pids != [] and not any(map(lives, held.pids)))


@pytest.mark.usefixtures("orphan")
def test_what_a_killed_worker_left_starting_is_withdrawn(runner: ProcessRunner, held: Held) -> None:
    assert runner.withdraw("launch-1") is None
    held.let_go_on()
    assert not held.ran.exists()
    wait_until(lambda: runner.recover("launch-1") is None)  # the shim notes that nothing began


@pytest.mark.usefixtures("orphan")
def test_nobody_waits_for_ever_for_a_shim_that_hangs(runner: ProcessRunner, held: Held) -> None:
    with pytest.raises(RunnerError, match="is being started"):
        runner.launch(held.spec)
    with pytest.raises(RunnerError, match="is being started"):
        runner.forget("launch-1")
    held.let_go_on()
    assert not held.ran.exists()
