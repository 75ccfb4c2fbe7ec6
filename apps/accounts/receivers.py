"""What allauth's own pages change is recorded too."""

from __future__ import annotations

from typing import Any

from allauth.account.signals import password_changed
from allauth.mfa.models import Authenticator
from allauth.mfa.signals import authenticator_removed, authenticator_reset
from django.db.models.signals import post_save
from django.dispatch import receiver

from apps.accounts.models import User
from apps.audit.services import record
from apps.common.actors import actor_of


def _record(user: User, action: str, **detail: Any) -> None:
    record(actor_of(user), action, "user", str(user.public_id), user.email, detail)


@receiver(password_changed, dispatch_uid="audit-password")
def on_password_changed(sender: Any, user: User, **_: Any) -> None:
    _record(user, "user.password")


@receiver(post_save, sender=Authenticator, dispatch_uid="audit-factor-added")
def on_factor_added(sender: Any, instance: Authenticator, created: bool, **_: Any) -> None:
    """The row's own signal: allauth sends its own only after commit, when the record could be lost."""
    if created:
        _record(instance.user, "user.second_factor_add", kind=str(instance.type))


@receiver(authenticator_removed, dispatch_uid="audit-factor-removed")
def on_factor_removed(sender: Any, user: User, authenticator: Any, **_: Any) -> None:
    _record(user, "user.second_factor_remove", kind=str(authenticator.type))


@receiver(authenticator_reset, dispatch_uid="audit-factor-reset")
def on_factor_reset(sender: Any, user: User, authenticator: Any, **_: Any) -> None:
    _record(user, "user.second_factor_reset", kind=str(authenticator.type))
