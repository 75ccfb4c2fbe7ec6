"""The pages of verification runs."""

from __future__ import annotations

from django.core.paginator import Paginator
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.urls import reverse
from django.views.decorators.http import require_POST, require_safe

from apps.common.access import role_required
from apps.common.actors import actor_of
from apps.common.htmx import redirect_either, render_either
from apps.common.roles import Role
from apps.rigs.selectors import rig_default
from apps.verification import services
from apps.verification.checks import SUITES
from apps.verification.models import VerificationRun
from apps.verification.partials import run_context
from apps.verification.selectors import accepted_run, outcome, run_get, run_list

PER_PAGE = 25


@role_required(Role.VIEWER)
@require_safe
def run_list_page(request: HttpRequest) -> HttpResponse:
    rig = rig_default()
    page = Paginator(run_list(rig), PER_PAGE).get_page(request.GET.get("page"))
    rows = [(run, *outcome(list(run.results.all()))) for run in page]
    context = {
        "page": page,
        "rows": rows,
        "rig": rig,
        "suites": list(SUITES),
        "accepted": accepted_run(rig, rig.hardware_source),
    }
    return render(request, "verification/list.html", context)


@role_required(Role.VIEWER)
@require_safe
def run_detail(request: HttpRequest, pk: int) -> HttpResponse:
    run = run_get(pk)
    return render_either(request, "verification/detail.html", "verification/partials/results.html", run_context(run))


@role_required(Role.OPERATOR)
@require_POST
def start(request: HttpRequest) -> HttpResponse:
    job = services.verify_request(
        suite=request.POST.get("suite", "quick"),
        rig=rig_default(),
        actor=actor_of(request.user),
        reason=request.POST.get("reason", ""),
    )
    run = VerificationRun.objects.get(job=job)
    return redirect_either(request, reverse("verification:detail", args=[run.pk]))


@role_required(Role.OPERATOR)
@require_POST
def accept(request: HttpRequest, pk: int) -> HttpResponse:
    run = services.run_accept(run_get(pk), actor=actor_of(request.user))
    return redirect("verification:detail", pk=run.pk)
