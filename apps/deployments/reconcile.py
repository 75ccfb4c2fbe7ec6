"""Looks at every engine that should run here, acts on the difference between what was asked and what is seen.

What to do is decided in ``decide``; here it is looked and done, both as often as you like. Engines are found by their
handles, whichever worker started them; what this panel did not start is never touched, and a deployment that a job is
working on is left to it.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Any

import structlog
from django.db import transaction
from django.utils import timezone

from apps.audit.services import record
from apps.common.actors import PANEL
from apps.common.identity import lives
from apps.common.realtime import page_changed
from apps.deployments import launching, probing, routes, shared
from apps.deployments.decide import WATCHED, Act, Decision, Observation, ReplicaSeen, decide
from apps.deployments.equipment import engine_adapter
from apps.deployments.models import LIVE_OR_COMES_BACK, Deployment, Replica, RestartPolicy, Status
from apps.deployments.replica_restart import is_renewing, restart_replica, tell_given_up, with_its_tries
from apps.deployments.restarting import engines_busy, look_at_failed, plain, policy_of
from apps.deployments.status import deployment_transition
from apps.engines.protocol import InvalidOptions, SharesOneAddress
from apps.jobs.handlers import JobFailed
from apps.jobs.models import LIVE_STATES, Job
from apps.rigs.selectors import rig_here
from apps.runners.protocol import Observation as ProcessSeen
from apps.runners.protocol import ProcessState

log = structlog.get_logger(__name__)
AGAIN_SECONDS = 60.0  # what survives SIGKILL hangs in the kernel, where no further signal hurries it
_not_before: dict[int, float] = {}  # of deployments that are being ended or did not end: when to try it (again)
_lock = threading.Lock()


def reconcile(**_: Any) -> None:
    """Receiver of the rig's tick."""
    rig = rig_here()
    routes.forget_dead_gateways()
    live_jobs = Job.objects.filter(state__in=LIVE_STATES).values_list("pk", flat=True)
    for job_id in routes.stale_holds(list(live_jobs)):
        log.warning("holds of a job that has ended", job=job_id)
        routes.release(job_id)
    routes.end_wait_for_restart()
    for deployment in Deployment.objects.filter(LIVE_OR_COMES_BACK, rig=rig).select_related("version__profile", "rig"):
        try:
            _look(deployment)
        except JobFailed as error:  # a process that survives everything must not hide the other deployments
            log.error("engine cannot be stopped", deployment=deployment.pk, error=error.message)


def _look(deployment: Deployment) -> None:
    policy = policy_of(deployment.version.profile)
    if deployment.status == Status.FAILED:
        look_at_failed(deployment, policy)
        return
    replicas: list[tuple[Replica, ProcessSeen]] = []
    if deployment.status in WATCHED:
        replicas = [(r, launching.observe(r)) for r in deployment.replicas.filter(released_at=None)]
    looks_after_itself = not all(r.healthy for r, _ in replicas) and _looks_after_itself(deployment)
    watched = tuple(_seen(deployment, replica, found, policy) for replica, found in replicas)
    if deployment.status == Status.DEGRADED and not looks_after_itself:
        watched = with_its_tries(deployment, watched)
    seen = Observation(
        replicas=watched,
        busy=(deployment.status not in WATCHED or deployment.status == Status.DEGRADED)
        and engines_busy(deployment.rig),
        renewing=is_renewing(deployment),
        looks_after_itself=looks_after_itself,
    )
    decision = decide(deployment.desired, deployment.status, seen, plain(policy), timezone.now())
    if decision.act == Act.LEAVE and deployment.status in WATCHED:
        shared.watch(deployment)
    elif decision.act == Act.DEGRADE:
        _degrade(deployment, decision)
    elif decision.act == Act.RENEW:
        restart_replica(deployment, decision)
    elif decision.act == Act.GIVE_UP:
        tell_given_up(deployment, decision)
    elif decision.act == Act.LOSE:
        _once(deployment, lambda: _lose(deployment, decision, {r.index: (r, o) for r, o in replicas}, policy))
    elif decision.act == Act.END:
        _once(deployment, lambda: _end_orphan(deployment, decision))


def _once(deployment: Deployment, end: Callable[[], None]) -> None:
    """Not while an earlier tick is at it, whose ladder of signals may take half a minute, nor soon after something of
    it survived that (``end`` raised JobFailed)."""
    with _lock:
        if time.monotonic() < _not_before.get(deployment.pk, 0.0):
            return
        _not_before[deployment.pk] = math.inf
    again = 0.0
    try:
        end()
    except JobFailed:
        again = time.monotonic() + AGAIN_SECONDS
        raise
    finally:
        _not_before[deployment.pk] = again


def _looks_after_itself(deployment: Deployment) -> bool:
    """Whether its engine starts replicas again by itself, as one with a single address for all of them does."""
    try:
        return isinstance(engine_adapter(deployment.version, deployment.rig), SharesOneAddress)
    except InvalidOptions:
        return False


def _seen(deployment: Deployment, replica: Replica, found: ProcessSeen, policy: RestartPolicy) -> ReplicaSeen:
    failed, gone = 0, False
    if found.state == ProcessState.RUNNING:
        try:
            engine = engine_adapter(deployment.version, deployment.rig)
        except InvalidOptions:
            return ReplicaSeen(replica.index, found.state, replica.healthy, found.exit_code)
        if deployment.status == Status.SLEEPING:
            if not engines_busy(deployment.rig):  # a job may just be waking it
                failed = probing.probe(replica, deployment.served_name, engine, policy, asleep=True)
            return ReplicaSeen(replica.index, found.state, replica.healthy, found.exit_code, failed)
        # An engine that looks after replicas of its own starts them again itself, and gives up itself.
        shares = isinstance(engine, SharesOneAddress)
        if shares and not deployment.replicas.filter(healthy=True).exists():
            return ReplicaSeen(replica.index, found.state, replica.healthy, found.exit_code)
        gone = not shares and any(lives(int(pid), str(mark)) is False for pid, mark in replica.members)
        failed = probing.probe(replica, deployment.served_name, engine, policy, suspect=gone)
        if gone and probing.confirmed(replica):
            # What went was not needed (a compile helper, say): whoever is there now is the whole engine.
            Replica.objects.filter(pk=replica.pk).update(members=launching.members_of(found))
            gone = False
    return ReplicaSeen(replica.index, found.state, replica.healthy, found.exit_code, failed, gone)


def _who(deployment: Deployment, index: int) -> str:
    name = deployment.profile_name
    return name if deployment.version.replicas == 1 else f"Replica {index} of {name}"


def _take_out(deployment: Deployment, decision: Decision) -> None:
    """No further request goes to these replicas."""
    with transaction.atomic():
        bad = Replica.objects.filter(deployment=deployment, index__in=decision.replicas, healthy=True)
        if bad.update(healthy=False):
            routes.routes_changed()


def _degrade(deployment: Deployment, decision: Decision) -> None:
    why = f"{_who(deployment, decision.replicas[0])} {decision.why}"
    with transaction.atomic():
        _take_out(deployment, decision)
        if deployment.status == Status.READY and deployment_transition(deployment, Status.DEGRADED, why):
            record(PANEL, "deployment.degraded", "deployment", deployment.pk, str(deployment), {"why": why})


def _lose(
    deployment: Deployment,
    decision: Decision,
    replicas: dict[int, tuple[Replica, ProcessSeen]],
    policy: RestartPolicy,
) -> None:
    replica, end = replicas[decision.replicas[0]]
    why = f"{_who(deployment, replica.index)} {decision.why}"
    evidence = _evidence(deployment, replica, end)
    _take_out(deployment, decision)
    # A hanging engine, or children of a dead one, still hold its memory; they go before its cards count as free.
    try:
        launching.stop_processes(deployment)
    except JobFailed as stuck:
        with transaction.atomic():
            if _note_loss(deployment, Status.STOPPING, why, evidence):
                _tell_stuck(deployment, why, stuck)
        raise
    with transaction.atomic():
        if not _note_loss(deployment, Status.FAILED, why, evidence):
            return  # a switch or stop moved it first
        deployment.refresh_from_db(fields=["desired", "ended_at", "status_reason"])
        if deployment.comes_back:
            # In the same moment, so that requests wait for what is decided below instead of being turned away.
            routes.wait_for_restart(deployment, None)
    look_at_failed(deployment, policy)


def _note_loss(deployment: Deployment, to: Status, why: str, evidence: dict[str, Any]) -> bool:
    if not deployment_transition(deployment, to, why, evidence=evidence):
        return False
    routes.close(deployment)
    record(PANEL, "deployment.lost", "deployment", deployment.pk, str(deployment), {"why": why})
    return True


def _tell_stuck(deployment: Deployment, why: str, stuck: JobFailed) -> None:
    """Something of it survived everything: it holds its cards, and says beside its state what to do."""
    reason = f"{why} {stuck.message}"[:500]
    same = Deployment.objects.filter(pk=deployment.pk, status=Status.STOPPING)
    if same.exclude(status_reason=reason).update(status_reason=reason):
        page_changed("deployment", deployment=deployment.pk)


def _evidence(deployment: Deployment, replica: Replica, end: ProcessSeen) -> dict[str, Any]:
    tail = launching.log_tail(replica)
    evidence: dict[str, Any] = {"exit_code": end.exit_code, "log_tail": tail}
    try:
        diagnosis = engine_adapter(deployment.version, deployment.rig).diagnose(tail, end.exit_code)
    except InvalidOptions:
        return evidence
    return {
        **evidence,
        "cause": str(diagnosis.cause),
        "evidence": list(diagnosis.evidence),
        "suggestion": diagnosis.suggestion,
        "suggested_options": dict(diagnosis.suggested_options),
    }


def _end_orphan(deployment: Deployment, decision: Decision) -> None:
    """Its job has ended without it (a bug, or rows restored from a backup), or something of it survived the last try:
    end it with a sentence."""
    log.warning("orphaned deployment", deployment=deployment.pk, status=deployment.status)
    if deployment.status != Status.STOPPING and not deployment_transition(deployment, Status.STOPPING, decision.why):
        return
    routes.close(deployment)
    stopping = deployment.events.filter(to_status=Status.STOPPING).last()
    told = stopping.reason if stopping and deployment.evidence else ""  # what failed has said why
    try:
        launching.stop_processes(deployment)
    except JobFailed as stuck:
        _tell_stuck(deployment, told or decision.why, stuck)
        raise
    deployment_transition(deployment, Status.FAILED, told or f"{decision.why} Its engine was stopped.")
