"""The same panel on PostgreSQL and Redis, when CI gives their addresses."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator

import psycopg
import pytest
from psycopg import sql

from tests import backups
from tests.panel import Panel, wait_for

DATABASE_URL = os.environ.get("RIGPANEL_TEST_DATABASE_URL", "")
REDIS_URL = os.environ.get("RIGPANEL_TEST_REDIS_URL", "")
pytestmark = [
    pytest.mark.external,
    pytest.mark.skipif(not (DATABASE_URL and REDIS_URL), reason="no PostgreSQL and Redis were given"),
]
OWNER = {"RIGPANEL_ADMIN_EMAIL": "alice@lab.example", "RIGPANEL_ADMIN_PASSWORD": "correct horse battery"}


@pytest.fixture
def external() -> Iterator[Panel]:
    """A panel with a database of its own on the given server."""
    name = f"rp_{secrets.token_hex(4)}"
    with psycopg.connect(DATABASE_URL, autocommit=True) as server:
        server.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        with Panel(owner=False) as panel:
            panel.environment["RIGPANEL_DATABASE_URL"] = f"{DATABASE_URL.rpartition('/')[0]}/{name}"
            panel.environment["RIGPANEL_REDIS_URL"] = f"{REDIS_URL}/9"
            yield panel
        server.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def test_a_panel_on_postgresql_and_redis_comes_up_and_goes_down(external: Panel) -> None:
    external.start()
    report = json.loads(external.manage("status", "--json").stdout)
    assert "store" not in report["processes"]  # nothing embedded runs
    assert not (external.data / "rigpanel.sqlite3").exists()
    assert external.interrupt() == 0
    wait_for("the end", lambda: not any(external.pid(name) for name in ("supervisor", "web", "control")))
    assert "Traceback" not in external.logs()


def test_a_backup_of_sqlite_is_restored_into_postgresql_and_back(panel: Panel, external: Panel) -> None:
    assert panel.manage("up", "--prepare-only", **OWNER).returncode == 0
    assert panel.manage("createkey", "alice@lab.example", "--name", "laptop").returncode == 0
    first, second = panel.directory / "first.tar.gz", panel.directory / "second.tar.gz"
    assert panel.manage("backup", str(first)).returncode == 0
    answer = external.manage("restore", str(first))
    assert answer.returncode == 0, answer.stderr
    assert external.manage("audit", "verify").returncode == 0
    # Rows made from now on get numbers after the restored ones.
    answer = external.manage("createkey", "alice@lab.example", "--name", "desktop")
    assert answer.returncode == 0, answer.stderr
    assert external.manage("backup", str(second)).returncode == 0
    assert external.manage("restore", str(first)).returncode == 1
    answer = panel.manage("restore", str(second), "--force")
    assert answer.returncode == 0, answer.stderr
    assert panel.manage("audit", "verify").returncode == 0
    answer = external.manage("restore", str(second), "--force")
    assert answer.returncode == 0, answer.stderr
    assert external.manage("audit", "verify").returncode == 0


def test_a_file_that_cannot_be_used_leaves_postgresql_as_it_was_also_with_force(external: Panel) -> None:
    file, bad = external.directory / "panel.tar.gz", external.directory / "bad.tar.gz"
    assert external.manage("up", "--prepare-only", **OWNER).returncode == 0
    assert external.manage("backup", str(file)).returncode == 0
    assert external.manage("createkey", "alice@lab.example", "--name", "later").returncode == 0
    before = rows(external)
    for damage in (backups.an_entry_twice, backups.without_the_last_row):
        damage(file, bad)
        answer = external.manage("restore", str(bad), "--force")
        assert answer.returncode == 1
        assert backups.DAMAGES[damage] in answer.stderr.lower()
        assert rows(external) == before


def rows(panel: Panel) -> dict[str, list[tuple[object, ...]]]:
    """Every table of the panel."""
    with psycopg.connect(panel.environment["RIGPANEL_DATABASE_URL"]) as connection:
        tables = [r[0] for r in connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")]
        return {t: connection.execute(f'SELECT * FROM "{t}" ORDER BY 1').fetchall() for t in tables}
