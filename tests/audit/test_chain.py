from __future__ import annotations

import pytest
from django.db import DatabaseError, transaction

from apps.audit.models import AuditEntry
from apps.audit.services import record, verify_chain
from apps.common.actors import PANEL


@pytest.mark.django_db
def test_every_entry_follows_the_one_before_and_the_chain_is_whole() -> None:
    first = record(PANEL, "rig.seen", "rig", 1, "bench-01")
    second = record(PANEL, "rig.seen", "rig", 1, "bench-01", {"cards": 4})
    assert second.previous_hash == first.hash
    report = verify_chain()
    assert report.whole
    assert report.entries == 2


@pytest.mark.django_db
def test_the_database_refuses_to_change_or_delete_an_entry() -> None:
    entry = record(PANEL, "rig.seen", "rig", 1, "bench-01")
    with pytest.raises(DatabaseError, match="append-only"), transaction.atomic():
        AuditEntry.objects.filter(pk=entry.pk).update(actor_name="mallory")
    with pytest.raises(DatabaseError, match="append-only"), transaction.atomic():
        AuditEntry.objects.filter(pk=entry.pk).delete()
