"""The record of every change, each entry sealed to the one before it by a hash."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from django.db import models

GENESIS = "0" * 64


class AuditEntry(models.Model):
    """Stores the actor's id and name instead of a foreign key: it still reads when both are gone.

    Append-only by database triggers. ``hash`` is SHA-256 over the previous hash and this entry's
    canonical JSON.
    """

    sequence = models.BigIntegerField(unique=True)
    at = models.DateTimeField(db_index=True)
    actor_id = models.CharField(max_length=64, blank=True)
    actor_name = models.CharField(max_length=200)
    action = models.CharField(max_length=64, db_index=True)
    object_type = models.CharField(max_length=64)
    object_id = models.CharField(max_length=64, blank=True)
    object_name = models.CharField(max_length=200, blank=True)
    detail = models.JSONField(default=dict)
    previous_hash = models.CharField(max_length=64)
    hash = models.CharField(max_length=64)

    class Meta:
        ordering = ["-sequence"]

    def __str__(self) -> str:
        return f"{self.sequence} {self.actor_name} {self.action} {self.object_name}"

    def content(self) -> dict[str, Any]:
        return {
            "sequence": self.sequence,
            "at": self.at.isoformat(timespec="microseconds"),
            "actor_id": self.actor_id,
            "actor_name": self.actor_name,
            "action": self.action,
            "object_type": self.object_type,
            "object_id": self.object_id,
            "object_name": self.object_name,
            "detail": self.detail,
        }

    def computed_hash(self) -> str:
        canonical = json.dumps(self.content(), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(f"{self.previous_hash}\n{canonical}".encode()).hexdigest()


class AuditHead(models.Model):
    """The end of the chain: one row, locked while an entry is added. Shows a cut-off tail."""

    sequence = models.BigIntegerField(default=0)
    hash = models.CharField(max_length=64, default=GENESIS)

    def __str__(self) -> str:
        return f"head {self.sequence}"
