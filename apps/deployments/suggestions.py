"""The one change that a failed start suggests, applied as a new version of its profile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from apps.common.actors import Actor
from apps.common.errors import Conflict
from apps.deployments.models import Deployment
from apps.jobs.models import Job
from apps.profiles.models import Profile, ProfileVersion
from apps.profiles.services import profile_update

LAYOUT = ("replicas", "tensor_parallel_size", "pipeline_parallel_size")


@dataclass(frozen=True, slots=True)
class Suggestion:
    """``changes``: (option, value now, value suggested); None where an option is or becomes unset."""

    job: Job
    profile: Profile
    sentence: str
    changes: tuple[tuple[str, Any, Any], ...]

    @property
    def words(self) -> str:
        """``max_model_len 16128``, for the button."""
        return ", ".join(f"{name} {_shown(value)}" for name, _, value in self.changes)


def suggestion_of(job: Job | None) -> Suggestion | None:
    """What a job that failed, or the end of the engine that it had started, suggests; None where that is nothing, or
    the profile's newest version has it already."""
    if job is None or not job.profile_slug:
        return None
    facts: Mapping[str, Any] = job.result or {}
    if not facts.get("suggested_options"):
        deployment = Deployment.objects.filter(pk=job.deployment_id).first() if job.deployment_id else None
        facts = (deployment.evidence if deployment else None) or {}
    wanted = facts.get("suggested_options")
    profile = Profile.objects.filter(slug=job.profile_slug, archived_at=None).first()
    if not isinstance(wanted, Mapping) or not wanted or profile is None:
        return None
    current = profile.current
    now = {**current.options, **{name: getattr(current, name) for name in LAYOUT}}
    changes = tuple((n, now.get(n), v) for n, v in wanted.items() if now.get(n) != v)
    return Suggestion(job, profile, str(facts.get("suggestion") or ""), changes) if changes else None


def suggestion_apply(job: Job, *, actor: Actor) -> ProfileVersion:
    """Make the new version. Raises Conflict when there is nothing (more) to apply, Invalid when it cannot be stored."""
    found = suggestion_of(job)
    if found is None:
        raise Conflict("There is no suggestion to apply, or the profile has it already.", code="no_suggestion")
    layout = {name: value for name, _, value in found.changes if name in LAYOUT}
    wanted = {name: value for name, _, value in found.changes if name not in LAYOUT}
    options = {**found.profile.current.options, **wanted}
    profile = profile_update(
        found.profile,
        actor=actor,
        note=f"As job {job.pk} suggested: {found.words}."[:300],
        options={name: value for name, value in options.items() if value is not None},
        **layout,
    )
    return profile.current


def _shown(value: Any) -> str:
    return (
        {None: "unset", True: "on", False: "off"}.get(value, str(value)) if not isinstance(value, dict) else "changed"
    )
