"""Reads of what runs."""

from __future__ import annotations

from django.db.models import Case, QuerySet, When

from apps.common.errors import NotFound
from apps.deployments.models import COMES_BACK, LIVE, SERVING, Deployment, Status
from apps.deployments.restarting import coming_back
from apps.deployments.routes import RouteEntry, RouteTable, Target, live_gateways, route_table
from apps.rigs.models import Rig

__all__ = [
    "RouteEntry",
    "RouteTable",
    "Target",
    "deployment_get",
    "empty_because",
    "last_ended",
    "live_deployments",
    "route_table",
    "serving_deployments",
    "streams_by_deployment",
]

_WITH = ("version__profile", "version__model", "rig")


def live_deployments(rig: Rig) -> list[Deployment]:
    """Everything on the rig that is not stopped or failed, newest first."""
    return list(
        Deployment.objects.filter(rig=rig, status__in=LIVE)
        .select_related(*_WITH)
        .prefetch_related("replicas__reservations__gpu")
    )


def serving_deployments(rig: Rig) -> list[Deployment]:
    return [d for d in live_deployments(rig) if d.status in SERVING]


def last_ended(rig: Rig) -> Deployment | None:
    """The deployment that ended last, for "failed" and "nothing serves" on the home page."""
    return _ended(rig).order_by("-ended_at").first()


def _ended(rig: Rig) -> QuerySet[Deployment]:
    ended = Deployment.objects.filter(rig=rig).exclude(status__in=LIVE).exclude(ended_at=None)
    return ended.select_related(*_WITH)


def empty_because(rig: Rig) -> str:
    """A sentence when the rig is empty though it should not be: something is to come back, or the last thing that ran
    failed. Else empty.

    Every page shows it."""
    if Deployment.objects.filter(rig=rig, status__in=LIVE).exists():
        return ""
    # What comes back, whatever ended after it; in one query.
    first = Case(When(COMES_BACK, then=0), default=1)
    last = _ended(rig).order_by(first, "-ended_at").first()
    if last is None or last.status != Status.FAILED:
        return ""
    comes = coming_back(last) or "Nothing is started by itself any more: switch to a model that works."
    return f"{last.profile_name}: {last.status_reason or 'it failed.'} {comes}"


def deployment_get(reference: str | int) -> Deployment:
    """By id. Raises NotFound."""
    found = None
    if str(reference).isdecimal():
        found = Deployment.objects.select_related(*_WITH).filter(pk=int(reference)).first()
    if found is None:
        raise NotFound(f"There is no deployment {reference!r}.")
    return found


def streams_by_deployment() -> dict[int, int] | None:
    """Requests under way per deployment over all living gateways; None where no gateway lives to say."""
    gateways = live_gateways()
    if not gateways:
        return None
    counts: dict[int, int] = {}
    for gateway in gateways:
        for key, count in gateway.in_flight.items():
            counts[int(key)] = counts.get(int(key), 0) + int(count)
    return counts
