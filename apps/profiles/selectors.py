"""Reads of profiles and their versions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from django.db.models import Prefetch, QuerySet

from apps.common.errors import NotFound
from apps.profiles.models import Profile, ProfileVersion
from apps.profiles.signals import plan_asked
from apps.rigs.models import Rig

# What makes a version; a change of anything else changes the profile itself.
VERSION_FIELDS = (
    "model",
    "engine",
    "device",
    "replicas",
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "served_name",
    "options",
    "power_limit_watts",
    "engine_version",
)


def profile_get(reference: str | int) -> Profile:
    """By slug or id, archived ones too. Raises NotFound."""
    text = str(reference)
    found = Profile.objects.filter(slug=text).first()
    if found is None and text.isdecimal() and len(text) < 19:
        found = Profile.objects.filter(pk=int(text)).first()
    if found is None:
        raise NotFound(f"There is no profile {text[:100]!r}.")
    return found


def profile_list(include_archived: bool = False) -> QuerySet[Profile]:
    """By name; each with its versions, newest first, prefetched (``newest`` reads them without a query)."""
    versions = ProfileVersion.objects.select_related("model").order_by("-number")
    profiles = Profile.objects.order_by("name", "pk").prefetch_related(Prefetch("versions", versions))
    return profiles if include_archived else profiles.filter(archived_at=None)


def newest(profile: Profile) -> ProfileVersion:
    """The current version from what ``profile_list`` prefetched."""
    return max(profile.versions.all(), key=lambda version: version.number)


def plan_panel(version: ProfileVersion, rig: Rig) -> Any:
    """What the page shows of the plan, from the app that knows what runs; None where none answers."""
    answers = plan_asked.send(sender=ProfileVersion, version=version, rig=rig)
    return next((answer for _, answer in answers if answer is not None), None)


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that differs between two versions; None where it was or is not set."""

    field: str
    before: Any
    after: Any


def version_diff(before: ProfileVersion | None, after: ProfileVersion) -> list[Change]:
    """What ``after`` changed, options one by one."""
    if before is None:
        return []
    changes = []
    for name in VERSION_FIELDS:
        old, new = getattr(before, name), getattr(after, name)
        if name == "options":
            for key in sorted({*old, *new}):
                if old.get(key) != new.get(key):
                    changes.append(Change(key, old.get(key), new.get(key)))
        elif old != new:
            changes.append(Change(name, str(old), str(new)))
    return changes


def history(profile: Profile) -> list[tuple[ProfileVersion, list[Change]]]:
    """All versions, newest first, each with what it changed."""
    versions = list(profile.versions.select_related("model").order_by("-number"))
    return [(v, version_diff(versions[i + 1] if i + 1 < len(versions) else None, v)) for i, v in enumerate(versions)]
