"""The engines of this rig: what is installed, and the button that installs the smallest."""

from __future__ import annotations

from typing import Any

from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.urls import reverse
from django.views.decorators.http import require_POST, require_safe

from apps.common.access import role_required
from apps.common.actors import actor_of
from apps.common.htmx import begun, redirect_either
from apps.common.roles import Role
from apps.installs import services, starter
from apps.installs.packaged import recipe_here
from apps.installs.recipes import OFFERS, NotOffered
from apps.installs.selectors import install_get, install_list
from apps.jobs.models import LIVE_STATES, Job
from apps.rigs.selectors import rig_default


@role_required(Role.VIEWER)
@require_safe
def install_list_page(request: HttpRequest) -> HttpResponse:
    rig = rig_default()
    installs = list(install_list(rig.slug))
    jobs = Job.objects.filter(kind__in=("install", "uninstall"), rig_name=rig.slug)
    context = {
        "installs": installs,
        "rig": rig,
        "has_starter": any(i.name == starter.NAME and i.state == "ready" for i in installs),
        "offers": offers(),
        "starter_version": starter.pinned_version(),
        "under_way": list(jobs.filter(state__in=LIVE_STATES)),
        "last": jobs.filter(kind="install").exclude(state__in=LIVE_STATES).order_by("-pk").first(),
    }
    return render(request, "installs/list.html", context)


def offers() -> list[dict[str, Any]]:
    """What can be installed on this machine beside the starter, with the room that it takes; or why it cannot."""
    found: list[dict[str, Any]] = []
    for name in ("vllm", "llama-server"):
        try:
            wanted = recipe_here(name, "")
        except NotOffered as no:
            found.append({"name": name, "title": OFFERS[name], "why_not": str(no)})
        else:
            found.append({"name": name, "recipe": wanted, "title": wanted.title, "pinned": wanted.lock is not None})
    return found


@role_required(Role.OPERATOR)
@require_POST
def install(request: HttpRequest) -> HttpResponse:
    job = services.install_request(
        name=request.POST.get("name", starter.NAME),
        version=request.POST.get("version", ""),
        actor=actor_of(request.user),
        rig=rig_default(),
        reason=request.POST.get("reason", ""),
    )
    return begun(request, reverse("jobs:detail", args=[job.pk]))


@role_required(Role.OPERATOR)
@require_POST
def remove(request: HttpRequest, pk: int) -> HttpResponse:
    job = services.install_remove(install_get(pk), actor=actor_of(request.user))
    return redirect_either(request, reverse("jobs:detail", args=[job.pk]))
