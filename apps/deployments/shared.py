"""Engines that serve all replicas behind one address (Ray Serve): how the panel learns how each replica is.

Their process lives on when a replica dies, so watching processes shows nothing; the address itself is asked.
"""

from __future__ import annotations

import structlog
from django.db import transaction

from apps.audit.services import record
from apps.common.actors import PANEL
from apps.common.realtime import page_changed
from apps.deployments import routes
from apps.deployments.engine_http import ask
from apps.deployments.equipment import engine_adapter
from apps.deployments.models import SERVING, Deployment, Replica, Status
from apps.deployments.status import deployment_transition
from apps.engines.protocol import InvalidOptions, SharedReport, SharesOneAddress

log = structlog.get_logger(__name__)


def watch(deployment: Deployment) -> None:
    """Ask a serving deployment's address and take down what it says; nothing where each replica has its own."""
    if deployment.status not in SERVING:
        return
    try:
        engine = engine_adapter(deployment.version, deployment.rig)
    except InvalidOptions:
        return
    if not isinstance(engine, SharesOneAddress):
        return
    first = deployment.replicas.filter(released_at=None).first()
    if first is None:
        return
    status, text = ask(first, "GET", engine.replicas_path)
    report = engine.parse_report(text) if status == 200 else None
    if report is None:  # busy, or just ending: its process is watched, the next tick asks again
        log.info("no report of replicas", deployment=deployment.pk, status=status)
        return
    take(deployment, report)


def take(deployment: Deployment, report: SharedReport) -> None:
    """Store health and condition of each replica; fewer than all is *degraded*, all again is *ready*."""
    conditions = {one.index: one for one in report.replicas}
    changed = False
    with transaction.atomic():
        replicas = list(deployment.replicas.filter(released_at=None))
        for replica in replicas:
            one = conditions.get(replica.index)
            healthy, condition = (one.healthy, one.state[:60]) if one else (False, "")
            if (replica.healthy, replica.condition) != (healthy, condition):
                Replica.objects.filter(pk=replica.pk).update(healthy=healthy, condition=condition)
                replica.healthy, replica.condition = healthy, condition
                changed = True
        away = [r for r in replicas if not r.healthy]
        if away and deployment.status == Status.READY:
            _move(deployment, Status.DEGRADED, _words(deployment, replicas, away), "deployment.degraded")
        elif not away and deployment.status == Status.DEGRADED:
            _move(deployment, Status.READY, "all of its replicas serve again", "deployment.recovered")
        elif changed:
            routes.routes_changed()
    if changed:
        page_changed("deployment", deployment=deployment.pk)


def _move(deployment: Deployment, to: Status, why: str, act: str) -> None:
    if deployment_transition(deployment, to, why):
        routes.routes_changed()
        record(PANEL, act, "deployment", deployment.pk, str(deployment), {"why": why})


def _words(deployment: Deployment, replicas: list[Replica], away: list[Replica]) -> str:
    engine = deployment.version.get_engine_display()
    if len(away) == len(replicas):
        return f"None of its {len(replicas)} replicas serves; {engine} starts them again."
    who = ", ".join(f"replica {r.index} is {r.condition or 'gone'}" for r in away)
    return f"{who[:1].upper()}{who[1:]}; {engine} starts it again, and the others serve on."
