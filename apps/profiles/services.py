"""Changes to profiles. Whatever changes how something is served makes a new version; versions never change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import structlog
from django.db import IntegrityError, transaction
from django.utils import timezone

from apps.audit.services import record
from apps.catalog import services as catalog
from apps.catalog.models import Model
from apps.common.actors import PANEL, Actor
from apps.common.errors import Conflict, Invalid
from apps.common.realtime import page_changed
from apps.profiles.checks import Problems, checked_version, checked_words
from apps.profiles.models import Device, Profile, ProfileVersion
from apps.profiles.selectors import VERSION_FIELDS, version_diff
from apps.profiles.shipped import SHIPPED_PROFILES

log = structlog.get_logger(__name__)
PROFILE_FIELDS = ("name", "description", "members_may_switch")


def profile_create(
    *,
    actor: Actor,
    slug: str,
    name: str,
    model: Model,
    engine: str,
    device: str = Device.GPU,
    replicas: int = 1,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    options: Mapping[str, Any] | None = None,
    served_name: str = "",
    power_limit_watts: int | None = None,
    engine_version: str | None = None,
    members_may_switch: bool = False,
    description: str = "",
    note: str = "",
    shipped: bool = False,
) -> Profile:
    """Make a profile with its version 1. Raises Invalid with fields, or Conflict when the slug is taken."""
    problems = Problems()
    checked_words(problems, slug=slug, name=name, description=description, note=note)
    version = checked_version(
        problems,
        {
            "model": model,
            "engine": engine,
            "device": device,
            "replicas": replicas,
            "tensor_parallel_size": tensor_parallel_size,
            "pipeline_parallel_size": pipeline_parallel_size,
            "served_name": served_name,
            "options": options or {},
            "power_limit_watts": power_limit_watts,
            "engine_version": engine_version,
        },
    )
    problems.raise_if_any()
    try:
        with transaction.atomic():
            profile = Profile.objects.create(
                slug=slug,
                name=name.strip(),
                description=description.strip(),
                members_may_switch=members_may_switch,
                shipped=shipped,
            )
            first = _version_make(profile, 1, version, actor, note)
            record(
                actor, "profile.create", "profile", profile.pk, profile.name, {"slug": slug, "version": _told(first)}
            )
            page_changed("profile", profile=profile.pk)
    except IntegrityError:
        raise Conflict(
            f"There is already a profile {slug}.", code="slug_taken", fields={"slug": ["Choose another slug."]}
        ) from None
    return profile


def profile_update(profile: Profile, *, actor: Actor, note: str = "", **changes: Any) -> Profile:
    """Change a profile; makes version n+1 only when something of the version changes.

    Two people at once make two versions, one after the other, each from what was current then. A shipped profile
    becomes the team's own. Raises Invalid, or Conflict for an archived one.
    """
    unknown = sorted(set(changes) - {*PROFILE_FIELDS, *VERSION_FIELDS})
    if unknown:
        fields = {name: ["A profile has no such field, or it cannot be changed."] for name in unknown}
        raise Invalid(f"A profile's {', '.join(unknown)} cannot be changed.", fields=fields)
    with transaction.atomic():
        # The lock is what gives two editors two numbers. (On SQLite the transaction itself excludes others.)
        profile = Profile.objects.select_for_update(no_key=True).get(pk=profile.pk)
        if profile.archived_at is not None:
            raise Conflict(f"{profile} is archived; bring it back before changing it.", code="archived")
        current = profile.current
        problems = Problems()
        words = {name: changes.get(name, getattr(profile, name)) for name in PROFILE_FIELDS}
        checked_words(problems, slug=None, name=words["name"], description=words["description"], note=note)
        wanted = {name: changes.get(name, getattr(current, name)) for name in VERSION_FIELDS}
        if "model" in changes and "served_name" not in changes and current.served_name == current.model.slug:
            wanted["served_name"] = ""  # it followed the model's slug so far
        version = checked_version(problems, wanted)
        problems.raise_if_any()
        detail: dict[str, Any] = {}
        for name, value in words.items():
            value = value.strip() if isinstance(value, str) else value
            if getattr(profile, name) != value:
                detail[name] = [getattr(profile, name), value]
                setattr(profile, name, value)
        if any(getattr(current, name) != version[name] for name in VERSION_FIELDS):
            new = _version_make(profile, current.number + 1, version, actor, note)
            detail["version"] = new.number
            detail["changed"] = {c.field: [c.before, c.after] for c in version_diff(current, new)}
        if detail:
            profile.shipped = False
            profile.save(update_fields=["name", "description", "members_may_switch", "shipped"])
            record(actor, "profile.update", "profile", profile.pk, profile.name, detail)
            page_changed("profile", profile=profile.pk)
    return profile


def profile_archive(profile: Profile, *, actor: Actor) -> Profile:
    """Take it out of the lists; what ran with it keeps its history."""
    with transaction.atomic():
        if Profile.objects.filter(pk=profile.pk, archived_at=None).update(archived_at=timezone.now()):
            record(actor, "profile.archive", "profile", profile.pk, profile.name)
            page_changed("profile", profile=profile.pk)
    profile.refresh_from_db()
    return profile


def profile_restore(profile: Profile, *, actor: Actor) -> Profile:
    """Bring an archived profile back."""
    with transaction.atomic():
        if Profile.objects.filter(pk=profile.pk, archived_at__isnull=False).update(archived_at=None):
            record(actor, "profile.restore", "profile", profile.pk, profile.name)
            page_changed("profile", profile=profile.pk)
    profile.refresh_from_db()
    return profile


def load_shipped() -> int:
    """Bring catalogue and shipped profiles up to date; returns how many rows changed.

    A profile that the team edited or archived is left alone. Safe to run at every start.
    """
    changed = catalog.load_shipped()
    for one in SHIPPED_PROFILES:
        values = one.values()
        with transaction.atomic():
            model = Model.objects.filter(slug=one.model_slug).first()
            profile = Profile.objects.select_for_update(no_key=True).filter(slug=one.slug).first()
            if model is None:
                log.error("a shipped profile names no model of the catalogue", profile=one.slug, model=one.model_slug)
            elif profile is None:
                profile_create(
                    actor=PANEL, slug=one.slug, model=model, shipped=True, note="Shipped with rigpanel.", **values
                )
                changed += 1
            elif profile.shipped and profile.archived_at is None:
                before = profile.current.number, *(getattr(profile, name) for name in PROFILE_FIELDS)
                updated = profile_update(profile, actor=PANEL, note="Updated with rigpanel.", model=model, **values)
                Profile.objects.filter(pk=profile.pk).update(shipped=True)
                changed += before != (updated.current.number, *(getattr(updated, name) for name in PROFILE_FIELDS))
    return changed


def _version_make(profile: Profile, number: int, version: Mapping[str, Any], actor: Actor, note: str) -> ProfileVersion:
    return ProfileVersion.objects.create(
        profile=profile, number=number, created_by_name=actor.name[:200], note=note.strip(), **version
    )


def _told(version: ProfileVersion) -> dict[str, Any]:
    """For the audit: plain values."""
    return {name: getattr(version, name) for name in VERSION_FIELDS if name != "model"} | {"model": version.model.slug}
