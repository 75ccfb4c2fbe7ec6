"""A newer panel takes over the engine that an older one started: migrations run while it serves."""

from __future__ import annotations

import io
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.panel import REPOSITORY, Panel, ask, command_line, wait_for
from tests.real.conftest import GEMMA

MIGRATIONS_AGO = 10


def git(*arguments: str) -> bytes:
    return subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, check=True).stdout


def older_revision() -> str:
    """The newest tag, else the commit before the last ten that brought migrations; empty where there is no history."""
    try:
        tags = git("tag", "--list", "v*", "--merged", "HEAD~1", "--sort=-creatordate").decode().split()
        if tags:
            return tags[0]
        added = git("log", "--format=%H", "--diff-filter=A", "--", "apps/*/migrations/0*.py").decode().split()
        return f"{added[:MIGRATIONS_AGO][-1]}~1" if len(added) > 1 else ""
    except (OSError, subprocess.CalledProcessError):
        return ""


@pytest.fixture
def older(tmp_path: Path) -> Path:
    revision = older_revision()
    if not revision:
        pytest.skip("there is no older revision here")
    folder = tmp_path / "older"
    with tarfile.open(fileobj=io.BytesIO(git("archive", revision))) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture
def panel(older: Path) -> Iterator[Panel]:
    running = Panel()
    running.repository = older
    try:
        yield running.start()
    finally:
        running.repository = REPOSITORY
        running.stop()


@pytest.mark.nightly
def test_a_newer_panel_adopts_the_engine_of_the_older_one_and_goes_on(panel: Panel, older: Path) -> None:
    installed = panel.manage("install", "starter", "--wait")
    assert installed.returncode == 0, installed.stderr
    assert panel.finished(panel.switch(GEMMA, reason="before"))["state"] == "succeeded"
    (engine,) = panel.engines()
    (deployment,) = panel.live()
    arguments = command_line(engine.pid)
    health = f"http://127.0.0.1:{arguments[arguments.index('--port') + 1]}/health"
    applied = panel.manage("showmigrations", "--plan").stdout.count("[X]")
    assert panel.interrupt() == 0

    panel.repository = REPOSITORY
    panel.start()  # brings the database up to date first
    assert panel.manage("showmigrations", "--plan").stdout.count("[X]") > applied
    (still,) = panel.engines()
    assert (still.pid, still.ticks) == (engine.pid, engine.ticks)  # never restarted
    assert ask(health).status == 200
    (adopted,) = panel.live()
    assert (adopted["id"], adopted["status"]) == (deployment["id"], "ready")
    question = {"model": "gemma-3-270m", "prompt": "The capital of France is", "max_tokens": 4}
    wait_for("the gateway sends to it", lambda: panel.gateway("/completions", question).status == 200)
    jobs = panel.get("/jobs?kind=switch")["items"]
    assert [job["reason"] for job in jobs] == ["before"]
    assert panel.manage("audit", "verify").returncode == 0

    # And it is the newer panel's now: changed, switched, stopped.
    changed = panel.api(f"/profiles/{GEMMA}", {"options": {"context_tokens": 1024}}, method="PATCH")
    assert changed.status == 200, changed.text
    assert panel.finished(panel.switch(GEMMA))["state"] == "succeeded"
    (newer,) = panel.engines()
    assert newer.pid != engine.pid
