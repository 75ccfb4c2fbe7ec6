"""One of several replicas starts again, as a job of the panel, while the others serve on.

It keeps its cards, its port and its place; whatever a person asks for supersedes it. How often and how soon is the
restart policy's to say (``decide``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from django.db import transaction
from django.utils import timezone

from apps.audit.services import record
from apps.common.actors import PANEL
from apps.common.realtime import page_changed
from apps.deployments import launching, probing, routes
from apps.deployments.cards_there import cards_lacking
from apps.deployments.decide import Decision, ReplicaSeen
from apps.deployments.memory import wait_for_memory
from apps.deployments.models import SERVING, Deployment, Desired, Replica, Status
from apps.deployments.pauses import pause_words, paused_cards
from apps.deployments.plan import Plan, placed, plan
from apps.deployments.policies.decide import clock
from apps.deployments.policies.selectors import policy_of as rig_policy_of
from apps.deployments.restarting import REPLICA_RESTART
from apps.deployments.smoke import smoke
from apps.deployments.status import deployment_transition
from apps.deployments.switch import exclusion
from apps.deployments.switch_forward import follow_start
from apps.deployments.switch_sleep import cards_of
from apps.jobs.handlers import JobFailed, Step
from apps.jobs.models import LIVE_STATES, Job, JobState
from apps.jobs.runner import JobContext
from apps.jobs.services import job_create


def restart_replica(deployment: Deployment, decision: Decision) -> Job | None:
    """Begin it; None where another tick was first."""
    (index,) = decision.replicas
    params = {"deployment_id": deployment.pk, "replica": index}
    with transaction.atomic():
        Deployment.objects.select_for_update(no_key=True).get(pk=deployment.pk)
        if Job.objects.filter(kind=REPLICA_RESTART, state__in=LIVE_STATES, params=params).exists():
            return None
        job = job_create(
            kind=REPLICA_RESTART,
            title=f"Restart replica {index} of {deployment.profile_name}",
            rig_name=deployment.rig.slug,
            queue=deployment.rig.control_queue,
            actor=PANEL,
            reason=f"{decision.why}: {deployment.status_reason}",
            params=params,
            exclusion=exclusion(deployment.rig),
            profile_slug=deployment.version.profile.slug,
            profile_name=deployment.profile_name,
            profile_version=deployment.version.number,
        )
        Job.objects.filter(pk=job.pk).update(deployment_id=deployment.pk)
    return job


def is_renewing(deployment: Deployment) -> bool:
    """Whether a replica of it is being started again at this moment; one that still waits for its turn is not."""
    jobs = Job.objects.filter(kind=REPLICA_RESTART, deployment_id=deployment.pk, state=JobState.RUNNING)
    return jobs.exists()


def with_its_tries(deployment: Deployment, seen: tuple[ReplicaSeen, ...]) -> tuple[ReplicaSeen, ...]:
    """The same with what is on record of earlier restarts; those that gave way to what a person asked for are none."""
    jobs = Job.objects.filter(kind=REPLICA_RESTART, deployment_id=deployment.pk, superseded_by=None)
    tries = list(jobs.exclude(state__in=LIVE_STATES).order_by("-pk")[:100])
    paused, cards, found = paused_cards(deployment.rig), cards_of(deployment), []
    lacking = cards_lacking(deployment.version, deployment.rig)
    for one in seen:
        its = [job for job in tries if job.params["replica"] == one.index]
        last = its[0] if its else None
        resting = [paused[gpu] for gpu in cards[one.index] if gpu in paused]
        found.append(
            replace(
                one,
                restarts=tuple(job.created_at for job in its),
                tried_at=last.finished_at if last else None,
                cancelled=last.cancel_requested_by if last and last.state == JobState.CANCELLED else "",
                paused=pause_words(resting, deployment.rig) if resting else lacking,
            )
        )
    return tuple(found)


def tell_given_up(deployment: Deployment, decision: Decision) -> None:
    """Say beside its state why a replica stays away, and until when; once."""
    (index,) = decision.replicas
    now, zone = timezone.now(), rig_policy_of(deployment.rig).zone
    told = f"{decision.why}; the next try is at {clock(decision.at or now, now, zone)}."
    reason = f"Replica {index} of {deployment.profile_name} is away. {told}"
    if (
        Deployment.objects.filter(pk=deployment.pk, status=Status.DEGRADED)
        .exclude(status_reason=reason)
        .update(status_reason=reason[:500])
    ):
        record(PANEL, "deployment.given_up", "deployment", deployment.pk, str(deployment), {"why": reason})
        page_changed("deployment", deployment=deployment.pk)


class ReplicaRestartHandler:
    kind = REPLICA_RESTART

    def steps(self, job: Job) -> Sequence[Step]:
        return (
            Step("stop", "Stop what is left of it", _stop, 0.5, cancellable=False),
            Step("memory", "Wait until the GPU memory is free", _memory, 0.5),
            Step("start", "Start the engine", _start, 0.3),
            Step("ready", "Load the model", _ready, 20.0),
            Step("smoke", "Ask for one real token", _smoke, 0.3),
            Step("route", "Send traffic to it", _route, 0.2, cancellable=False),
        )

    def compensation(self, job: Job) -> Sequence[Step]:
        return (Step("clean_up", "Stop what was half started", _clean_up, 1.0),)

    def summary(self, job: Job) -> dict[str, Any]:
        return {"summary": f"Replica {job.params['replica']} of {job.profile_name} serves again."}


def _replica(ctx: JobContext) -> Replica:
    found = Replica.objects.select_related(
        "deployment__version__profile", "deployment__version__model", "deployment__rig"
    )
    return found.get(deployment=ctx.job.params["deployment_id"], index=ctx.job.params["replica"])


def _wanted(ctx: JobContext) -> Replica:
    """Raises JobFailed where its deployment has ended or is going meanwhile."""
    replica = _replica(ctx)
    deployment = replica.deployment
    if deployment.status not in SERVING or deployment.desired != Desired.SERVING:
        raise JobFailed(f"{deployment.profile_name} is {deployment.get_status_display().lower()} by now.")
    return replica


def _plan(deployment: Deployment) -> Plan:
    """On the cards that it has, wherever a new one would lie now."""
    made = placed(plan(deployment.version, deployment.rig), cards_of(deployment))
    if made.problems:
        raise JobFailed(" ".join(made.problems), cause="does_not_fit")
    return made


def _stop(ctx: JobContext) -> str:
    replica = _wanted(ctx)
    the_plan = _plan(replica.deployment)
    if tail := launching.log_tail(replica):
        ctx.log("The end of its log:")
        ctx.log(tail, "engine")
    told = launching.stop_replicas([replica])
    launching.renew(replica, the_plan)
    return told


def _memory(ctx: JobContext) -> str:
    replica = _wanted(ctx)
    return wait_for_memory([cards_of(replica.deployment)[replica.index]], ctx.sleep)


def _start(ctx: JobContext) -> str:
    replica = _wanted(ctx)
    launching.launch(replica.deployment, _plan(replica.deployment), only=replica.index)
    return f"on port {replica.port}"


def _ready(ctx: JobContext) -> str:
    replica = _wanted(ctx)
    follow_start(ctx, replica.deployment, [replica])
    return "loaded"


def _smoke(ctx: JobContext) -> str:
    replica = _wanted(ctx)
    return smoke(replica.deployment, ctx.sleep, [replica])


def _route(ctx: JobContext) -> str:
    replica = _wanted(ctx)
    deployment = replica.deployment
    probing.forget([replica])
    with transaction.atomic():
        Replica.objects.filter(pk=replica.pk).update(healthy=True)
        all_serve = not deployment.replicas.filter(healthy=False).exists()
        why = "all of its replicas serve again"
        if all_serve and deployment_transition(deployment, Status.READY, why):
            record(PANEL, "deployment.recovered", "deployment", deployment.pk, str(deployment), {"why": why})
        epoch = routes.routes_changed()
        page_changed("deployment", deployment=deployment.pk)
    routes.wait_acknowledged(epoch, ctx.sleep)
    return why if all_serve else "others of its replicas are still away"


def _clean_up(ctx: JobContext) -> str:
    replica = _replica(ctx)
    with transaction.atomic():
        if Replica.objects.filter(pk=replica.pk, healthy=True).update(healthy=False):
            routes.routes_changed()
    if replica.deployment.replicas.filter(released_at=None, healthy=True).exists():
        ctx.save_data(aftermath="The others serve on.")
    return launching.stop_replicas([replica])
