"""On a profile's page: whose requests may load it. ``{% load loading %}{% loading_policy profile %}``."""

from __future__ import annotations

from typing import Any

from django import template

from apps.common.access import covers
from apps.common.roles import Role
from apps.deployments.policies.decide import least_role
from apps.deployments.policies.models import LoadBy
from apps.deployments.policies.selectors import loading_of
from apps.profiles.models import Profile

register = template.Library()


@register.inclusion_tag("deployments/partials/loading.html", takes_context=True)
def loading_policy(context: template.Context, profile: Profile) -> dict[str, Any]:
    request = context["request"]
    by = loading_of(profile).by
    return {
        "profile": profile,
        "by": by,
        "least_role": least_role(by, profile.members_may_switch),
        "choices": LoadBy.choices,
        "may_change": covers(request.user, Role.OPERATOR) and profile.archived_at is None,
        "csrf_token": context.get("csrf_token"),
    }
