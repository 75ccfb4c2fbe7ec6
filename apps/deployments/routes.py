"""Where requests go: the route table, its epoch, and the gateways' acknowledgements.

Every change of a route raises the epoch in the same transaction. A gateway acknowledges an epoch only
after it has applied it, so once all living ones have, no new request can go by the old table.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

import redis
import structlog
from django.db import transaction
from django.utils import timezone

from apps.common.identity import is_known_dead, is_known_running
from apps.common.models import Epoch
from apps.common.store import store
from apps.deployments.engine_http import doors
from apps.deployments.models import COMES_BACK, SERVING, Deployment, GatewayProcess, Route, RouteState

log = structlog.get_logger(__name__)
ROUTES_EPOCH = "routes"
ROUTES_CHANNEL = "rigpanel:routes"
GATEWAY_SILENT_AFTER = timedelta(seconds=15)
ACKNOWLEDGE_SECONDS = 15.0


@dataclass(frozen=True, slots=True)
class Target:
    """One engine endpoint; ``engine_key`` is its launch's own key and must never be shown."""

    deployment_id: int
    base_url: str
    engine_key: str
    version_id: int | None = None  # of the profile version that it runs


@dataclass(frozen=True, slots=True)
class RouteEntry:
    """``targets`` is empty while the route is held; where no replica answers just now, requests wait as well."""

    served_name: str
    state: str  # RouteState
    eta_at: datetime | None
    targets: tuple[Target, ...]


@dataclass(frozen=True, slots=True)
class RouteTable:
    epoch: int
    routes: tuple[RouteEntry, ...]


def route_table() -> RouteTable:
    """The whole table. The epoch is read first: a change in between is then seen as a newer epoch."""
    epoch = Epoch.current(ROUTES_EPOCH)
    entries = []
    for route in Route.objects.select_related("deployment").order_by("served_name"):
        targets: tuple[Target, ...] = ()
        deployment = route.deployment
        if route.state == RouteState.OPEN and deployment is not None and deployment.status in SERVING:
            targets = tuple(
                Target(deployment.pk, r.base_url, r.engine_key, deployment.version_id)
                for r in doors(deployment.replicas.filter(released_at=None, healthy=True))
            )
        state = route.state if targets else RouteState.HELD
        entries.append(RouteEntry(route.served_name, state, route.eta_at, targets))
    return RouteTable(epoch, tuple(entries))


def routes_changed() -> int:
    """Raise the epoch inside the caller's transaction and hint at it after commit. Returns the epoch."""
    epoch = Epoch.bump(ROUTES_EPOCH)
    transaction.on_commit(_hint)
    return epoch


def _hint() -> None:
    try:
        store().publish(ROUTES_CHANNEL, "changed")
    except redis.RedisError as error:  # gateways poll the epoch too
        log.warning("route hint not sent", error=str(error))


def hold(served_names: Iterable[str], *, job_id: int, eta_at: datetime | None) -> int:
    """Requests for these names wait from now on. Returns the epoch to be acknowledged."""
    with transaction.atomic():
        for name in served_names:
            Route.objects.update_or_create(
                served_name=name, defaults={"state": RouteState.HELD, "held_by_job_id": job_id, "eta_at": eta_at}
            )
        return routes_changed()


def expect(job_id: int, eta_at: datetime | None) -> None:
    """Tell those who wait for a job when it should be done."""
    with transaction.atomic():
        if Route.objects.filter(held_by_job_id=job_id).exclude(eta_at=eta_at).update(eta_at=eta_at):
            routes_changed()


def open_to(deployment: Deployment) -> int:
    """Requests for the deployment's name go to it. Call in the transaction that makes it ready."""
    Route.objects.update_or_create(
        served_name=deployment.served_name,
        defaults={"state": RouteState.OPEN, "deployment": deployment, "held_by_job_id": None, "eta_at": None},
    )
    return routes_changed()


def close(deployment: Deployment) -> int:
    """Nothing goes to this deployment any more; its name is free for another."""
    Route.objects.filter(deployment=deployment).delete()
    return routes_changed()


def wait_for_restart(deployment: Deployment, eta_at: datetime | None) -> None:
    """Requests for its name wait until it is started again. Call it as often as you like; nothing where a job holds
    the name, or another deployment has it."""
    with transaction.atomic():
        held = {"state": RouteState.HELD, "deployment": deployment, "eta_at": eta_at}
        route, made = Route.objects.select_for_update(no_key=True).get_or_create(
            served_name=deployment.served_name, defaults=held
        )
        if not made:
            if route.held_by_job_id is not None or route.deployment_id not in (None, deployment.pk):
                return
            if (route.state, route.deployment_id, route.eta_at) == (RouteState.HELD, deployment.pk, eta_at):
                return
            Route.objects.filter(pk=route.pk).update(**held)
        routes_changed()


def end_wait_for_restart(deployment: Deployment | None = None) -> None:
    """Of this one, or of all that were stopped, given up or replaced meanwhile: requests would wait for nothing."""
    waits = Route.objects.filter(state=RouteState.HELD, held_by_job_id=None)
    if deployment is not None:
        waits = waits.filter(deployment=deployment)
    else:
        waits = waits.exclude(deployment__in=Deployment.objects.filter(COMES_BACK))
    with transaction.atomic():
        if waits.delete()[0]:
            routes_changed()


def release(job_id: int, *, heir_id: int | None = None) -> int:
    """End a job's holds: names whose deployment still serves open again; the others wait on for ``heir_id``,
    the job that superseded this one, or for the restart of what failed and should serve, or go."""
    with transaction.atomic():
        for route in Route.objects.select_related("deployment").filter(held_by_job_id=job_id):
            if route.deployment is not None and route.deployment.status in SERVING:
                Route.objects.filter(pk=route.pk).update(state=RouteState.OPEN, held_by_job_id=None, eta_at=None)
            elif heir_id is not None:
                Route.objects.filter(pk=route.pk).update(held_by_job_id=heir_id)
            elif (failed := _to_be_restarted(route.served_name)) is not None:
                Route.objects.filter(pk=route.pk).update(held_by_job_id=None, deployment=failed, eta_at=None)
            else:
                route.delete()
        return routes_changed()


def _to_be_restarted(served_name: str) -> Deployment | None:
    return Deployment.objects.filter(COMES_BACK, served_name=served_name).order_by("-pk").first()


def stale_holds(live_job_ids: Collection[int]) -> list[int]:
    """Jobs that hold routes but have ended: their requests would wait for nothing."""
    held = Route.objects.filter(state=RouteState.HELD).exclude(held_by_job_id__in=live_job_ids)
    return sorted({int(pk) for pk in held.values_list("held_by_job_id", flat=True) if pk is not None})


# -- gateways ------------------------------------------------------------------------------------


def gateway_seen(key: str, *, epoch: int, in_flight: Mapping[int, int]) -> None:
    """A gateway says that it lives, has applied ``epoch``, and how many requests run per deployment."""
    values = {
        "seen_at": timezone.now(),
        "acknowledged_epoch": epoch,
        "in_flight": {str(k): int(v) for k, v in in_flight.items() if v},
    }
    if not GatewayProcess.objects.filter(key=key).update(**values):
        GatewayProcess.objects.update_or_create(key=key, defaults=values)


def gateway_gone(key: str) -> None:
    GatewayProcess.objects.filter(key=key).delete()


def forget_dead_gateways() -> None:
    """Rows of gateways that were killed: nobody else takes them away."""
    dead = [g.pk for g in GatewayProcess.objects.all() if is_known_dead(g.key)]
    if dead:
        GatewayProcess.objects.filter(pk__in=dead).delete()


def live_gateways() -> list[GatewayProcess]:
    """Gateways to wait for: those that run, where this host can tell, else those seen lately.

    A clock that is set must not make a gateway look silent while answers stream through it."""
    since = timezone.now() - GATEWAY_SILENT_AFTER
    known = [g for g in GatewayProcess.objects.all() if not is_known_dead(g.key)]
    return [g for g in known if g.seen_at >= since or is_known_running(g.key)]


def all_acknowledged(epoch: int) -> bool:
    return all(g.acknowledged_epoch >= epoch for g in live_gateways())


def in_flight(deployment_ids: Iterable[int]) -> int:
    """Requests under way to these deployments, over all living gateways."""
    wanted = {str(i) for i in deployment_ids}
    return sum(int(n) for g in live_gateways() for d, n in g.in_flight.items() if d in wanted)


def wait_acknowledged(
    epoch: int, pause: Callable[[float], None], *, limit_seconds: float = ACKNOWLEDGE_SECONDS
) -> bool:
    """Wait for every living gateway; False when one stayed silent for ``limit_seconds``.

    One that is frozen cannot send anything; when it thaws, the key of the engine it remembers is
    refused by any other engine.
    """
    began = time.monotonic()
    while not all_acknowledged(epoch):
        waited = time.monotonic() - began
        if waited > limit_seconds:
            return False
        pause(0.005 if waited < 0.1 else 0.02)  # most have within 0.02 s
    return True
