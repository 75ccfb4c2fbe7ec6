"""A backup brings back the panel as it was, its history unbroken and its keys valid."""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import backups
from tests.panel import Panel

pytestmark = pytest.mark.processes
OWNER = {"RIGPANEL_ADMIN_EMAIL": "alice@lab.example", "RIGPANEL_ADMIN_PASSWORD": "correct horse battery"}


@pytest.fixture
def other() -> Iterator[Panel]:
    """Another one, of nobody."""
    with Panel(owner=False) as made:
        yield made


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="rp-b-", dir="/tmp"))
    yield made
    shutil.rmtree(made)


def rows(panel: Panel) -> dict[str, list[tuple[object, ...]]]:
    """Every table of the panel, but for what a migration makes anew."""
    connection = sqlite3.connect(panel.data / "rigpanel.sqlite3")
    tables = [r[0] for r in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY 1")]
    left_out = ("sqlite_sequence", "django_migrations", "django_content_type", "auth_permission")
    found = {t: connection.execute(f"SELECT * FROM {t} ORDER BY 1").fetchall() for t in tables if t not in left_out}
    connection.close()
    return found


def test_a_restored_panel_equals_the_one_that_was_backed_up(panel: Panel, other: Panel, folder: Path) -> None:
    assert panel.manage("up", "--prepare-only", **OWNER).returncode == 0
    key = panel.manage("createkey", "alice@lab.example", "--name", "laptop")
    assert key.returncode == 0, key.stderr
    file = folder / "panel.tar.gz"
    assert panel.manage("backup", str(file)).returncode == 0
    assert file.stat().st_mode & 0o077 == 0
    assert other.manage("up", "--prepare-only").returncode == 0  # nobody has an account there: no --force is asked
    answer = other.manage("restore", str(file))
    assert answer.returncode == 0, answer.stderr
    assert rows(other) == rows(panel)
    assert other.manage("audit", "verify").returncode == 0
    for name in ("secret_key", "api_key_pepper"):  # else every key and session would be worthless
        assert (other.data / "secrets" / name).read_text() == (panel.data / "secrets" / name).read_text()


def test_a_panel_in_use_is_replaced_only_with_force_and_its_old_database_is_kept(panel: Panel, folder: Path) -> None:
    file = folder / "panel.tar.gz"
    assert panel.manage("up", "--prepare-only", **OWNER).returncode == 0
    assert panel.manage("backup", str(file)).returncode == 0
    before = rows(panel)
    assert panel.manage("createkey", "alice@lab.example", "--name", "later").returncode == 0
    refused = panel.manage("restore", str(file))
    assert refused.returncode == 1
    assert "--force" in refused.stderr
    draft = panel.data / "rigpanel.sqlite3.restoring"
    draft.write_bytes(b"of a restore that was killed")
    forced = panel.manage("restore", str(file), "--force")
    assert forced.returncode == 0, forced.stderr
    assert rows(panel) == before
    assert not draft.exists()
    assert len(list(panel.data.glob("rigpanel.sqlite3.before-restore-*"))) == 1


def test_what_is_no_backup_or_of_another_schema_changes_nothing(panel: Panel, other: Panel, folder: Path) -> None:
    text = folder / "notes.txt"
    text.write_text("hello")
    answer = panel.manage("restore", str(text))
    assert answer.returncode == 1
    assert "not a backup" in answer.stderr
    assert panel.manage("up", "--prepare-only", **OWNER).returncode == 0
    file, older = folder / "panel.tar.gz", folder / "older.tar.gz"
    assert panel.manage("backup", str(file)).returncode == 0
    backups.rewrite(file, older, backups.of_another_schema)
    answer = other.manage("restore", str(older))
    assert answer.returncode == 1
    assert "another schema" in answer.stderr
    assert not (other.data / "rigpanel.sqlite3").exists()  # seen before anything is made


def test_a_file_that_cannot_be_used_leaves_a_panel_in_use_as_it_was_also_with_force(panel: Panel, folder: Path) -> None:
    file, bad = folder / "panel.tar.gz", folder / "bad.tar.gz"
    assert panel.manage("up", "--prepare-only", **OWNER).returncode == 0
    assert panel.manage("backup", str(file)).returncode == 0
    assert panel.manage("createkey", "alice@lab.example", "--name", "later").returncode == 0
    before, names = rows(panel), sorted(path.name for path in panel.data.iterdir())
    secret = (panel.data / "secrets" / "secret_key").read_text()
    for damage, words in backups.DAMAGES.items():
        damage(file, bad)
        answer = panel.manage("restore", str(bad), "--force")
        assert answer.returncode == 1, damage.__name__
        assert answer.stderr.startswith("rigpanel: nothing was restored: "), answer.stderr
        assert words in answer.stderr.lower()
        assert answer.stderr.count("\n") == 1, answer.stderr
        assert rows(panel) == before, damage.__name__
        assert sorted(path.name for path in panel.data.iterdir()) == names  # and nothing lies about
    assert (panel.data / "secrets" / "secret_key").read_text() == secret
