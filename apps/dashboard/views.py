"""The home page, the settings page and the theme."""

from __future__ import annotations

from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_GET, require_POST

from apps.common.access import public, role_required
from apps.common.htmx import safe_next
from apps.common.roles import Role
from apps.dashboard.cards import rig_alerts, rig_panel
from apps.dashboard.context import THEME_COOKIE, THEMES
from apps.dashboard.in_force import settings_in_force, versions
from apps.dashboard.panels import jobs_panel, policies_panel, serving_panel, starter_panel, switch_panel
from apps.deployments.selectors import live_deployments
from apps.rigs.selectors import rig_default

YEAR_SECONDS = 365 * 24 * 3600


@require_GET
@role_required(Role.VIEWER)
def home(request: HttpRequest) -> HttpResponse:
    rig = rig_default()
    live = live_deployments(rig)
    context = {
        "serving": serving_panel(rig, request.user, live),
        "starter": starter_panel(rig, request.user),
        "policies": policies_panel(rig, request.user),
        "alerts": rig_alerts(rig),
        "cards": rig_panel(rig, live),
        "switch": switch_panel(rig, request.user, live),
        "jobs": jobs_panel(rig),
    }
    return render(request, "dashboard/home.html", context)


@require_GET
@role_required(Role.OWNER)
def settings_page(request: HttpRequest) -> HttpResponse:
    return render(request, "dashboard/settings.html", {"groups": settings_in_force(), "versions": versions()})


@require_POST
@public
def theme(request: HttpRequest) -> HttpResponse:
    """The theme without JavaScript: a cookie, and back to where one was."""
    response = redirect(safe_next(request))
    value = request.POST.get("theme", "")
    if value in THEMES:
        response.set_cookie(THEME_COOKIE, value, max_age=YEAR_SECONDS, samesite="Lax", secure=request.is_secure())
    return response
