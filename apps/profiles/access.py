"""Who may switch to a profile; pages, API and services of higher apps ask here."""

from __future__ import annotations

from typing import Any

from apps.common.access import role_of
from apps.common.roles import Role
from apps.profiles.models import Profile


def may_switch(user: Any, profile: Profile) -> bool:
    """Operators to any profile, members to those marked so."""
    role = role_of(user)
    if role is None or profile.archived_at is not None:
        return False
    return role.covers(Role.OPERATOR) or (role.covers(Role.MEMBER) and profile.members_may_switch)
