"""The same panel on PostgreSQL and Redis, when CI gives their addresses."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator

import psycopg
import pytest
from psycopg import sql

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
