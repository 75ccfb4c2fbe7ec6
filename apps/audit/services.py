"""Adding to the audit chain and checking it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from django.db import transaction
from django.utils import timezone

from apps.audit.models import GENESIS, AuditEntry, AuditHead
from apps.common.actors import Actor

HEAD = 1


def record(
    actor: Actor,
    action: str,
    object_type: str,
    object_id: str | int = "",
    object_name: str = "",
    detail: Mapping[str, Any] | None = None,
) -> AuditEntry:
    """Add an entry inside the caller's transaction, so that change and record stand or fall together.

    ``action`` is ``noun.verb`` ("job.create"). Never put a secret into ``detail``.
    """
    with transaction.atomic():
        AuditHead.objects.get_or_create(pk=HEAD)
        head = AuditHead.objects.select_for_update(no_key=True).get(pk=HEAD)
        entry = AuditEntry(
            sequence=head.sequence + 1,
            at=timezone.now(),
            actor_id=actor.id,
            actor_name=actor.name[:200],
            action=action,
            object_type=object_type,
            object_id=str(object_id),
            object_name=object_name[:200],
            detail=dict(detail or {}),
            previous_hash=head.hash,
        )
        entry.hash = entry.computed_hash()
        entry.save(force_insert=True)
        AuditHead.objects.filter(pk=HEAD).update(sequence=entry.sequence, hash=entry.hash)
    return entry


@dataclass(frozen=True, slots=True)
class ChainReport:
    """``broken_at`` is the sequence number of the first entry that does not fit, or None."""

    entries: int
    broken_at: int | None = None
    problem: str = ""

    @property
    def whole(self) -> bool:
        return self.broken_at is None


def verify_chain() -> ChainReport:
    """Walk the whole chain; reads in batches, so memory stays flat."""
    previous, expected, count = GENESIS, 1, 0
    for entry in AuditEntry.objects.order_by("sequence").iterator(chunk_size=500):
        if entry.sequence != expected:
            return ChainReport(count, expected, f"Entry {expected} is missing.")
        if entry.previous_hash != previous:
            return ChainReport(count, entry.sequence, f"Entry {entry.sequence} does not follow the one before it.")
        if entry.hash != entry.computed_hash():
            return ChainReport(count, entry.sequence, f"Entry {entry.sequence} was changed after it was written.")
        previous, expected, count = entry.hash, expected + 1, count + 1
    head = AuditHead.objects.filter(pk=HEAD).first()
    if head and (head.sequence != count or (count and head.hash != previous)):
        return ChainReport(count, count + 1, f"The chain ends at {count}, but {head.sequence} entries were written.")
    return ChainReport(count)
