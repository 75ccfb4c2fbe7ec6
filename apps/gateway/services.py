"""Changing quotas. Each change leaves an audit entry and raises the *quotas* epoch, which every gateway looks at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from django.db import transaction
from django.utils import timezone

from apps.accounts.models import ApiKey, User
from apps.audit.services import record
from apps.common.actors import Actor
from apps.common.errors import Invalid
from apps.common.models import Epoch
from apps.common.roles import Role
from apps.gateway.models import Quota
from apps.gateway.quotas import FIELDS, QUOTAS_EPOCH

MOST = {"requests_per_minute": 10**6, "concurrent": 10**6}  # the others count tokens
MOST_TOKENS = 10**15
Subject = Role | User | ApiKey


def quota_set(subject: Subject, values: Mapping[str, int | None], *, actor: Actor) -> Quota | None:
    """Set all limits of a role, a person or a key at once; what is missing or None is no limit. Without any limit there
    is no quota, and None comes back. Raises Invalid."""
    wanted = {name: values.get(name) for name in FIELDS}
    wrong = {name: ["A whole number from 0, or nothing."] for name, v in wanted.items() if not _fits(name, v)}
    if "share" not in wrong and wanted["share"] is not None and not 1 <= wanted["share"] <= 100:
        wrong["share"] = ["A whole number from 1 to 100, or nothing."]
    if isinstance(subject, ApiKey) and wanted["share"] is not None:
        wrong["share"] = ["The queue goes by people; a key has no share of its own."]
    if wrong:
        raise Invalid("These are not limits that can be set: " + ", ".join(sorted(wrong)) + ".", fields=wrong)
    identity, kind, reference, name = _identity(subject)
    with transaction.atomic():
        quota = Quota.objects.select_for_update(no_key=True).filter(**identity).first()
        before = {field: getattr(quota, field) for field in FIELDS} if quota else dict.fromkeys(FIELDS)
        changes = {field: [before[field], wanted[field]] for field in FIELDS if before[field] != wanted[field]}
        if not changes:
            return quota
        if all(value is None for value in wanted.values()):
            Quota.objects.filter(**identity).delete()
            quota = None
        else:
            quota, _ = Quota.objects.update_or_create(**identity, defaults={**wanted, "updated_at": timezone.now()})
        record(actor, "quota.set", kind, reference, name, changes)
        Epoch.bump(QUOTAS_EPOCH)
    return quota


def on_key_rotated(old: ApiKey, new: ApiKey, actor: Actor, **_: Any) -> None:
    """The key that takes another's place has its limits, too. Read without a lock: the audit's is held already, and a
    quota that is being set would wait for that."""
    quota = Quota.objects.filter(key=old).first()
    if quota is not None:
        quota_set(new, {field: getattr(quota, field) for field in FIELDS}, actor=actor)


def _fits(name: str, value: object) -> bool:
    if value is None:
        return True
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST.get(name, MOST_TOKENS)


def _identity(subject: Subject) -> tuple[dict[str, Any], str, str, str]:
    if isinstance(subject, User):
        return {"user": subject}, "user", str(subject.public_id), subject.email
    if isinstance(subject, ApiKey):
        return {"key": subject}, "key", str(subject.pk), f"{subject} of {subject.user.email}"
    return {"role": subject.value}, "role", subject.value, subject.label
