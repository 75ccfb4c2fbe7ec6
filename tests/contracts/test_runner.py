"""What every runner promises: the real one with real processes, the fake one by its script."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from apps.runners.fake import FakeRunner, FakeScript
from apps.runners.process import ProcessRunner
from apps.runners.protocol import Handle, LaunchSpec, Observation, ProcessState, Runner, RunnerError

DEADLINE_SECONDS = 60.0
WAIT_FOR_EVER = "import time\nwhile True: time.sleep(60)"
# Each behaviour as a program for the real runner and as a script for the fake one.
BEHAVIOURS: dict[str, tuple[str, FakeScript]] = {
    "runs": (f"print('up', flush=True)\n{WAIT_FOR_EVER}", FakeScript(output="up\n")),
    "exits with 3": ("import sys; print('bye'); sys.exit(3)", FakeScript(output="bye\n", exit_code=3)),
    "exits with 0": ("pass", FakeScript(exit_code=0)),
    "kills itself": ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", FakeScript(exit_code=-9)),
    "ignores SIGTERM": (
        f"import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('up', flush=True)\n{WAIT_FOR_EVER}",
        FakeScript(output="up\n", ignores=("SIGTERM",)),
    ),
    "leaves gracefully": (
        "import signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\nprint('up', flush=True)\n"
        + WAIT_FOR_EVER,
        FakeScript(output="up\n", stop_exit_code=0),
    ),
    "has two children": (
        f"import subprocess, sys\nfor _ in range(2): subprocess.Popen([sys.executable, '-c', {WAIT_FOR_EVER!r}])\n"
        f"print('up', flush=True)\n{WAIT_FOR_EVER}",
        FakeScript(output="up\n", children=2),
    ),
    "dies before its children": (
        f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {WAIT_FOR_EVER!r}])\nsys.exit(4)",
        FakeScript(exit_code=4, children=1, children_survive=True),
    ),
    "prints 200 kB": (
        f"for n in range(20000): print(f'{{n:09d}}', flush=n == 19999)\n{WAIT_FOR_EVER}",
        FakeScript(output="".join(f"{n:09d}\n" for n in range(20000))),
    ),
}


class Harness:
    """One runner and everything launched on it, so that nothing is left behind."""

    def __init__(self, kind: str, root: Path) -> None:
        self.scripts: dict[str, FakeScript] = {}
        self.runner: Runner = ProcessRunner(root) if kind == "process" else FakeRunner(root, self.scripts)
        self.handles: list[Handle] = []

    def spec(self, behaviour: str, launch_id: str = "launch-1", **changes: Any) -> LaunchSpec:
        program, script = BEHAVIOURS[behaviour]
        self.scripts[launch_id] = script
        spec = LaunchSpec(
            launch_id, (sys.executable, "-c", program), stop_signals=(("SIGTERM", 3.0), ("SIGKILL", 20.0))
        )
        return replace(spec, **changes)

    def launch(self, behaviour: str, launch_id: str = "launch-1", **changes: Any) -> Handle:
        handle = self.runner.launch(self.spec(behaviour, launch_id, **changes))
        self.handles.append(handle)
        return handle

    def launch_and_wait_until_up(self, behaviour: str) -> Handle:
        handle = self.launch(behaviour)
        wait_until(lambda: "up" in self.runner.logs(handle).text)
        return handle

    def wait_for_exit(self, handle: Handle) -> Observation:
        wait_until(lambda: self.runner.observe(handle).state is not ProcessState.RUNNING)
        return self.runner.observe(handle)

    def clean_up(self) -> None:
        for handle in self.handles:
            with contextlib.suppress(RunnerError):
                self.runner.stop(handle)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


@pytest.fixture(params=["process", "fake"])
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Harness]:
    harness = Harness(request.param, tmp_path / "launches")
    yield harness
    harness.clean_up()


def test_it_is_a_runner(rig: Harness) -> None:
    assert isinstance(rig.runner, Runner)


def test_a_launched_engine_runs_and_its_output_can_be_read(rig: Harness) -> None:
    handle = rig.launch_and_wait_until_up("runs")
    seen = rig.runner.observe(handle)
    assert seen.state is ProcessState.RUNNING
    assert handle.engine_pid in seen.pids
    assert seen.memory_rss_bytes is not None
    assert seen.memory_rss_bytes > 0
    assert seen.exit_code is None


@pytest.mark.parametrize(("behaviour", "code"), [("exits with 3", 3), ("exits with 0", 0), ("kills itself", -9)])
def test_an_exit_code_is_kept_as_subprocess_tells_it(rig: Harness, behaviour: str, code: int) -> None:
    seen = rig.wait_for_exit(rig.launch(behaviour))
    assert (seen.state, seen.exit_code, seen.pids) == (ProcessState.EXITED, code, ())
    assert seen.exited_at is not None


def test_the_last_words_of_an_ended_engine_stay_readable(rig: Harness) -> None:
    handle = rig.launch("exits with 3")
    rig.wait_for_exit(handle)
    assert rig.runner.logs(handle).text == "bye\n"


def test_stop_ends_it_by_the_first_signal_when_that_is_enough(rig: Harness) -> None:
    handle = rig.launch_and_wait_until_up("leaves gracefully")
    seen = rig.runner.stop(handle)
    assert (seen.state, seen.exit_code, seen.pids) == (ProcessState.EXITED, 0, ())


def test_stop_escalates_when_sigterm_is_ignored(rig: Harness) -> None:
    handle = rig.launch_and_wait_until_up("ignores SIGTERM")
    seen = rig.runner.stop(handle)
    assert (seen.state, seen.exit_code) == (ProcessState.EXITED, -9)


def test_stopping_twice_gives_the_same_answer(rig: Harness) -> None:
    handle = rig.launch_and_wait_until_up("runs")
    first = rig.runner.stop(handle)
    assert rig.runner.stop(handle) == first


def test_stop_takes_the_children_too(rig: Harness) -> None:
    handle = rig.launch_and_wait_until_up("has two children")
    assert len(rig.runner.observe(handle).pids) == 3
    assert rig.runner.stop(handle).pids == ()


def test_children_that_outlive_the_first_process_are_seen_and_stopped(rig: Harness) -> None:
    handle = rig.launch("dies before its children")
    seen = rig.wait_for_exit(handle)
    assert (seen.state, seen.exit_code, len(seen.pids)) == (ProcessState.EXITED, 4, 1)
    after = rig.runner.stop(handle)
    assert (after.state, after.exit_code, after.pids) == (ProcessState.EXITED, 4, ())


def test_launching_the_same_id_twice_returns_the_living_first(rig: Harness) -> None:
    first = rig.launch("runs")
    assert rig.launch("runs") == first


def test_launching_an_id_that_has_ended_starts_nothing_new(rig: Harness) -> None:
    """A task that is delivered twice must not start an engine that was stopped in between."""
    first = rig.launch("exits with 3")
    rig.wait_for_exit(first)
    assert rig.launch("exits with 3") == first
    assert rig.runner.observe(first).exit_code == 3


def test_a_handle_survives_json(rig: Harness) -> None:
    handle = rig.launch_and_wait_until_up("runs")
    stored = json.loads(json.dumps(handle.to_dict()))
    assert Handle.from_dict(stored) == handle
    assert rig.runner.stop(Handle.from_dict(stored)).pids == ()


def test_recover_finds_a_launch_by_its_id(rig: Harness) -> None:
    assert rig.runner.recover("launch-1") is None
    handle = rig.launch("runs")
    assert rig.runner.recover("launch-1") == handle


def test_a_forgotten_launch_is_no_longer_found(rig: Harness) -> None:
    handle = rig.launch("exits with 3")
    rig.wait_for_exit(handle)
    rig.runner.forget("launch-1")
    assert rig.runner.recover("launch-1") is None
    assert rig.runner.observe(handle).state is ProcessState.LOST


def test_a_running_launch_cannot_be_forgotten(rig: Harness) -> None:
    handle = rig.launch_and_wait_until_up("runs")
    with pytest.raises(RunnerError, match="stop it first"):
        rig.runner.forget("launch-1")
    assert rig.runner.observe(handle).state is ProcessState.RUNNING


def test_a_launch_that_was_withdrawn_does_not_begin_any_more(rig: Harness) -> None:
    assert rig.runner.withdraw("launch-1") is None
    assert rig.runner.withdraw("launch-1") is None
    with pytest.raises(RunnerError, match="given up"):
        rig.launch("runs")
    assert rig.runner.recover("launch-1") is None
    rig.runner.forget("launch-1")
    assert rig.launch("runs").launch_id == "launch-1"


def test_to_withdraw_what_has_begun_finds_it(rig: Harness) -> None:
    handle = rig.launch("runs")
    assert rig.runner.withdraw("launch-1") == handle
    assert rig.runner.observe(handle).state is ProcessState.RUNNING
    assert rig.launch("runs") == handle  # a task delivered twice


@pytest.mark.parametrize("launch_id", ["", "../other", "a/b", "a b", "a\n"])
def test_an_id_that_could_leave_the_directory_is_refused(rig: Harness, launch_id: str) -> None:
    with pytest.raises(RunnerError, match="letters, digits"):
        rig.runner.launch(rig.spec("runs", launch_id))


def test_a_log_is_read_on_from_where_the_last_read_ended(rig: Harness) -> None:
    handle = rig.launch("prints 200 kB")
    wait_until(lambda: rig.runner.logs(handle, -10).text == "000019999\n")
    text, offset = "", 0
    while chunk := rig.runner.logs(handle, offset, max_bytes=7777).text:
        text += chunk
        offset = rig.runner.logs(handle, offset, max_bytes=7777).next_offset
    assert text == "".join(f"{n:09d}\n" for n in range(20000))
    assert offset == 200_000


def test_the_log_stays_bounded_and_its_offsets_stay_true(rig: Harness) -> None:
    handle = rig.launch("prints 200 kB", log_max_bytes=40_000)
    wait_until(lambda: rig.runner.logs(handle, -10).text == "000019999\n")
    wait_until(lambda: len(rig.runner.logs(handle, 0, 1_000_000).text) <= 40_000)
    kept = rig.runner.logs(handle, 0, 1_000_000)
    assert kept.next_offset == 200_000
    begin = 200_000 - len(kept.text)
    assert kept.text.endswith("000019998\n000019999\n")
    assert "\0" not in kept.text
    line = rig.runner.logs(handle, 199_000, 10)
    assert line.text == "000019900\n"
    assert begin > 0


def test_a_log_of_a_launch_that_never_was_is_empty(rig: Harness) -> None:
    handle = rig.launch("exits with 0")
    stranger = replace(handle, launch_id="other", directory=str(Path(handle.directory) / "nowhere"), pid=2**22 - 2)
    assert rig.runner.logs(stranger).text == ""


def test_a_pid_that_now_belongs_to_another_process_is_left_alone(rig: Harness) -> None:
    """Handles outlive reboots: the same pid with another start time is a stranger."""
    handle = rig.launch("exits with 0")
    rig.wait_for_exit(handle)
    child = os.posix_spawn(sys.executable, [sys.executable, "-c", WAIT_FOR_EVER], os.environ, setsid=True)
    try:
        number = {"pid": child, "engine_pid": child, "engine_create_time": 1.0, "create_time": 1.0}
        first_version = {"version": 1, "boot_id": "", "ticks": None, "engine_ticks": None}
        for stale in (replace(handle, **number), replace(handle, **number, **first_version)):
            seen = rig.runner.stop(stale)
            assert seen.pids == ()
            assert os.waitpid(child, os.WNOHANG) == (0, 0)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
