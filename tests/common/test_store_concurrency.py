"""Four processes write at once and nothing is lost, on SQLite as on PostgreSQL."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings
from django.db import connection

ROOT = Path(__file__).resolve().parent.parent.parent
PROCESSES = 4
WRITES_EACH = 50
# Each write reads before it writes: with SQLite's deferred transactions just that loses writes, because
# two readers cannot both become the writer. It also goes through the audit chain, which has one end.
WRITER = """
import sys
import django
django.setup()
from django.db import connections, transaction
connections["default"].settings_dict["NAME"] = sys.argv[1]
from apps.audit.services import record
from apps.common.actors import PANEL
from apps.common.models import Epoch
print("ready", flush=True)
sys.stdin.readline()
for number in range(int(sys.argv[3])):
    with transaction.atomic():
        Epoch.objects.count()
        Epoch.bump("race")
        record(PANEL, "test.write", "test", f"{sys.argv[2]}.{number}", "a write")
"""


@pytest.mark.django_db(transaction=True)
def test_four_processes_write_at_once_and_nothing_is_lost() -> None:
    from apps.audit.models import AuditEntry
    from apps.audit.services import verify_chain
    from apps.common.models import Epoch

    database = str(connection.settings_dict["NAME"])
    environment = dict(os.environ) | {
        "DJANGO_SETTINGS_MODULE": "rigpanel.settings",
        "RIGPANEL_DATA_DIR": str(settings.DATA_DIR),
    }
    argv = [sys.executable, "-c", WRITER, database]
    pipes: dict[str, Any] = {
        "stdin": subprocess.PIPE,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
    }
    writers = [
        subprocess.Popen([*argv, str(number), str(WRITES_EACH)], cwd=ROOT, env=environment, **pipes)
        for number in range(PROCESSES)
    ]
    try:
        for writer in writers:  # all are ready before any begins
            assert writer.stdout.readline() == "ready\n", writer.stderr.read()
        for writer in writers:
            writer.stdin.write("go\n")
            writer.stdin.flush()
        for writer in writers:
            _, errors = writer.communicate(timeout=120)
            assert writer.returncode == 0, errors
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
    assert Epoch.current("race") == PROCESSES * WRITES_EACH
    assert AuditEntry.objects.filter(action="test.write").count() == PROCESSES * WRITES_EACH
    assert verify_chain().whole
