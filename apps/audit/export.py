"""The chain as CSV or JSON lines. The lines hold all that the hashes were made of, so anybody can check them."""

from __future__ import annotations

from typing import Any

from django.http import HttpRequest, HttpResponseBase

from apps.audit.models import AuditEntry
from apps.audit.selectors import audit_list
from apps.common.export import export

COLUMNS = (
    "sequence", "at", "actor_id", "actor_name", "action", "object_type", "object_id", "object_name",
    "detail", "previous_hash", "hash",
)  # fmt: skip


def audit_row(entry: AuditEntry) -> dict[str, Any]:
    return {**entry.content(), "previous_hash": entry.previous_hash, "hash": entry.hash}


def audit_export(request: HttpRequest, *, actor: str, action: str, form: str) -> HttpResponseBase:
    return export(request, audit_list(actor=actor, action=action), COLUMNS, audit_row, form, "audit", key="sequence")
