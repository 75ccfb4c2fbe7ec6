"""Making people, keys and links. Every change leaves an audit entry and raises the *keys* epoch."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from datetime import datetime, timedelta
from ipaddress import ip_network

from allauth.account.models import EmailAddress
from allauth.mfa.models import Authenticator
from django.contrib.auth.tokens import default_token_generator
from django.core.exceptions import ValidationError
from django.core.validators import validate_email
from django.db import IntegrityError, transaction
from django.db.models import Q
from django.utils import timezone
from django.utils.encoding import force_bytes
from django.utils.http import urlsafe_base64_encode

from apps.accounts.models import ApiKey, Invitation, User
from apps.accounts.signals import key_rotated
from apps.accounts.tokens import KEYS_EPOCH, token_digest
from apps.audit.services import record
from apps.common.actors import PANEL, Actor, actor_of
from apps.common.errors import Conflict, Invalid, NotAllowed
from apps.common.models import Epoch
from apps.common.roles import Role

INVITATION_DAYS = 7
LIMITS_MAX = 50
LIFE_MAX = timedelta(days=36525)  # calculating with times ends at the year 9999
LIFE_TOLD = "Give a time within 100 years, or none."
ROTATION_OVERLAP = timedelta(hours=24)
ROTATION_OVERLAP_MAX = timedelta(days=30)


def user_create(*, email: str, password: str | None, role: Role, name: str = "", actor: Actor) -> User:
    """Raises Conflict when the address is taken."""
    with transaction.atomic():
        if User.objects.filter(email=email.lower()).exists():
            raise Conflict(f"There is already an account for {email}.", code="email_taken")
        user = User.objects.create_user(email, password, role=role, name=name)
        # Sign-in elsewhere takes the address from here; whoever invited has vouched for it.
        EmailAddress.objects.create(user=user, email=user.email, verified=True, primary=True)
        record(actor, "user.create", "user", str(user.public_id), user.email, {"role": role})
        Epoch.bump(KEYS_EPOCH)  # somebody whom Open WebUI may name
    return user


def user_update(
    user: User, *, actor: Actor, role: Role | None = None, is_active: bool | None = None, name: str | None = None
) -> User:
    """Change somebody's role, name or access. The last active owner stays one."""
    with transaction.atomic():
        # All owners are locked in one order: two who demote each other at once must not leave none.
        list(User.objects.select_for_update(no_key=True).filter(Q(role=Role.OWNER) | Q(pk=user.pk)).order_by("pk"))
        user = User.objects.get(pk=user.pk)
        changes: dict[str, object] = {}
        if role is not None and role != user.role:
            changes["role"] = [user.role, str(role)]
            user.role = role
        if is_active is not None and is_active != user.is_active:
            changes["is_active"] = [user.is_active, is_active]
            user.is_active = is_active
        if name is not None and name != user.name:
            changes["name"] = [user.name, name]
            user.name = name
        others = User.objects.filter(role=Role.OWNER, is_active=True).exclude(pk=user.pk)
        steps_down = not user.is_active or user.role != Role.OWNER
        if {"role", "is_active"} & changes.keys() and steps_down and not others.exists():
            raise Conflict(
                "The team needs at least one active owner; make somebody else owner first.", code="last_owner"
            )
        if changes:
            user.save(update_fields=["role", "is_active", "name"])
            record(actor, "user.update", "user", str(user.public_id), user.email, changes)
            Epoch.bump(KEYS_EPOCH)
    return user


def password_set(user: User, password: str, *, actor: Actor) -> None:
    """Every session of the person ends: sessions carry a hash of the password they began with."""
    with transaction.atomic():
        user.set_password(password)
        user.save(update_fields=["password"])
        record(actor, "user.password", "user", str(user.public_id), user.email)


def second_factor_remove(user: User, *, actor: Actor) -> None:
    """For somebody who lost phone and recovery codes. Raises Conflict when there is none."""
    with transaction.atomic():
        gone, _ = Authenticator.objects.filter(user=user).delete()
        if not gone:
            raise Conflict(f"{user.display_name} has no second factor.", code="no_second_factor")
        record(actor, "user.second_factor_remove", "user", str(user.public_id), user.email)


def key_create(
    user: User,
    *,
    name: str,
    actor: Actor,
    expires_at: datetime | None = None,
    allowed_models: Sequence[str] = (),
    allowed_networks: Sequence[str] = (),
    names_people: bool = False,
) -> tuple[ApiKey, str]:
    """Returns the row and the key itself, which is not kept and cannot be shown again.

    A key that names people stands for everybody behind Open WebUI, so only an owner may have one."""
    name = name.strip()
    if not name:
        raise Invalid(
            "A key needs a name, so that you know later where it is used.", fields={"name": ["Give it a name."]}
        )
    if not user.has_role(Role.MEMBER):
        raise Invalid("Viewers have no keys; ask an owner for the role member.", code="viewer_has_no_keys")
    if expires_at is not None and expires_at <= timezone.now():
        raise Invalid("That time has passed.", fields={"expires_at": ["Give a time to come."]})
    if expires_at is not None and expires_at - timezone.now() > LIFE_MAX:
        raise Invalid("That is too far away.", fields={"expires_at": [LIFE_TOLD]})
    if names_people and not user.has_role(Role.OWNER):
        raise NotAllowed("A key of Open WebUI's speaks for everybody on the team; only an owner may have one.")
    token = f"rp-{secrets.token_urlsafe(32)}"
    with transaction.atomic():
        key = ApiKey.objects.create(
            user=user,
            name=name[:80],
            prefix=token[:9],
            digest=token_digest(token),
            expires_at=expires_at,
            allowed_models=_names(allowed_models),
            allowed_networks=_networks(allowed_networks),
            names_people=names_people,
        )
        limits = {n: v for n, v in (("models", key.allowed_models), ("networks", key.allowed_networks)) if v}
        if names_people:
            limits["names_people"] = True
        record(actor, "key.create", "key", key.pk, str(key), {"user": user.email, **limits})
        Epoch.bump(KEYS_EPOCH)
    return key, token


def _names(given: Sequence[str]) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in given if name.strip()))
    if len(names) > LIMITS_MAX or any(len(name) > 200 for name in names):
        raise Invalid("That are too many or too long names.", fields={"models": ["At most 50 names of models."]})
    return names


def _networks(given: Sequence[str]) -> list[str]:
    """As networks in their usual form: ``192.168.1.0/24``, ``10.0.0.7/32``."""
    networks = []
    for text in given:
        if not text.strip():
            continue
        try:
            networks.append(str(ip_network(text.strip(), strict=False)))
        except ValueError:
            raise Invalid(
                f"{text.strip()!r} is not an address or a network.",
                fields={"networks": ["Write them like 192.168.1.0/24 or 10.0.0.7."]},
            ) from None
    if len(networks) > LIMITS_MAX:
        raise Invalid("That are too many networks.", fields={"networks": ["At most 50 networks."]})
    return list(dict.fromkeys(networks))


def key_rotate(key: ApiKey, *, actor: Actor, overlap: timedelta = ROTATION_OVERLAP) -> tuple[ApiKey, str]:
    """A new key with the same name and limits; the old one goes on for ``overlap``, so that nothing stops meanwhile.

    Returns the new row and the key itself. Raises Conflict for a key that is not valid any more."""
    if not timedelta(0) <= overlap <= ROTATION_OVERLAP_MAX:
        raise Invalid("The old key may go on for 30 days at most.", fields={"overlap_hours": ["From 0 to 720."]})
    with transaction.atomic():
        key = ApiKey.objects.select_for_update(no_key=True).select_related("user").get(pk=key.pk)
        if not key.is_valid():
            raise Conflict("This key is not valid any more; make a new one instead.", code="key_ended")
        # One with an expiry gets as long a life again as it had.
        life = None if key.expires_at is None else key.expires_at - key.created_at
        new, token = key_create(
            key.user,
            name=key.name,
            actor=actor,
            expires_at=None if life is None else timezone.now() + life,
            allowed_models=key.allowed_models,
            allowed_networks=key.allowed_networks,
            names_people=key.names_people,
        )
        ends_at = timezone.now() + overlap
        if key.expires_at is None or ends_at < key.expires_at:
            key.expires_at = ends_at
            key.save(update_fields=["expires_at"])
        record(actor, "key.rotate", "key", key.pk, str(key), {"user": key.user.email, "new": new.pk})
        key_rotated.send(sender=ApiKey, old=key, new=new, actor=actor)
        Epoch.bump(KEYS_EPOCH)
    return new, token


def key_revoke(key: ApiKey, *, actor: Actor) -> None:
    with transaction.atomic():
        if ApiKey.objects.filter(pk=key.pk, revoked_at=None).update(revoked_at=timezone.now()):
            record(actor, "key.revoke", "key", key.pk, str(key), {"user": key.user.email})
            Epoch.bump(KEYS_EPOCH)


def key_lookup(token: str) -> ApiKey | None:
    """The valid key of an active person, or None."""
    if not token.startswith("rp-") or len(token) > 200:
        return None
    key = ApiKey.objects.select_related("user").filter(digest=token_digest(token)).first()
    return key if key and key.is_valid() and key.user.has_role(Role.MEMBER) else None


def key_owner(token: str) -> User | None:
    """Whose key this is; remembers that it was used. Raises NotAllowed for one that is for the gateway alone."""
    key = key_lookup(token)
    if key is None:
        return None
    if key.is_limited:
        raise NotAllowed("This key is limited, so it is for the gateway alone; use another for the panel's API.")
    key_used(key)
    return key.user


def key_used(key: ApiKey, every: timedelta = timedelta(minutes=1)) -> None:
    """Remember when a key was last used, to the minute: a write per request would cost more than it tells."""
    now = timezone.now()
    if key.last_used_at is None or key.last_used_at < now - every:
        ApiKey.objects.filter(pk=key.pk).update(last_used_at=now)


def invitation_create(
    *, role: Role, email: str = "", actor: Actor, kind: str = Invitation.Kind.INVITE, days: int = INVITATION_DAYS
) -> tuple[Invitation, str]:
    """Returns the row and the link's path with its token, which is shown once. Raises Invalid for what is not
    an address, Conflict for one that has an account."""
    email = email.strip().lower()
    if email:
        try:
            validate_email(email)
        except ValidationError:
            raise Invalid(
                f"{email!r} is not an email address.", fields={"email": ["Write it like ann@example.org."]}
            ) from None
        if User.objects.filter(email=email).exists():
            raise Conflict(f"There is already an account for {email}.", code="email_taken")
    token = secrets.token_urlsafe(32)
    with transaction.atomic():
        invitation = Invitation.objects.create(
            kind=kind,
            email=email,
            role=role,
            digest=token_digest(token),
            invited_by_id=actor.user_pk,
            invited_by_name=actor.name,
            expires_at=timezone.now() + timedelta(days=days),
        )
        record(
            actor, "invitation.create", "invitation", invitation.pk, email or "anybody", {"role": role, "kind": kind}
        )
    return invitation, f"/join/{token}/"


def invitation_open(token: str) -> Invitation | None:
    invitation = Invitation.objects.filter(digest=token_digest(token)).first()
    return invitation if invitation and invitation.is_open() else None


def invitation_accept(token: str, *, email: str, password: str, name: str = "") -> User:
    """Make the account. The conditional UPDATE decides between two people with one link."""
    invitation = invitation_open(token)
    if invitation is None:
        raise Invalid(
            "This link was used already, was withdrawn, or has expired; ask for a new one.", code="link_spent"
        )
    if invitation.email and invitation.email != email.strip().lower():
        raise Invalid(f"This link is for {invitation.email}.", fields={"email": [f"Use {invitation.email}."]})
    with transaction.atomic():
        claimed = Invitation.objects.filter(pk=invitation.pk, accepted_at=None, revoked_at=None).update(
            accepted_at=timezone.now()
        )
        if claimed != 1:
            raise Invalid("Somebody just used this link; ask for a new one.", code="link_spent")
        try:
            user = user_create(email=email, password=password, role=Role(invitation.role), name=name, actor=PANEL)
        except IntegrityError:
            raise Conflict(f"There is already an account for {email}.", code="email_taken") from None
        Invitation.objects.filter(pk=invitation.pk).update(accepted_by=user)
        record(actor_of(user), "invitation.accept", "invitation", invitation.pk, user.email)
    return user


def invitation_revoke(invitation: Invitation, *, actor: Actor) -> None:
    with transaction.atomic():
        if Invitation.objects.filter(pk=invitation.pk, accepted_at=None, revoked_at=None).update(
            revoked_at=timezone.now()
        ):
            record(actor, "invitation.revoke", "invitation", invitation.pk, invitation.email)


def reset_path(user: User, *, actor: Actor) -> str:
    """A single-use link's path to set a new password; valid for PASSWORD_RESET_TIMEOUT. Raises Conflict
    for a deactivated person."""
    if not user.is_active:
        raise Conflict(f"{user.email} is deactivated; reactivate the account first.", code="deactivated")
    record(actor, "user.reset_link", "user", str(user.public_id), user.email)
    uid = urlsafe_base64_encode(force_bytes(user.pk))
    return f"/reset/{uid}/{default_token_generator.make_token(user)}/"


def setup_link_path() -> str | None:
    """A fresh one-time link for the first owner, or None when there is one already. Earlier links end."""
    with transaction.atomic():
        if User.objects.filter(role=Role.OWNER, is_active=True).exists():
            return None
        Invitation.objects.filter(kind=Invitation.Kind.SETUP, accepted_at=None, revoked_at=None).update(
            revoked_at=timezone.now()
        )
        _, path = invitation_create(role=Role.OWNER, actor=PANEL, kind=Invitation.Kind.SETUP, days=1)
    return path
