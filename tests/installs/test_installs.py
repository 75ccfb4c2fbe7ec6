"""Engines: found, installed by a job, removed; and the programs that an install runs."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from apps.common.actors import COMMAND_LINE
from apps.common.errors import Conflict, NotFound
from apps.common.identity import birth_mark
from apps.installs import detection, starter
from apps.installs.causes import explain
from apps.installs.models import EngineInstall, InstallState
from apps.installs.selectors import install_for, install_get, install_list, starter_is_installed
from apps.installs.services import install_remove, install_request
from apps.jobs import child
from apps.jobs.handlers import JobCancelled, JobFailed
from apps.jobs.models import Job, JobState
from apps.jobs.runner import JobContext, job_claim
from apps.jobs.services import job_cancel

PATIENCE_SECONDS = 60.0


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not true():
        assert time.monotonic() < deadline, "waited long enough"
        time.sleep(0.05)


@pytest.fixture
def places(settings: Any, tmp_path: Path) -> Path:
    settings.INSTALLS_DIR = tmp_path / "installs"
    settings.MODELS_DIR = tmp_path / "models"
    settings.ENGINE_EXECUTABLES = {"vllm": "", "ray_serve": "", "llama_cpp": ""}
    return tmp_path


@pytest.fixture
def context(rig: Any, places: Path) -> JobContext:
    claimed = job_claim(install_request(name="starter", actor=COMMAND_LINE, rig=rig).pk)
    assert claimed is not None
    return claimed


def test_two_clicks_make_one_job_and_a_third_after_a_cancel_makes_another(rig: Any, olivia: Any) -> None:
    first = install_request(name="starter", actor=COMMAND_LINE, rig=rig)
    assert install_request(name="starter", actor=COMMAND_LINE, rig=rig) == first
    job_cancel(first, actor=COMMAND_LINE)
    assert install_request(name="starter", actor=COMMAND_LINE, rig=rig) != first
    assert first.queue == "rig.bench-01.control"


def test_only_what_is_known_can_be_installed(rig: Any) -> None:
    with pytest.raises(NotFound, match="there is: starter"):
        install_request(name="vllm; rm -rf /", actor=COMMAND_LINE, rig=rig)
    assert not Job.objects.exists()


def test_the_lock_pins_every_package_with_hashes_and_names_no_address() -> None:
    text = starter.LOCK.read_text("utf-8")
    pins = [line for line in text.splitlines() if "==" in line]
    assert len(pins) == starter.PACKAGES
    assert text.count("--hash=sha256:") >= len(pins)
    assert "://" not in text
    assert "--index" not in text
    assert starter.pinned_version() == "2026.10.11549"


# -- the programs that an install runs --


def test_a_programs_lines_arrive_and_a_bad_end_carries_its_last_words(context: JobContext) -> None:
    lines: list[str] = []
    child.run(context, [sys.executable, "-c", "print('one'); print('two')"], on_line=lines.append, timeout_seconds=60)
    assert lines == ["one", "two"]
    assert context.job.data["child"] is None
    code = "import sys; print('no space', file=sys.stderr); sys.exit(3)"
    with pytest.raises(child.ChildFailed) as failed:
        child.run(context, [sys.executable, "-c", code], on_line=lines.append, timeout_seconds=60)
    assert (failed.value.code, failed.value.tail) == (3, ["no space"])


def test_a_program_sees_neither_the_panels_secrets_nor_its_modules(
    context: JobContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RIGPANEL_SECRET_KEY", "hunter2")
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    lines: list[str] = []
    code = "import os; print([k for k in os.environ if k.startswith('RIGPANEL_') or k == 'PYTHONPATH'])"
    child.run(context, [sys.executable, "-c", code], on_line=lines.append, timeout_seconds=60)
    assert lines == ["[]"]


@pytest.mark.django_db(transaction=True)
def test_cancelling_ends_the_program_with_all_its_children(context: JobContext) -> None:
    code = (
        "import subprocess, sys, time\n"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(p.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    grandchildren: list[int] = []

    def on_line(line: str) -> None:
        grandchildren.append(int(line))
        job_cancel(context.job, actor=COMMAND_LINE)

    with pytest.raises(JobCancelled):
        child.run(context, [sys.executable, "-c", code], on_line=on_line, timeout_seconds=600)
    stored = context.job.data["child"]
    for pid in (int(stored[0]), *grandchildren):
        wait_until(lambda pid=pid: not _is_running(pid))  # type: ignore[misc]


def test_a_program_that_takes_too_long_is_ended(context: JobContext) -> None:
    code = "import time; time.sleep(600)"
    with pytest.raises(child.ChildFailed) as failed:
        child.run(context, [sys.executable, "-c", code], on_line=lambda _: None, timeout_seconds=0.5)
    assert failed.value.code is None
    assert explain(failed.value, "Installing the packages").startswith("Installing the packages took too long")


def test_a_worker_that_takes_over_ends_what_the_killed_one_left(context: JobContext) -> None:
    import subprocess

    left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    reaper = threading.Thread(target=left.wait, daemon=True)
    reaper.start()
    context.save_data(child=[left.pid, birth_mark(left.pid)])
    child.end_leftover(context)
    reaper.join(timeout=PATIENCE_SECONDS)
    assert left.returncode is not None


def test_a_process_that_only_inherited_the_number_is_left_alone(context: JobContext) -> None:
    me = psutil.Process()
    for stranger in (birth_mark(me.pid) + "0", me.create_time() - 1000):  # as written now, and by earlier versions
        context.save_data(child=[me.pid, stranger])
        child.end_leftover(context)
        assert _is_running(me.pid)


def _is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# -- the steps of the starter --


def test_a_full_disk_is_said_before_anything_is_downloaded(
    context: JobContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(starter, "VENV_NEEDS_BYTES", 10**18)
    with pytest.raises(JobFailed, match=r"too full.*Make room"):
        starter.check_disk(context)


def test_a_data_directory_that_cannot_be_used_is_a_sentence(context: JobContext, settings: Any, places: Path) -> None:
    (places / "file").write_text("")
    settings.INSTALLS_DIR = places / "file" / "installs"
    with pytest.raises(JobFailed, match="cannot be used"):
        starter.check_disk(context)


def test_a_half_made_environment_is_made_anew_and_an_unreachable_index_is_said(
    context: JobContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = starter.folder()
    (broken / "bin").mkdir(parents=True)
    (broken / "bin" / "python").write_text("not a program")
    (broken / "leftover").write_text("x")
    starter.make_environment(context)
    assert not (broken / "leftover").exists()
    assert starter.make_environment(context) == "already there"

    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # the discard port: nobody listens
    monkeypatch.setenv("PIP_RETRIES", "1")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    with pytest.raises(JobFailed, match="package index cannot be reached") as failed:
        starter.install_packages(context)
    assert failed.value.evidence["log_tail"]
    assert not starter._packages_are_whole()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("OSError: [Errno 28] No space left on device", "disk is full"),
        ("Error: ensurepip is not available", "python3-venv"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.", "not the one that"),
        ("ReadTimeoutError: HTTPSConnectionPool", "cannot be reached"),
        ("ERROR: No matching distribution found for xllamacpp==1", "no file for this Python"),
        ("PermissionError: [Errno 13] Permission denied", "cannot be written"),
        ("something new", "failed with exit code 1"),
    ],
)
def test_what_went_wrong_is_told_in_a_sentence(line: str, words: str) -> None:
    assert words in explain(child.ChildFailed(1, ["Collecting x", line]), "Installing the packages")


# -- engines that people installed themselves --


def program(folder: Path, name: str, says: str, code: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!{sys.executable}\nprint({says!r})\nraise SystemExit({code})\n")
    path.chmod(0o755)
    return path


@pytest.mark.django_db
def test_engines_on_the_path_and_configured_ones_are_found_with_their_versions(
    places: Path, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm = program(places / "bin", "vllm", "INFO starting\n0.33.0")
    mine = program(places / "mine", "llama-server", "version: 11434 (abc)")
    program(places / "bin", "llama-server", "", code=127)
    monkeypatch.setenv("PATH", str(places / "bin"))
    settings.ENGINE_EXECUTABLES = {"vllm": "", "ray_serve": "", "llama_cpp": str(mine)}
    detection.detect("bench-01")
    found = install_for("bench-01", "vllm")
    assert found is not None
    assert (found.version, found.command, found.managed) == ("0.33.0", [str(vllm), "serve"], False)
    found = install_for("bench-01", "llama_cpp")
    assert found is not None
    assert (found.version, found.command) == ("11434 (abc)", [str(mine)])
    broken = install_list("bench-01").get(name="llama-server (PATH)")
    assert broken.state == InstallState.BROKEN
    assert "ended with code 127" in broken.problem
    assert detection.detect("bench-01") == []

    vllm.unlink()
    detection.detect("bench-01")
    assert install_for("bench-01", "vllm") is None


@pytest.mark.parametrize(
    ("output", "version"),
    [
        ("version: 11434 (1a2b3c4)\nbuilt with gcc", "11434 (1a2b3c4)"),
        ("WARNING: something\n0.33.0\n", "0.33.0"),
        ("0.31.1rc1.dev42+gabc.cpu", "0.31.1rc1.dev42+gabc.cpu"),
        ("vllm 0.33.0", "0.33.0"),
        ("hello", ""),
    ],
)
def test_versions_are_read_out_of_what_engines_print(output: str, version: str) -> None:
    assert detection.parse_version(output, 0)[0] == version


@pytest.mark.django_db
def test_what_a_person_installed_goes_before_the_starter_and_a_broken_one_is_never_chosen() -> None:
    def make(name: str, **values: Any) -> EngineInstall:
        return EngineInstall.objects.create(rig_name="bench-01", engine="llama_cpp", name=name, **values)

    assert not starter_is_installed("bench-01")
    starter_row = make("starter", managed=True)
    assert install_for("bench-01", "llama_cpp") == starter_row
    own = make("llama-server (PATH)")
    make("llama-server (configured)", state=InstallState.BROKEN)
    assert install_for("bench-01", "llama_cpp") == own
    assert install_for("bench-02", "llama_cpp") is None
    with pytest.raises(NotFound):
        install_get("nope")


# -- removal --


@pytest.mark.django_db(transaction=True)
def test_a_managed_install_is_removed_unless_something_runs_from_it(rig: Any, places: Path, settings: Any) -> None:
    folder = places / "installs" / "starter-1"
    runner = program(folder / "bin", "server", "x")
    runner.write_text(f"#!{sys.executable}\nimport time\nprint('up', flush=True)\ntime.sleep(600)\n")
    install = EngineInstall.objects.create(
        rig_name="bench-01", engine="llama_cpp", name="starter", managed=True, path=str(folder)
    )
    import subprocess

    process = subprocess.Popen([sys.executable, str(runner)], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        job = _run(install_remove(install, actor=COMMAND_LINE))
        assert job.state == JobState.FAILED
        assert f"in use by process {process.pid}" in job.summary
        assert folder.exists()
    finally:
        process.kill()
        process.communicate()
    job = _run(install_remove(install, actor=COMMAND_LINE))
    assert job.state == JobState.SUCCEEDED
    assert not folder.exists()
    install.refresh_from_db()
    assert install.state == InstallState.REMOVED
    with pytest.raises(Conflict, match="already removed"):
        install_remove(install, actor=COMMAND_LINE)


@pytest.mark.django_db(transaction=True)
def test_nothing_outside_of_the_panels_own_folder_is_ever_removed(rig: Any, places: Path) -> None:
    precious = places / "precious"
    precious.mkdir()
    row = EngineInstall.objects.create(
        rig_name="bench-01",
        engine="llama_cpp",
        name="odd",
        managed=True,
        path=str(places / "installs" / ".." / "precious"),
    )
    job = _run(install_remove(row, actor=COMMAND_LINE))
    assert job.state == JobState.FAILED
    assert precious.exists()
    found = EngineInstall.objects.create(rig_name="bench-01", engine="vllm", name="vllm (PATH)", path="/usr/bin/vllm")
    with pytest.raises(Conflict, match="found, not installed"):
        install_remove(found, actor=COMMAND_LINE)


def _run(job: Job) -> Job:
    claimed = job_claim(job.pk)
    assert claimed is not None
    claimed.run()
    job.refresh_from_db()
    return job


def test_vllms_version_is_read_beside_it_and_its_flags_are_asked_once(rig: Any, settings: Any, tmp_path: Path) -> None:
    """It imports for half a minute before it answers either."""
    program = tmp_path / "bin" / "vllm"
    program.parent.mkdir()
    (tmp_path / "lib/python3.11/site-packages/vllm-0.99.1+cpu.dist-info").mkdir(parents=True)
    words = "options:\n  --max-model-len N     Longest. (default: None)\n"
    script = "#!/bin/sh\necho asked >> {log}\ncat <<'TEXT'\n" + words + "TEXT\n"
    program.write_text(script.format(log=tmp_path / "log"))
    program.chmod(0o755)
    settings.ENGINE_EXECUTABLES = {"vllm": str(program)}
    for _ in range(2):
        detection.detect("bench-01")
    install = EngineInstall.objects.get(engine="vllm", path=str(program))
    assert (install.version, install.state) == ("0.99.1+cpu", "ready")
    assert install.flags == {"max_model_len": {"kind": "whole", "default": "None"}}
    assert (tmp_path / "log").read_text() == "asked\n"
    EngineInstall.objects.all().delete()
    program.write_text("#!/bin/sh\necho 'ImportError: libcudart.so.13' >&2\nexit 1\n")
    detection.detect("bench-01")
    broken = EngineInstall.objects.get(engine="vllm", path=str(program))
    assert broken.state == "broken"
    assert "libcudart" in broken.problem
