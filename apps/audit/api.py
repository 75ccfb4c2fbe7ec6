"""The audit chain in the API; owners only."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponseBase
from ninja import Router, Schema
from ninja.pagination import paginate

from apps.audit.export import audit_export
from apps.audit.models import AuditEntry
from apps.audit.selectors import audit_list
from apps.audit.services import ChainReport, verify_chain
from apps.common.api import Paged, needs
from apps.common.roles import Role

router = Router(tags=["audit"])


class AuditEntryOut(Schema):
    sequence: int
    at: datetime
    actor_id: str
    actor_name: str
    action: str
    object_type: str
    object_id: str
    object_name: str
    detail: dict[str, Any]
    previous_hash: str
    hash: str


class ChainOut(Schema):
    """``broken_at`` is the sequence number of the first entry that does not fit."""

    whole: bool
    entries: int
    broken_at: int | None
    problem: str


@router.get("/audit", response=list[AuditEntryOut], auth=needs(Role.OWNER), summary="Every change, newest first")
@paginate(Paged)
def list_audit(request: HttpRequest, actor: str = "", action: str = "") -> QuerySet[AuditEntry]:
    return audit_list(actor=actor, action=action)


@router.get("/audit/verify", response=ChainOut, auth=needs(Role.OWNER), summary="Check the whole chain")
def get_chain(request: HttpRequest) -> ChainReport:
    return verify_chain()


@router.get("/audit/export", auth=needs(Role.OWNER), summary="The chain as CSV or JSON lines")
def export_audit(request: HttpRequest, actor: str = "", action: str = "", format: str = "jsonl") -> HttpResponseBase:
    return audit_export(request, actor=actor, action=action, form=format)
