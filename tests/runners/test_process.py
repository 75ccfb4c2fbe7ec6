"""What only the process runner promises: nobody's death takes an engine along, no secret leaks."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from apps.runners import processes, shim
from apps.runners.process import ProcessRunner, read_log
from apps.runners.protocol import Handle, LaunchSpec, ProcessState, RunnerError

REPOSITORY = Path(__file__).resolve().parents[2]
DEADLINE_SECONDS = 60.0
TALKS = "import time\nn = 0\nwhile True:\n    print('line', n, flush=True)\n    n += 1\n    time.sleep(0.02)"
STOP = (("SIGTERM", 5.0), ("SIGKILL", 20.0))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def python(program: str, launch_id: str = "launch-1", **changes: object) -> LaunchSpec:
    return LaunchSpec(launch_id, (sys.executable, "-c", program), stop_signals=STOP, **changes)  # type: ignore[arg-type]


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[ProcessRunner]:
    made = ProcessRunner(tmp_path / "launches")
    yield made
    for directory in made.root.glob("*"):
        handle = made.recover(directory.name)
        if handle is not None:
            made.stop(handle)


def kill_shim(handle: Handle) -> None:
    os.kill(handle.pid, signal.SIGKILL)
    wait_until(lambda: (seen := shim.read_stat(handle.pid)) is None or seen.state == "Z")


def in_another_process(program: str, *arguments: str) -> str:
    """Runs ``program`` with the runner's package, as another worker would."""
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        check=True,
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
    ).stdout


LAUNCH_ELSEWHERE = """
import json, sys
from pathlib import Path
from apps.runners.process import ProcessRunner
from apps.runners.protocol import LaunchSpec
spec = LaunchSpec("launch-1", (sys.executable, "-c", sys.argv[2]), stop_signals=(("SIGKILL", 20.0),))
print(json.dumps(ProcessRunner(Path(sys.argv[1])).launch(spec).to_dict()))
"""


def test_an_engine_outlives_the_process_that_launched_it(runner: ProcessRunner) -> None:
    output = in_another_process(LAUNCH_ELSEWHERE, str(runner.root), TALKS)
    handle = Handle.from_dict(json.loads(output))
    assert runner.observe(handle).state is ProcessState.RUNNING
    assert runner.recover("launch-1") == handle


def test_neither_engine_nor_shim_is_below_the_launching_process(runner: ProcessRunner) -> None:
    handle = runner.launch(python(TALKS))
    shim_stat = shim.read_stat(handle.pid)
    engine_stat = shim.read_stat(int(handle.engine_pid or 0))
    assert shim_stat is not None
    assert engine_stat is not None
    assert shim_stat.parent != os.getpid()
    assert engine_stat.session == handle.engine_pid
    assert shim_stat.session not in (os.getsid(0), engine_stat.session)


def test_another_process_finds_the_engine_and_stops_it(runner: ProcessRunner) -> None:
    handle = runner.launch(python(TALKS))
    program = """
import sys
from pathlib import Path
from apps.runners.process import ProcessRunner
runner = ProcessRunner(Path(sys.argv[1]))
print(runner.stop(runner.recover("launch-1")).exit_code)
"""
    assert in_another_process(program, str(runner.root)).strip() == "-15"
    assert runner.observe(handle).state is ProcessState.EXITED


def test_two_processes_that_launch_the_same_id_at_once_get_one_engine(runner: ProcessRunner) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", LAUNCH_ELSEWHERE, str(runner.root), TALKS],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    handles = {racer.communicate(timeout=DEADLINE_SECONDS)[0] for racer in racers}
    assert len(handles) == 1
    handle = Handle.from_dict(json.loads(handles.pop()))
    assert runner.observe(handle).pids == (handle.engine_pid,)


def test_killing_the_shim_leaves_the_engine_running_and_talking(runner: ProcessRunner) -> None:
    handle = runner.launch(python(TALKS))
    kill_shim(handle)
    spoken = runner.logs(handle).next_offset
    wait_until(lambda: runner.logs(handle).next_offset > spoken + 100)
    assert runner.observe(handle).state is ProcessState.RUNNING


def test_an_engine_without_a_shim_is_stopped_all_the_same(runner: ProcessRunner) -> None:
    handle = runner.launch(python(TALKS))
    kill_shim(handle)
    seen = runner.stop(handle)
    assert (seen.state, seen.exit_code, seen.pids) == (ProcessState.LOST, None, ())


def test_an_engine_that_somebody_froze_ends_in_order_all_the_same(runner: ProcessRunner) -> None:
    """A process in state T gets no SIGTERM before it is continued."""
    program = (
        "import signal, sys, time\nsignal.signal(15, lambda *_: sys.exit(7))\nprint('up', flush=True)\ntime.sleep(600)"
    )
    patient = replace(python(program), stop_signals=(("SIGTERM", 60.0), ("SIGKILL", 20.0)))
    handle = runner.launch(patient)
    wait_until(lambda: "up" in runner.logs(handle).text)
    assert handle.engine_pid is not None
    os.kill(handle.engine_pid, signal.SIGSTOP)
    wait_until(lambda: (seen := shim.read_stat(handle.engine_pid or 0)) is not None and seen.state == "T")
    assert runner.stop(handle).exit_code == 7


def test_children_are_stopped_when_both_the_shim_and_the_first_process_are_gone(runner: ProcessRunner) -> None:
    program = (
        f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {TALKS!r}])\nprint('up', flush=True)\n{TALKS}"
    )
    handle = runner.launch(python(program))
    wait_until(lambda: len(runner.observe(handle).pids) == 2)
    kill_shim(handle)
    os.kill(int(handle.engine_pid or 0), signal.SIGKILL)
    wait_until(lambda: handle.engine_pid not in runner.observe(handle).pids)
    seen = runner.observe(handle)
    assert seen.state is ProcessState.LOST
    assert len(seen.pids) == 1
    assert runner.stop(handle).pids == ()


def test_without_a_shim_observing_keeps_the_log_bounded(runner: ProcessRunner) -> None:
    handle = runner.launch(
        python("import time\nwhile True: print('x' * 999, flush=True); time.sleep(0.001)", log_max_bytes=50_000)
    )
    kill_shim(handle)
    wait_until(lambda: runner.logs(handle).next_offset > 0 and runner.logs(handle, -1).next_offset > 200_000)
    runner.observe(handle)
    log = Path(handle.directory) / "log"
    assert log.stat().st_size > 200_000
    assert runner.logs(handle, 0, 10).next_offset > 100_000


def test_a_child_that_opened_its_own_session_is_stopped_too(runner: ProcessRunner) -> None:
    program = (
        f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {TALKS!r}], start_new_session=True)\n{TALKS}"
    )
    handle = runner.launch(python(program))
    wait_until(lambda: len(runner.observe(handle).pids) == 2)
    other = next(pid for pid in runner.observe(handle).pids if pid != handle.engine_pid)
    runner.stop(handle)
    wait_until(lambda: (seen := shim.read_stat(other)) is None or seen.state == "Z")


def test_a_secret_reaches_the_engine_and_nothing_else(runner: ProcessRunner) -> None:
    secret = "correct-horse-battery"
    program = "import os, time\nprint(len(os.environ['KEY']), flush=True)\nwhile True: time.sleep(60)"
    handle = runner.launch(python(program, secret_env={"KEY": secret}))
    wait_until(lambda: runner.logs(handle).text == f"{len(secret)}\n")
    for pid in (handle.pid, int(handle.engine_pid or 0)):
        assert secret.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
    assert secret not in json.dumps(handle.to_dict())
    for file in Path(handle.directory).iterdir():
        assert secret.encode() not in file.read_bytes(), file.name
        assert stat.S_IMODE(file.stat().st_mode) & 0o077 == 0, file.name
    assert stat.S_IMODE(Path(handle.directory).stat().st_mode) == 0o700


def test_what_a_machine_rules_out_for_its_nvlinks_reaches_the_engine(
    runner: ProcessRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    ruled_out = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
    for name, value in ruled_out.items():
        monkeypatch.setenv(name, value)
    handle = runner.launch(python(f"import os; print([os.environ.get(n) for n in {list(ruled_out)}])"))
    wait_until(lambda: "]" in runner.logs(handle).text)
    assert "['0', '1', '1']" in runner.logs(handle).text


def test_the_panels_own_environment_does_not_reach_the_engine(
    runner: ProcessRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RIGPANEL_ADMIN_PASSWORD", "hunter2")
    handle = runner.launch(python("import os; print(sorted(os.environ))", env={"ASKED_FOR": "1"}))
    wait_until(lambda: "]" in runner.logs(handle).text)
    text = runner.logs(handle).text
    assert "RIGPANEL_ADMIN_PASSWORD" not in text
    assert "ASKED_FOR" in text
    assert "PATH" in text


def test_an_engine_gets_no_input_and_default_signals(runner: ProcessRunner) -> None:
    program = (
        "import os, sys, signal\n"
        "print(repr(sys.stdin.read()), signal.getsignal(signal.SIGHUP), len(os.listdir('/proc/self/fd')))"
    )
    handle = runner.launch(python(program))
    wait_until(lambda: runner.logs(handle).text.endswith("\n"))
    # Standard input, output and error, and the one that lists the folder.
    assert runner.logs(handle).text == "'' 0 4\n"


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (("/nowhere/vllm", "serve"), "There is no program /nowhere/vllm"),
        (("no-such-engine-here",), "no program 'no-such-engine-here' on the PATH"),
        ((), "empty command line"),
    ],
)
def test_a_program_that_is_not_there_is_a_clear_error(
    runner: ProcessRunner, argv: tuple[str, ...], sentence: str
) -> None:
    with pytest.raises(RunnerError, match=sentence):
        runner.launch(LaunchSpec("launch-1", argv))
    assert runner.recover("launch-1") is None


def test_a_file_that_may_not_be_executed_is_a_clear_error(runner: ProcessRunner, tmp_path: Path) -> None:
    program = tmp_path / "engine"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o644)
    with pytest.raises(RunnerError, match="not executable"):
        runner.launch(LaunchSpec("launch-1", (str(program),)))


def test_a_program_that_the_kernel_refuses_can_be_launched_again_once_mended(
    runner: ProcessRunner, tmp_path: Path
) -> None:
    program = tmp_path / "engine"
    program.write_text("#!/nowhere/interpreter\n")
    program.chmod(0o755)
    spec = LaunchSpec("launch-1", (str(program),), stop_signals=STOP, secret_env={"KEY": "k"})
    with pytest.raises(RunnerError, match=r"could not be started.*No such file"):
        runner.launch(spec)
    assert runner.recover("launch-1") is None
    program.write_text("#!/bin/sh\nexit 7\n")
    handle = runner.launch(spec)
    wait_until(lambda: runner.observe(handle).exit_code == 7)


def test_a_root_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    with pytest.raises(RunnerError, match="cannot write to"):
        ProcessRunner(in_the_way / "launches").launch(python("pass"))


def test_a_handle_of_a_newer_panel_is_refused_in_words() -> None:
    with pytest.raises(RunnerError, match="newer rigpanel"):
        Handle.from_dict({"version": 99, "runner": "process"})


def test_where_a_filesystem_refuses_holes_the_log_is_truncated_and_offsets_stay_true(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"a" * 30_000)
    assert shim.trim_log(str(tmp_path), 10_000, may_punch=False)
    assert log.stat().st_size == 0
    with log.open("ab") as file:
        file.write(b"new words")
    chunk = read_log(tmp_path, 0, 100)
    assert (chunk.text, chunk.next_offset) == ("new words", 30_009)
    assert read_log(tmp_path, 30_004, 100).text == "words"
    assert read_log(tmp_path, -5, 100).text == "words"


def test_a_trimmed_log_gives_its_blocks_back(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"line\n" * 200_000)
    before = log.stat().st_blocks
    assert shim.trim_log(str(tmp_path), 100_000)
    assert log.stat().st_size == 1_000_000
    if shim.read_cut(str(tmp_path))[0] == 0:  # this filesystem takes holes
        assert log.stat().st_blocks < before / 4
    assert not shim.trim_log(str(tmp_path), 100_000)


def test_a_character_is_never_cut_in_two_by_a_read(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes("aé€😀".encode())
    offset, text = 0, ""
    while True:
        chunk = read_log(tmp_path, offset, 4)
        if not chunk.text:
            break
        text += chunk.text
        offset = chunk.next_offset
    assert text == "aé€😀"


def test_a_process_of_an_earlier_boot_is_not_taken_for_the_engine(runner: ProcessRunner) -> None:
    handle = runner.launch(python(TALKS))
    path = Path(handle.directory) / "started.json"
    honest = path.read_text()
    path.write_text(honest.replace(shim.boot_id(), "00000000-0000-0000-0000-000000000000"))
    stale = runner.recover(handle.launch_id)
    assert stale is not None
    first_version = replace(handle, version=1, boot_id="", ticks=None, engine_ticks=None)
    try:
        for one in (stale, first_version):
            with contextlib.suppress(RunnerError):
                assert runner.stop(one).state is ProcessState.LOST
        assert shim.start_ticks(int(handle.engine_pid or 0)) is not None
    finally:
        path.write_text(honest)


def test_a_handle_of_the_first_version_finds_its_engine(runner: ProcessRunner) -> None:
    handle = runner.launch(python(TALKS))
    old = {k: v for k, v in handle.to_dict().items() if k not in ("boot_id", "ticks", "engine_ticks")} | {"version": 1}
    assert runner.observe(Handle.from_dict(old)).state is ProcessState.RUNNING


def test_a_stepped_clock_loses_no_engine(runner: ProcessRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = runner.launch(python(TALKS))
    honest = shim.create_time
    monkeypatch.setattr(shim, "create_time", lambda pid: (honest(pid) or 0) + 7200)
    assert runner.observe(handle).state is ProcessState.RUNNING
    assert runner.stop(handle).pids == ()


PARENT_THAT_ENDS_ITS_CHILD = """
import signal, subprocess, sys
child = subprocess.Popen([sys.executable, "-c",
    "import signal, time; signal.signal(15, lambda *_: print('child was asked', flush=True)); "
    "print('up', flush=True); time.sleep(600)"])
def end(*_):
    child.kill()
    child.wait()
    print("ended in order", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
print("ready", flush=True)
while True:
    signal.pause()
"""


def test_the_first_process_may_end_the_others_in_order_before_anybody_else_is_asked(runner: ProcessRunner) -> None:
    handle = runner.launch(python(PARENT_THAT_ENDS_ITS_CHILD, ask_first_seconds=DEADLINE_SECONDS))
    wait_until(lambda: {"up", "ready"} <= set(runner.logs(handle).text.split()))
    seen = runner.stop(handle)
    assert (seen.state, seen.exit_code, seen.pids) == (ProcessState.EXITED, 0, ())
    assert "ended in order" in runner.logs(handle).text
    assert "child was asked" not in runner.logs(handle).text


def test_a_first_process_that_leaves_the_others_behind_is_followed_by_the_signals_for_all(
    runner: ProcessRunner,
) -> None:
    program = PARENT_THAT_ENDS_ITS_CHILD.replace("child.kill()", "sys.exit(3)")
    handle = runner.launch(python(program, ask_first_seconds=DEADLINE_SECONDS))
    wait_until(lambda: {"up", "ready"} <= set(runner.logs(handle).text.split()))
    seen = runner.stop(handle)
    assert (seen.state, seen.exit_code, seen.pids) == (ProcessState.EXITED, 3, ())


def test_waiting_for_an_end_returns_with_the_first_end_and_not_before() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        stat = shim.read_stat(child.pid)
        assert stat is not None
        processes.wait_for_an_end([stat], 0.01)
        assert child.poll() is None
        assert child.stdin is not None
        child.stdin.close()
        processes.wait_for_an_end([stat], DEADLINE_SECONDS)
        assert child.poll() is not None
    processes.wait_for_an_end([stat], DEADLINE_SECONDS)  # of one that is gone: returns too
