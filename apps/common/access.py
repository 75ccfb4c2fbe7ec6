"""Who may open a page: one decorator, read by the route-by-role matrix test too."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from django.contrib.auth.views import redirect_to_login
from django.http import HttpRequest, HttpResponseBase

from apps.common.errors import NotAllowed
from apps.common.roles import Role

ROLE_ATTRIBUTE = "required_role"
View = Callable[..., HttpResponseBase]


def role_of(user: Any) -> Role | None:
    """The role of a signed-in, active user; None for strangers."""
    if not getattr(user, "is_authenticated", False) or not user.is_active:
        return None
    return Role(user.role)


def covers(user: Any, needed: Role) -> bool:
    """Whether ``user`` is signed in, active, and has ``needed`` or more."""
    role = role_of(user)
    return role is not None and role.covers(needed)


def require(user: Any, needed: Role, what: str = "do this") -> None:
    """Raise NotAllowed unless ``user`` has ``needed`` or more."""
    role = role_of(user)
    if role is None or not role.covers(needed):
        raise NotAllowed(
            f"Your role ({role.label.lower() if role else 'none'}) may not {what}; it needs {needed.label.lower()}."
        )


def role_required(needed: Role) -> Callable[[View], View]:
    """A view for people with ``needed`` or more: strangers go to sign-in, others get 403 with a sentence."""

    def decorate(view: View) -> View:
        @wraps(view)
        def guarded(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponseBase:
            role = role_of(request.user)
            if role is None:
                return redirect_to_login(request.get_full_path())
            if not role.covers(needed):
                raise NotAllowed(f"This needs the role {needed.label.lower()}; yours is {role.label.lower()}.")
            return view(request, *args, **kwargs)

        setattr(guarded, ROLE_ATTRIBUTE, needed)
        return guarded

    return decorate


def public(view: View) -> View:
    """Marks a view as open to everybody, on purpose."""
    setattr(view, ROLE_ATTRIBUTE, None)
    return view
