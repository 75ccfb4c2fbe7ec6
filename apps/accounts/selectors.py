"""Reads of people, their keys and open invitations."""

from __future__ import annotations

import uuid
from typing import Any

from allauth.mfa.models import Authenticator
from allauth.mfa.utils import is_mfa_enabled
from django.contrib.auth.tokens import default_token_generator
from django.db.models import F, QuerySet
from django.utils import timezone
from django.utils.http import urlsafe_base64_decode

from apps.accounts.models import ApiKey, Invitation, User
from apps.common.errors import NotFound


def user_list() -> QuerySet[User]:
    return User.objects.order_by("-is_active", "name", "email")


def user_get(reference: str | int) -> User:
    """By id, public id or address. Raises NotFound."""
    text = str(reference)
    found: User | None = None
    if text.isdecimal() and len(text) < 19:
        found = User.objects.filter(pk=int(text)).first()
    elif "@" in text:
        found = User.objects.filter(email=text.lower()).first()
    else:
        try:
            found = User.objects.filter(public_id=uuid.UUID(text)).first()
        except ValueError:
            found = None
    if found is None:
        raise NotFound(f"There is nobody {text!r} on the team.")
    return found


def key_list(user: User) -> QuerySet[ApiKey]:
    """Somebody's keys, the revoked ones too, last: they explain old log lines."""
    return user.api_keys.order_by(F("revoked_at").desc(nulls_first=True), "-created_at")


def key_get(user: User, pk: int) -> ApiKey:
    """One of ``user``'s own keys; other people's do not exist for them. Raises NotFound."""
    key = ApiKey.objects.select_related("user").filter(user=user, pk=pk).first()
    if key is None:
        raise NotFound(f"You have no key {pk}.")
    return key


def invitations_open() -> QuerySet[Invitation]:
    return Invitation.objects.filter(
        kind=Invitation.Kind.INVITE, accepted_at=None, revoked_at=None, expires_at__gt=timezone.now()
    ).order_by("-created_at")


def invitation_get(pk: int) -> Invitation:
    """Raises NotFound."""
    invitation = Invitation.objects.filter(pk=pk, kind=Invitation.Kind.INVITE).first()
    if invitation is None:
        raise NotFound(f"There is no invitation {pk}.")
    return invitation


def reset_user(uid: str, token: str) -> User | None:
    """Whom a reset link is for, or None when it was used, has expired or was never ours."""
    try:
        pk = int(urlsafe_base64_decode(uid).decode())
    except ValueError:  # UnicodeDecodeError and binascii.Error are ValueErrors too
        return None
    user = User.objects.filter(pk=pk, is_active=True).first() if 0 < pk < 2**63 else None
    return user if user is not None and default_token_generator.check_token(user, token) else None


def has_second_factor(user: Any) -> bool:
    return bool(is_mfa_enabled(user))


def with_second_factor() -> set[int]:
    """The ids of everybody who has one."""
    return set(Authenticator.objects.values_list("user_id", flat=True))
