"""Starting again what died: as an ordinary switch to the same version, asked for by the panel.

So a restart holds traffic, waits for the memory, tests and routes like every switch, can be seen and cancelled like
one, and gives way to what a person asks for. It never takes a card from what runs: it waits, and keeps its wish.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime, timedelta

from django.db import transaction
from django.db.models import Q
from django.utils import timezone

from apps.common.actors import PANEL
from apps.deployments import routes
from apps.deployments.decide import Act, Decision, Observation, Policy, decide
from apps.deployments.giving_up import claim, give_up
from apps.deployments.heirs import asked_for
from apps.deployments.models import (
    Deployment,
    DeploymentEvent,
    Desired,
    RestartPolicy,
    Status,
)
from apps.deployments.policies.decide import Asker
from apps.deployments.policies.verdicts import switch_verdict
from apps.deployments.switch import exclusion
from apps.jobs.estimates import typical_seconds
from apps.jobs.models import LIVE_STATES, Job
from apps.jobs.services import job_create
from apps.profiles.models import Profile
from apps.rigs.models import Rig

REPLICA_RESTART = "restart"  # the kind of job that starts one replica again while the others serve
ENGINE_JOBS = ("switch", "stop", REPLICA_RESTART)  # the kinds that move engines: of one rig at most one runs


def policy_of(profile: Profile) -> RestartPolicy:
    """The profile's row, or one with the defaults that is not stored."""
    return RestartPolicy.objects.filter(profile=profile).first() or RestartPolicy(profile=profile)


def plain(policy: RestartPolicy) -> Policy:
    return Policy(policy.restarts, policy.window_seconds, policy.backoff_seconds, policy.probe_failures)


def engines_busy(rig: Rig) -> bool:
    """A job that moves engines waits or runs on this rig."""
    return Job.objects.filter(rig_name=rig.slug, state__in=LIVE_STATES, kind__in=ENGINE_JOBS).exists()


def look_at_failed(deployment: Deployment, policy: RestartPolicy) -> Decision:
    """Decide about a deployment that has failed though it should serve, and act on it. Call it as often as you like."""
    rig, profile = deployment.rig, deployment.version.profile
    later = Deployment.objects.filter(rig=rig, pk__gt=deployment.pk)
    restarts = Job.objects.filter(
        kind="switch", rig_name=rig.slug, profile_slug=profile.slug, data__has_key="restart_of"
    ).order_by("-pk")
    busy = engines_busy(rig)
    # While a job moves engines, what is in the way is about to change, and nothing is begun anyhow.
    hindered, instead = ("", "") if busy else _hindered(deployment)
    seen = Observation(
        busy=busy,
        ended_at=_last_ended(deployment),
        restarts=tuple(restarts.values_list("created_at", flat=True)[:50]),
        replaced=later.filter(Q(version__profile=profile) | Q(served_name=deployment.served_name)).exists(),
        archived=profile.archived_at is not None,
        hindered=hindered,
        instead=instead,
    )
    decision = decide(deployment.desired, deployment.status, seen, plain(policy), timezone.now())
    if decision.act == Act.RESTART:
        _restart(deployment, decision)
        return decision
    if decision.act == Act.GIVE_UP:
        give_up(deployment, decision.why)
    elif decision.act == Act.DROP:
        claim(deployment)
    # While another job moves engines it is left alone, and its own time comes after. Nobody waits for a card to cool or
    # for another model to go.
    if deployment.desired == Desired.SERVING and (decision.act == Act.LEAVE or decision.at is not None):
        routes.wait_for_restart(deployment, _ready_at(deployment, decision.at))
    else:
        routes.end_wait_for_restart(deployment)
    return decision


def coming_back(deployment: Deployment) -> str:
    """For people: that the panel starts it again, and what that waits for; empty of what is not to come back."""
    if not deployment.comes_back:
        return ""
    hindered, _ = _hindered(deployment)
    return f"The panel starts it again, but not yet: {hindered}." if hindered else "The panel starts it again."


def _hindered(deployment: Deployment) -> tuple[str, str]:
    """Why its restart would be refused now, and who was asked for since in its place; mostly nothing of both."""
    rig = deployment.rig
    verdict = switch_verdict(deployment.version, rig, asker=Asker.RESTART, asker_pk=None)
    return verdict.why, ", ".join(_asked_for_since(deployment, verdict.taken_by)) if verdict.taken_by else ""


def _asked_for_since(deployment: Deployment, profiles: Collection[int]) -> list[str]:
    """Names of those among ``profiles`` (ids, all of them live) that came up after it had died, and not only by a
    restart of theirs."""
    events = DeploymentEvent.objects.order_by("-pk")
    died = events.filter(deployment=deployment, to_status=Status.FAILED).first()
    if died is None:
        return []
    # After it by the order of the rows: the clock may have been set in between.
    came_up = events.filter(pk__gt=died.pk, from_status__in=(Status.LOADING, Status.SLEEPING), to_status=Status.READY)
    # Those that have ended count too: what was asked for since may have died in its turn and run again as a restart.
    since = Deployment.objects.filter(pk__in=came_up.values("deployment"), version__profile__in=profiles)
    return sorted({other.profile_name for other in since.select_related("version__profile") if asked_for(other.pk)})


def _last_ended(deployment: Deployment) -> datetime | None:
    """When it ended, or the last try to start it again that made nothing of it."""
    tried = Job.objects.filter(kind="switch", data__restart_of=deployment.pk).exclude(finished_at=None)
    found = [deployment.ended_at, *tried.order_by("-pk").values_list("finished_at", flat=True)[:1]]
    return max((at for at in found if at is not None), default=None)


def _restart(deployment: Deployment, decision: Decision) -> None:
    version = deployment.version
    with transaction.atomic():
        # The wish goes over to what comes of it, and back where nothing does (``switch_back``).
        if not claim(deployment):
            return
        job = job_create(
            kind="switch",
            title=f"Restart {deployment.profile_name}",
            rig_name=deployment.rig.slug,
            queue=deployment.rig.control_queue,
            actor=PANEL,
            reason=f"{decision.why}: {deployment.status_reason}",
            params={"version_id": version.pk, "exclusive": False},
            # As if it had stopped the old engine itself: a switch that supersedes this one then owes its return.
            data={"restart_of": deployment.pk, "fallback": [version.pk], "stopped_old": True},
            exclusion=exclusion(deployment.rig),
            profile_slug=version.profile.slug,
            profile_name=deployment.profile_name,
            profile_version=version.number,
        )
        routes.hold([deployment.served_name], job_id=job.pk, eta_at=_ready_at(deployment, timezone.now()))


def _ready_at(deployment: Deployment, begins_at: datetime | None) -> datetime | None:
    """When it serves again if it begins then: what its loads took here before; None where nobody can say."""
    takes = typical_seconds("switch", deployment.version.profile.slug, deployment.rig.slug)
    return None if begins_at is None or takes is None else begins_at + timedelta(seconds=takes)
