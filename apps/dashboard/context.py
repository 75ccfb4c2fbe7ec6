"""What every page's frame shows: the rig, the person, and what is under way."""

from __future__ import annotations

from typing import Any

from django.http import HttpRequest

from apps.common.roles import Role
from apps.deployments.selectors import empty_because
from apps.jobs.models import LIVE_STATES, Job
from apps.rigs.selectors import rig_default

THEMES = ("auto", "light", "dark")
THEME_COOKIE = "rigpanel_theme"
NAVIGATION = (
    ("/", "Rig"),
    ("/models/", "Models"),
    ("/profiles/", "Profiles"),
    ("/deployments/", "Deployments"),
    ("/policies/", "Policies"),
    ("/jobs/", "Jobs"),
    ("/verify/", "Verify"),
    ("/telemetry/", "Telemetry"),
    ("/team/", "Team"),
    ("/me/", "Me"),
)


def shell(request: HttpRequest) -> dict[str, Any]:
    """For ``base.html``. Strangers see whether the rig is simulated and nothing else of it."""
    rig = rig_default()
    theme = request.COOKIES.get(THEME_COOKIE, "")
    context: dict[str, Any] = {
        "shell_theme": theme if theme in THEMES[1:] else "",
        "shell_themes": THEMES,
        "shell_simulated": rig.is_simulated,
    }
    user = getattr(request, "user", None)
    if user is None or not user.is_authenticated:
        return context
    entries = NAVIGATION + ((("/settings/", "Settings"),) if user.has_role(Role.OWNER) else ())
    here = "/" + request.path.strip("/").partition("/")[0]
    here = here if here == "/" else f"{here}/"
    return context | {
        "shell_person": user,
        "shell_rig": rig,
        "shell_nav": [{"href": href, "label": label, "current": href == here} for href, label in entries],
        "shell_live_jobs": live_job_count(),
        "shell_empty": empty_because(rig),
    }


def live_job_count() -> int:
    return Job.objects.filter(state__in=LIVE_STATES).count()
