"""Reads of the audit chain."""

from __future__ import annotations

from django.db.models import QuerySet

from apps.audit.models import AuditEntry


def audit_list(*, actor: str = "", action: str = "") -> QuerySet[AuditEntry]:
    """Newest first. ``actor`` is the beginning of a name or a public id, ``action`` the beginning of an
    action ("job", "job.switch")."""
    entries = AuditEntry.objects.order_by("-sequence")
    if actor:
        entries = entries.filter(actor_id=actor) if len(actor) == 36 else entries.filter(actor_name__istartswith=actor)
    if action:
        entries = entries.filter(action__startswith=action)
    return entries


def audit_actions() -> list[str]:
    """Every action that the chain knows, for the filter."""
    return list(AuditEntry.objects.order_by("action").values_list("action", flat=True).distinct())
