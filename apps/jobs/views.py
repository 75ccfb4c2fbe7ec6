"""The job history and a job's page."""

from __future__ import annotations

from typing import Any

from django.http import HttpRequest, HttpResponse, HttpResponseBase
from django.shortcuts import redirect, render
from django.views.decorators.http import require_POST, require_safe

from apps.common.access import role_required
from apps.common.actors import actor_of
from apps.common.errors import NotFound
from apps.common.paging import IdPaginator
from apps.common.roles import Role
from apps.jobs.access import cancel_allowed
from apps.jobs.export import jobs_export
from apps.jobs.filters import TEXT_SEARCH_JOBS, JobFilter, older_than_text_search
from apps.jobs.partials import PARTS, job_context, job_part
from apps.jobs.selectors import job_get, job_list, job_log_after
from apps.jobs.services import job_cancel
from apps.jobs.tables import JobTable

PER_PAGE = 25


@role_required(Role.VIEWER)
@require_safe
def jobs(request: HttpRequest) -> HttpResponse:
    found = JobFilter(request.GET or None, queryset=job_list())
    oldest_first = request.GET.get("sort") == "id"
    rows = found.qs.order_by("created_at", "pk") if oldest_first else found.qs
    page: Any = IdPaginator(rows, PER_PAGE).get_page(request.GET.get("page"))
    table = JobTable(page.object_list, order_by="id" if oldest_first else "-id")
    page.object_list = table.rows  # django-tables2 would slice the query itself, and walk every row before the page
    table.page, table.paginator = page, page.paginator
    filters = request.GET.copy()
    for name in ("page", "sort"):
        filters.pop(name, None)
    context = {"table": table, "filter": found, "filters": filters.urlencode(), "is_filtered": any(filters.values())}
    if filters.get("q") and older_than_text_search().exists():
        context["searched"] = TEXT_SEARCH_JOBS
    return render(request, "jobs/list.html", context)


@role_required(Role.VIEWER)
@require_safe
def job(request: HttpRequest, pk: int) -> HttpResponse:
    shown = job_get(pk)
    return render(request, "jobs/detail.html", job_context(shown, request.user))


@role_required(Role.VIEWER)
@require_safe
def part(request: HttpRequest, pk: int, name: str) -> HttpResponse:
    """One part of the job's page, for htmx."""
    if name not in PARTS:
        raise NotFound(f"A job's page has no part {name!r}.")
    return HttpResponse(job_part(name, job_get(pk), request.user, request))


@role_required(Role.VIEWER)
@require_safe
def log(request: HttpRequest, pk: int) -> HttpResponse:
    """The whole log as text; the page shows only its end."""
    shown = job_get(pk)
    lines: list[str] = []
    after = 0
    while more := job_log_after(shown, after):
        lines += [f"{line.at:%Y-%m-%dT%H:%M:%S.%fZ} {line.source:<6} {line.text}\n" for line in more]
        after = more[-1].pk
    return HttpResponse("".join(lines), content_type="text/plain; charset=utf-8")


@role_required(Role.MEMBER)
@require_POST
def cancel(request: HttpRequest, pk: int) -> HttpResponse:
    target = job_get(pk)
    cancel_allowed(request.user, target)
    target = job_cancel(target, actor=actor_of(request.user))
    if getattr(request, "htmx", False):
        return HttpResponse(job_part("head", target, request.user, request))
    return redirect("jobs:detail", pk=target.pk)


@role_required(Role.VIEWER)
@require_safe
def export(request: HttpRequest) -> HttpResponseBase:
    filters = {k: v for k, v in request.GET.items() if k in ("kind", "state", "user", "since", "q")}
    return jobs_export(request, filters, request.GET.get("format", "csv"))
