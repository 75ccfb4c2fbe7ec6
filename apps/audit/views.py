"""The audit page: who changed what, and whether the record is whole."""

from __future__ import annotations

from django.core.paginator import Paginator
from django.http import HttpRequest, HttpResponse, HttpResponseBase
from django.shortcuts import render
from django.views.decorators.http import require_safe

from apps.audit.export import audit_export
from apps.audit.selectors import audit_actions, audit_list
from apps.audit.services import verify_chain
from apps.common.access import role_required
from apps.common.roles import Role

PER_PAGE = 50


@role_required(Role.OWNER)
@require_safe
def audit(request: HttpRequest) -> HttpResponse:
    return _audit(request)


@role_required(Role.OWNER)
@require_safe
def verify(request: HttpRequest) -> HttpResponse:
    """Walks the whole chain: changes nothing, so a plain link does."""
    return _audit(request, check=True)


@role_required(Role.OWNER)
@require_safe
def export(request: HttpRequest) -> HttpResponseBase:
    return audit_export(
        request,
        actor=request.GET.get("actor", "").strip(),
        action=request.GET.get("action", "").strip(),
        form=request.GET.get("format", "jsonl"),
    )


def _audit(request: HttpRequest, *, check: bool = False) -> HttpResponse:
    actor, action = request.GET.get("actor", "").strip(), request.GET.get("action", "").strip()
    page = Paginator(audit_list(actor=actor, action=action), PER_PAGE).get_page(request.GET.get("page"))
    filters = request.GET.copy()
    filters.pop("page", None)
    context = {
        "page": page,
        "actor": actor,
        "action": action,
        "actions": audit_actions(),
        "filters": filters.urlencode(),
        "report": verify_chain() if check else None,
    }
    return render(request, "audit/list.html", context)
