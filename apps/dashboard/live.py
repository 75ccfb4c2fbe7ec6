"""The regions of pages that change live: a name, who may see it, what it follows and how it is drawn.

A page names its regions in block ``watch`` of its template (``home``, ``job:17``). The page's view and
the socket draw a region with the same function, so they cannot differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from django.template.loader import render_to_string

from apps.catalog.weights.views import download_panel
from apps.common.errors import ApplicationError
from apps.common.roles import Role
from apps.dashboard.cards import rig_alerts, rig_panel
from apps.dashboard.context import live_job_count
from apps.dashboard.panels import jobs_panel, policies_panel, serving_panel, starter_panel, switch_panel
from apps.deployments.selectors import deployment_get, empty_because, live_deployments
from apps.jobs.partials import job_changed
from apps.jobs.selectors import job_get
from apps.rigs.selectors import rig_default

Ids = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Region:
    """``topics`` are those of ``page_changed``. ``draw`` gets the user, the argument after the colon and
    the ids of the message (empty for a first drawing); it answers HTML whose roots have ids."""

    role: Role
    topics: frozenset[str]
    draw: Callable[[Any, str, Ids], str]
    argument: str = ""  # which id of a message must equal the argument, where a region has one


def _nav(user: Any, argument: str, ids: Ids) -> str:
    jobs = render_to_string("components/nav_jobs.html", {"shell_live_jobs": live_job_count()})
    return jobs + render_to_string("components/shell_empty.html", {"shell_empty": empty_because(rig_default())})


def _serving(user: Any, argument: str, ids: Ids) -> str:
    return render_to_string("dashboard/partials/serving.html", {"panel": serving_panel(rig_default(), user)})


def _policies(user: Any, argument: str, ids: Ids) -> str:
    return render_to_string("dashboard/partials/policies.html", {"panel": policies_panel(rig_default(), user)})


def _alerts(user: Any, argument: str, ids: Ids) -> str:
    return render_to_string("dashboard/partials/alerts.html", {"alerts": rig_alerts(rig_default())})


def _cards(user: Any, argument: str, ids: Ids) -> str:
    rig = rig_default()
    return render_to_string("dashboard/partials/cards.html", {"panel": rig_panel(rig, live_deployments(rig))})


def _switch(user: Any, argument: str, ids: Ids) -> str:
    return render_to_string("dashboard/partials/switch.html", {"panel": switch_panel(rig_default(), user)})


def _starter(user: Any, argument: str, ids: Ids) -> str:
    return render_to_string("dashboard/partials/starter.html", {"panel": starter_panel(rig_default(), user)})


def _last_jobs(user: Any, argument: str, ids: Ids) -> str:
    return render_to_string("dashboard/partials/jobs.html", {"panel": jobs_panel(rig_default())})


def _job(user: Any, argument: str, ids: Ids) -> str:
    return job_changed(job_get(argument), user, log_only=bool(ids.get("log")))


def _deployment_status(user: Any, argument: str, ids: Ids) -> str:
    return render_to_string("deployments/partials/status.html", {"deployment": deployment_get(argument)})


def _download(user: Any, argument: str, ids: Ids) -> str:
    return download_panel(argument, user)


REGIONS: dict[str, Region] = {
    "nav": Region(Role.VIEWER, frozenset({"job", "deployment"}), _nav),
    "home.serving": Region(Role.VIEWER, frozenset({"job", "deployment", "engine"}), _serving),
    "home.policies": Region(Role.VIEWER, frozenset({"policy"}), _policies),
    "home.alerts": Region(Role.VIEWER, frozenset({"rig"}), _alerts),
    "home.cards": Region(Role.VIEWER, frozenset({"rig", "deployment"}), _cards),
    "home.switch": Region(Role.VIEWER, frozenset({"deployment", "profile", "install", "model"}), _switch),
    "home.starter": Region(Role.VIEWER, frozenset({"install", "job"}), _starter),
    "home.jobs": Region(Role.VIEWER, frozenset({"job"}), _last_jobs),
    "job": Region(Role.VIEWER, frozenset({"job"}), _job, "job"),
    "download": Region(Role.VIEWER, frozenset({"job"}), _download, "job"),
    "deployment": Region(Role.VIEWER, frozenset({"deployment"}), _deployment_status, "deployment"),
}
GROUPS = {"home": tuple(name for name in REGIONS if name.startswith("home."))}
# Added log lines change one region only.
LOG_REGIONS = frozenset({"job"})
WATCH_MAX = 60


def watched(names: Iterable[str]) -> tuple[str, ...]:
    """The regions behind what a page asked for; unknown names are left out."""
    found: dict[str, None] = {}
    for name in names:
        kind, _, argument = name.strip().partition(":")
        for region in GROUPS.get(kind, (kind,)):
            if region in REGIONS and bool(REGIONS[region].argument) == bool(argument):
                found[f"{region}:{argument}" if argument else region] = None
    return tuple(found)[:WATCH_MAX]


def concerned(regions: Iterable[str], topic: str, ids: Ids) -> list[str]:
    """Which of the watched regions a message is about."""
    about = []
    for name in regions:
        kind, _, argument = name.partition(":")
        region = REGIONS[kind]
        if topic not in region.topics or (ids.get("log") and kind not in LOG_REGIONS):
            continue
        if region.argument and str(ids.get(region.argument)) != argument:
            continue
        about.append(name)
    return about


def draw(name: str, user: Any, ids: Ids | None = None) -> str:
    """A region's HTML for this user; nothing where they may not see it or it is gone."""
    kind, _, argument = name.partition(":")
    region = REGIONS[kind]
    if not user.has_role(region.role):
        return ""
    try:
        return region.draw(user, argument, ids or {})
    except ApplicationError:
        return ""
