"""What people and other apps may ask of deployments."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping

from django.db import transaction

from apps.audit.services import record
from apps.common.actors import Actor
from apps.common.errors import Conflict, NotAllowed
from apps.common.roles import Role
from apps.deployments import routes
from apps.deployments.launching import observe
from apps.deployments.models import COMING_UP, LIVE, SERVING, Deployment, Desired, Replica, RestartPolicy, Status
from apps.deployments.policies.decide import Asker, role_allows
from apps.deployments.policies.verdicts import enforce, stop_verdict, switch_verdict
from apps.deployments.restarting import REPLICA_RESTART
from apps.deployments.routes import gateway_gone, gateway_seen
from apps.deployments.stop import stop_now
from apps.deployments.switch import exclusion
from apps.jobs.models import LIVE_STATES, Job, JobState
from apps.jobs.services import job_cancel, job_create, job_finish, job_log
from apps.profiles.models import Profile, ProfileVersion
from apps.rigs.models import Rig
from apps.rigs.selectors import rig_default, rig_here

__all__ = [
    "cut_request",
    "gateway_gone",
    "gateway_seen",
    "may_switch",
    "restart_policy_set",
    "running_under_other_names",
    "stop_everything",
    "stop_request",
    "switch_request",
]


def may_switch(role: Role | None, profile: Profile) -> bool:
    """Operators switch to anything, members to what is marked for them."""
    return role_allows(role, profile.members_may_switch)


def require_switch(role: Role | None, profile: Profile) -> None:
    """Raise NotAllowed with what would help."""
    if not may_switch(role, profile):
        raise NotAllowed(
            f"{profile} is not marked as one that members may switch to; ask for it under Policies."
            if role is not None and role.covers(Role.MEMBER)
            else "Your role may look, but not switch."
        )


def switch_request(
    *,
    profile: Profile,
    actor: Actor,
    reason: str = "",
    exclusive: bool = False,
    rig: Rig | None = None,
    asker: Asker = Asker.OPERATOR,
    override: bool = False,
    passing: Collection[str] = (),
    clock: Mapping[str, object] | None = None,
) -> Job:
    """Switch the rig to the newest version of a profile; returns its job.

    The same wish twice (a double click) is one job. A different wish supersedes the one under way. Raises Conflict
    where a policy forbids it now (``apps.deployments.policies``): an operator passes over pins and paused cards with
    ``override``, or over those alone that were asked about with ``passing``. The policies are asked again when the
    switch begins, which may be later. ``clock``: for which occurrence of the calendar or of home.
    """
    rig = rig or rig_default()
    if profile.archived_at is not None:
        raise Conflict(f"{profile} is archived; bring it back before you switch to it.", code="archived")
    version = profile.current
    with transaction.atomic():
        Rig.objects.select_for_update(no_key=True).get(pk=rig.pk)  # two people at once: one after the other
        under_way = list(
            Job.objects.filter(
                kind="switch", exclusion=exclusion(rig), state__in=LIVE_STATES, cancel_requested_at=None
            ).order_by("-pk")
        )
        same = under_way[0] if under_way and under_way[0].params == _params(version.pk, exclusive) else None
        if same is not None and (same.state != JobState.QUEUED or asker is not Asker.OPERATOR):
            return same
        if same is not None and "restart_of" in same.data:
            same = None  # a restart replaces nothing and passes over nothing: an operator asks for more
        verdict = switch_verdict(
            version,
            rig,
            asker=asker,
            asker_pk=actor.user_pk,
            override=override,
            passing=passing,
            exclusive=exclusive,
        )
        enforce(verdict, actor)
        restarts = _replica_restarts(rig)
        if not exclusive and (coming := _of_what_serves(version, restarts)):
            return coming  # a switch to it would end it, and find nothing to do
        leave: dict[str, object] = {"asker": asker, "asker_pk": actor.user_pk, "passed": list(verdict.keys)}
        if same is not None:  # it waits in somebody else's name, whom a policy may stop that does not bind this one
            Job.objects.filter(pk=same.pk, state=JobState.QUEUED).update(data={**same.data, "leave": leave})
            return same
        job = job_create(
            kind="switch",
            title=f"Switch to {profile.name}",
            rig_name=rig.slug,
            queue=rig.control_queue,
            actor=actor,
            reason=reason,
            params=_params(version.pk, exclusive),
            data={"leave": leave, **({"clock": dict(clock)} if clock else {})},
            exclusion=exclusion(rig),
            profile_slug=profile.slug,
            profile_name=profile.name,
            profile_version=version.number,
        )
        for earlier in [*under_way, *restarts]:
            cancelled = _cancel(earlier, actor, superseded_by=job)
            if cancelled is not None and cancelled.is_final:  # it does not run to leave what it held to this one
                routes.release(cancelled.pk, heir_id=job.pk)
    return job


def _cancel(job: Job, actor: Actor, superseded_by: Job | None = None) -> Job | None:
    """None where it has ended since it was read: that is no reason to refuse what somebody asks for instead."""
    try:
        return job_cancel(job, actor=actor, superseded_by=superseded_by)
    except Conflict as conflict:
        if conflict.code != "job_ended":
            raise
        return None


def _replica_restarts(rig: Rig) -> list[Job]:
    """Replicas that are just being started again: whatever a person asks for does not wait for them."""
    found = Job.objects.filter(
        kind=REPLICA_RESTART, exclusion=exclusion(rig), state__in=LIVE_STATES, cancel_requested_at=None
    )
    return list(found.order_by("pk"))


def _of_what_serves(version: ProfileVersion, restarts: Iterable[Job]) -> Job | None:
    """The restart of a replica of just this version, which serves with the others."""
    its = {job.params["deployment_id"]: job for job in restarts}
    serving = Deployment.objects.filter(pk__in=its, version=version, status__in=SERVING, desired=Desired.SERVING)
    found = serving.first()
    return None if found is None else its[found.pk]


def _params(version_id: int, exclusive: bool) -> dict[str, object]:
    return {"version_id": version_id, "exclusive": exclusive}


def stop_request(
    *,
    deployment: Deployment,
    actor: Actor,
    reason: str = "",
    asker: Asker = Asker.OPERATOR,
    override: bool = False,
    passing: Collection[str] = (),
    rest: bool = False,
) -> Job:
    """Stop a deployment; returns its job. One that is coming up is stopped by cancelling its switch. With ``rest``
    it is put to sleep instead where it can sleep.

    Raises Conflict where somebody else's pin forbids it."""
    with transaction.atomic():
        rig = Rig.objects.select_for_update(no_key=True).get(pk=deployment.rig_id)
        deployment.refresh_from_db()
        if not deployment.is_live and not deployment.comes_back:
            raise Conflict(f"{deployment.profile_name} is not running any more.", code="not_running")
        verdict = stop_verdict(deployment, asker=asker, asker_pk=actor.user_pk, override=override, passing=passing)
        enforce(verdict, actor)
        if deployment.status in COMING_UP and deployment.job_id:
            starting = Job.objects.filter(pk=deployment.job_id, state__in=LIVE_STATES).first()
            if starting is not None and (cancelled := _cancel(starting, actor)) is not None:
                if reason:
                    job_log(cancelled, f"{actor.name} stops it: {reason}")
                return cancelled
        same = Job.objects.filter(
            kind="stop", state__in=LIVE_STATES, cancel_requested_at=None, params={"deployment_id": deployment.pk}
        ).first()
        if same is not None and (rest or not same.data.get("rest")):
            return same
        job = job_create(
            kind="stop",
            title=f"{'Rest' if rest else 'Stop'} {deployment.profile_name}",
            rig_name=rig.slug,
            queue=rig.control_queue,
            actor=actor,
            reason=reason,
            params={"deployment_id": deployment.pk},
            data={"rest": True} if rest else {},
            exclusion=exclusion(rig),
            profile_slug=deployment.version.profile.slug,
            profile_name=deployment.profile_name,
            profile_version=deployment.version.number,
        )
        Job.objects.filter(pk=job.pk).update(deployment_id=deployment.pk)
        job.deployment_id = deployment.pk
        resting = [same] if same is not None else []
        for earlier in [*resting, *_replica_restarts(rig)]:
            _cancel(earlier, actor, superseded_by=job)
    return job


def cut_request(*, deployment: Deployment, actor: Actor) -> None:
    """End the draining of a deployment now: what still runs is cut. Raises Conflict when it does not drain."""
    with transaction.atomic():
        asked = Deployment.objects.filter(pk=deployment.pk, status=Status.DRAINING).update(cut_by_name=actor.name)
        if not asked:
            raise Conflict(f"{deployment.profile_name} is not draining; there is nothing to cut.", code="not_draining")
        record(actor, "deployment.cut", "deployment", deployment.pk, str(deployment), {})


def restart_policy_set(*, profile: Profile, actor: Actor, **values: float) -> RestartPolicy:
    """Change the given fields of a profile's policy, whose other fields stay as they are."""
    with transaction.atomic():
        policy, _ = RestartPolicy.objects.update_or_create(profile=profile, defaults=values)
        record(actor, "profile.restarts", "profile", profile.pk, profile.slug, values)
    return policy


def stop_everything(actor: Actor) -> list[str]:
    """Stop all engines of this rig here and now, without workers (``make down``). Returns sentences.

    Call it when the panel's own processes are down: nobody else moves engines then."""
    rig = rig_here()
    told = []
    for job in Job.objects.filter(exclusion=exclusion(rig), state__in=LIVE_STATES):
        with transaction.atomic():
            if job.state == "queued":
                job_cancel(job, actor=actor)
            else:
                Job.objects.filter(pk=job.pk).update(lease_owner="")
                job_finish(job, "cancelled", {"summary": "The whole panel was taken down."})  # type: ignore[arg-type]
    for job_id in routes.stale_holds(()):
        routes.release(job_id)
    Deployment.objects.filter(rig=rig, status=Status.FAILED).update(desired=Desired.STOPPED)  # nothing comes back
    for deployment in Deployment.objects.filter(rig=rig, status__in=LIVE).select_related("version__profile", "rig"):
        routes.close(deployment)
        told.append(f"{deployment.profile_name}: {stop_now(deployment, f'taken down by {actor.name}')}")
        record(actor, "deployment.stop", "deployment", deployment.pk, str(deployment), {"why": "taken down"})
    return told


def running_under_other_names() -> Mapping[str, int]:
    """How many deployments this machine runs for rigs of other names: it was called so when they were started."""
    others = Replica.objects.filter(deployment__status__in=LIVE, released_at=None).exclude(deployment__rig=rig_here())
    # Nothing is found here of what another machine runs.
    here = [replica.deployment for replica in others.select_related("deployment__rig") if observe(replica).pids]
    return Counter(deployment.rig.slug for deployment in set(here))
