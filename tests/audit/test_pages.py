from __future__ import annotations

import csv
import io
import json

import pytest
from django.core.management import CommandError, call_command
from django.db import connection
from django.test import Client

from apps.accounts.models import User
from apps.audit.models import AuditEntry
from apps.audit.services import record
from apps.common.actors import PANEL, Actor, actor_of


def client_of(user: User) -> Client:
    client = Client()
    client.force_login(user)
    return client


def tamper(sequence: int) -> None:
    """What somebody with the database file could do: take the trigger away first."""
    with connection.cursor() as cursor:
        names = "SELECT name FROM sqlite_master WHERE type = 'trigger' AND tbl_name = 'audit_auditentry'"
        if connection.vendor == "sqlite":
            cursor.execute(names)
            for (name,) in cursor.fetchall():
                cursor.execute(f"DROP TRIGGER {name}")
        else:
            cursor.execute("ALTER TABLE audit_auditentry DISABLE TRIGGER USER")
        cursor.execute("UPDATE audit_auditentry SET actor_name = 'mallory' WHERE sequence = %s", [sequence])


def test_owners_read_filter_and_page_the_record(alice: User, bob: User) -> None:
    for number in range(60):
        record(actor_of(bob), "job.switch", "job", number, f"Switch {number}")
    record(PANEL, "rig.seen", "rig", 1, "bench-01")
    client = client_of(alice)
    page = client.get("/audit/").content.decode()
    assert "rig.seen" in page
    assert "Page 1 of 2" in page
    only = client.get("/audit/?action=rig.seen").content.decode()
    assert "Switch 59" not in only
    assert "Switch 59" in client.get("/audit/?actor=bo").content.decode()
    assert client_of(bob).get("/audit/").status_code == 403


def test_the_chain_is_checked_on_the_page_in_the_api_and_by_command(
    alice: User, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(3):
        record(PANEL, "rig.seen", "rig", 1, "bench-01")
    client = client_of(alice)
    assert "The chain is whole: 3 entries" in client.get("/audit/verify").content.decode()
    assert client.get("/api/v1/audit/verify").json() == {"whole": True, "entries": 3, "broken_at": None, "problem": ""}
    call_command("audit", "verify")
    assert "whole: 3 entries" in capsys.readouterr().out
    tamper(2)
    assert "Entry 2 was changed" in client.get("/audit/verify").content.decode()
    assert client.get("/api/v1/audit/verify").json()["broken_at"] == 2
    with pytest.raises(CommandError, match="Entry 2 was changed"):
        call_command("audit", "verify")


def test_the_export_holds_what_the_hashes_were_made_of(alice: User) -> None:
    record(PANEL, "rig.seen", "rig", 1, "bench-01", {"cards": 4})
    answer = client_of(alice).get("/audit/export?format=jsonl")
    line = json.loads(b"".join(answer.streaming_content).splitlines()[0])  # type: ignore[attr-defined]
    entry = AuditEntry.objects.get(sequence=line["sequence"])
    assert line["hash"] == entry.hash
    assert line["detail"] == {"cards": 4}


def test_a_name_like_a_formula_is_text_in_the_csv(alice: User) -> None:
    record(Actor("", '=HYPERLINK("http://evil.example")'), "rig.seen", "rig", 1, "bench-01")
    answer = client_of(alice).get("/audit/export?format=csv")
    rows = list(csv.DictReader(io.StringIO(b"".join(answer.streaming_content).decode())))  # type: ignore[attr-defined]
    assert rows[0]["actor_name"].startswith("'=")


def test_an_unknown_format_is_refused(alice: User) -> None:
    assert client_of(alice).get("/audit/export?format=xml").status_code == 422
