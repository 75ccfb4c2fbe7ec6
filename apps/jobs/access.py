"""Who may act on a job; pages and API both ask here."""

from __future__ import annotations

from typing import Any

from apps.common.access import role_of
from apps.common.errors import NotAllowed
from apps.common.roles import Role
from apps.jobs.models import Job


def may_cancel(user: Any, job: Job) -> bool:
    """Members cancel what they started themselves, operators anything."""
    role = role_of(user)
    if role is None:
        return False
    return role.covers(Role.OPERATOR) or (role.covers(Role.MEMBER) and job.user_id == user.pk)


def cancel_allowed(user: Any, job: Job) -> None:
    """Raises NotAllowed."""
    if not may_cancel(user, job):
        raise NotAllowed(f"Job {job.pk} was started by {job.user_name}; only they or an operator may cancel it.")
