"""What is wrong before a start is one sentence and exit code 1, never a traceback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.panel import REPOSITORY, Panel, free_ports

pytestmark = pytest.mark.processes


def refused(panel: Panel, **environment: str) -> str:
    """The one sentence of a start that was refused."""
    answer = panel.manage("up", **environment)
    assert answer.returncode == 1, answer
    assert "Traceback" not in answer.stderr
    lines = answer.stderr.strip().splitlines()
    assert len(lines) == 1, answer.stderr
    return lines[0]


def test_a_port_taken_by_some_program_is_named_with_its_setting(panel: Panel) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        sentence = refused(panel, RIGPANEL_PORT=str(port))
    assert f"Port {port} on 127.0.0.1" in sentence
    assert "RIGPANEL_PORT" in sentence
    assert "another rigpanel" not in sentence


def test_a_data_directory_that_cannot_be_used_is_named(panel: Panel, tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("not a folder")
    assert str(in_the_way) in refused(panel, RIGPANEL_DATA_DIR=str(in_the_way))
    assert str(in_the_way) in refused(panel, RIGPANEL_DATA_DIR=str(in_the_way / "below"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RIGPANEL_PORT", "http"),
        ("RIGPANEL_PORT", "70000"),
        ("RIGPANEL_ENGINE_PORTS", "28199-28100"),
        ("RIGPANEL_PUBLIC_URL", "rig.example"),
        ("RIGPANEL_REDIS_URL", "memcached://x"),
        ("RIGPANEL_REDIS_URL", "redis://:hunter2@store:port/0"),
        ("RIGPANEL_DATABASE_URL", "garbage"),
        ("RIGPANEL_DATABASE_URL", "mongo://rig:hunter2@store/rig"),
        ("RIGPANEL_DATABASE_URL", "postgres://rig:hunter2@store:port/rig"),
        ("RIGPANEL_DATABASE_URL", "postgres://rig:hunter2@store"),
        ("RIGPANEL_EMAIL_URL", "garbage"),
        ("RIGPANEL_EMAIL_URL", "smtp://rig:hunter2@mail.example:port"),
        ("RIGPANEL_EMAIL_URL", "smtp+tls://"),
        ("RIGPANEL_TRUSTED_PROXIES", "10.0.0.1, proxy.local"),
        ("RIGPANEL_HARDWARE", "foo"),
        ("RIGPANEL_HARDWARE", "replay:"),
        ("RIGPANEL_RUNNER", "docker"),
        ("RIGPANEL_HOST", "192.0.2.7"),
        ("RIGPANEL_HOST", "no such host"),
        ("RIGPANEL_SECRET_KEY_FILE", "/nowhere/at/all"),
    ],
)
def test_a_wrong_setting_is_named(panel: Panel, name: str, value: str) -> None:
    sentence = refused(panel, **{name: value})
    assert name in sentence
    assert "hunter2" not in sentence  # a password in an address


def test_a_redis_that_does_not_answer_is_said_without_its_password(panel: Panel) -> None:
    sentence = refused(panel, RIGPANEL_REDIS_URL=f"redis://:hunter2@127.0.0.1:{free_ports(1)[0]}/0")
    assert "Redis" in sentence
    assert "hunter2" not in sentence


def test_a_postgresql_that_does_not_answer_is_said_without_its_password(panel: Panel) -> None:
    port = free_ports(1)[0]
    sentence = refused(panel, RIGPANEL_DATABASE_URL=f"postgres://rig:hunter2@127.0.0.1:{port}/rig")
    assert "database" in sentence
    assert "hunter2" not in sentence


def test_a_file_that_is_no_database_is_named(panel: Panel) -> None:
    panel.data.mkdir()
    (panel.data / "rigpanel.sqlite3").write_text("this is not a database, it is a text of some length\n" * 100)
    assert str(panel.data) in refused(panel)


def test_a_half_finished_first_start_is_completed_by_the_next(panel: Panel) -> None:
    """Killed at a few moments of its preparation; then it still comes up."""
    argv = [sys.executable, str(REPOSITORY / "manage.py"), "up", "--prepare-only"]
    for seconds in (2.0, 4.0):
        process = subprocess.Popen(
            argv, env=panel.environment, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    (panel.data / "run").mkdir(parents=True, exist_ok=True)
    stale = socket.socket(socket.AF_UNIX)  # and a socket that nobody listens at any more
    stale.bind(str(panel.data / "run" / "store.sock"))
    stale.close()
    panel.start()


def test_the_first_owner_comes_from_the_environment_and_no_link_is_made(panel: Panel) -> None:
    owner = {"RIGPANEL_ADMIN_EMAIL": "alice@lab.example", "RIGPANEL_ADMIN_PASSWORD": "correct horse battery"}
    answer = panel.manage("up", "--prepare-only", **owner)
    assert answer.returncode == 0, answer.stderr
    assert "first owner: alice@lab.example" in answer.stdout
    assert "correct horse" not in answer.stdout
    assert "/join/" not in panel.manage("up", "--prepare-only").stdout
    half = refused(panel, RIGPANEL_DATA_DIR=f"{panel.data}-2", RIGPANEL_ADMIN_EMAIL="alice@lab.example")
    assert "RIGPANEL_ADMIN_PASSWORD" in half


def test_an_old_python_is_told_in_one_sentence(tmp_path: Path) -> None:
    """The file is read by Pythons of ten years ago, so it must be valid for them and say what is missing."""
    text = (REPOSITORY / "bootstrap.py").read_text()
    pretend = tmp_path / "bootstrap.py"
    pretend.write_text(text.replace("OLDEST = (3, 11)", "OLDEST = (9, 9)"))
    environment = {k: v for k, v in os.environ.items() if k != "PATH"} | {"PATH": "/nonexistent"}
    answer = subprocess.run([sys.executable, str(pretend)], env=environment, capture_output=True, text=True, timeout=60)
    assert answer.returncode == 1
    assert "rigpanel needs 3.11 or newer" in answer.stderr
    assert len(answer.stderr.strip().splitlines()) == 1
