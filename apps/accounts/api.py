"""People and keys in the API."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any, Literal
from uuid import UUID

from django.db.models import QuerySet
from django.http import HttpRequest
from ninja import Router, Schema
from ninja.pagination import paginate
from pydantic import Field

from apps.accounts import services
from apps.accounts.links import absolute
from apps.accounts.models import ApiKey, User
from apps.accounts.selectors import key_get, key_list, user_get, user_list
from apps.accounts.tokens import people_secret
from apps.common.actors import actor_of
from apps.common.api import Paged, needs
from apps.common.roles import Role

router = Router(tags=["people"])
RoleName = Literal["viewer", "member", "operator", "owner"]


class MemberOut(Schema):
    """``email``, ``is_active`` and ``created_at`` are null for callers who are not owners."""

    id: UUID
    name: str
    role: RoleName
    email: str | None
    is_active: bool | None
    created_at: datetime | None


class InviteIn(Schema):
    email: str = Field(default="", max_length=254, description="Empty: whoever has the link may join with any address.")
    role: RoleName = "member"


class InvitationOut(Schema):
    """``link`` is shown only in this answer."""

    id: int
    email: str
    role: RoleName
    expires_at: datetime
    link: str


class MemberPatch(Schema):
    role: RoleName | None = None
    is_active: bool | None = None
    name: str | None = Field(default=None, max_length=120)


class KeyOut(Schema):
    id: int
    name: str
    prefix: str
    created_at: datetime
    last_used_at: datetime | None
    expires_at: datetime | None
    revoked_at: datetime | None
    models: list[str] = Field(alias="allowed_models")
    networks: list[str] = Field(alias="allowed_networks")
    names_people: bool


class KeyIn(Schema):
    name: str = Field(max_length=80)
    expires_at: datetime | None = None
    models: list[str] = Field(default=[], description="Served names or aliases; empty: all.")
    networks: list[str] = Field(
        default=[], description="Where requests may come from, as 192.168.1.0/24; empty: anywhere."
    )
    names_people: bool = Field(
        default=False, description="Open WebUI's own: its signed header says who asks. Owners only."
    )


class RotateIn(Schema):
    overlap_hours: float = Field(default=24, ge=0, le=720, description="How long the old key goes on.")


class NewKeyOut(KeyOut):
    """``key`` and ``people_secret`` are shown only in this answer. The latter is what Open WebUI needs as
    ``FORWARD_USER_INFO_HEADER_JWT_SECRET``; empty for a key that names nobody."""

    key: str
    people_secret: str


def member_out(user: User, *, to_owner: bool) -> dict[str, Any]:
    return {
        "id": user.public_id,
        "name": user.display_name,
        "role": user.role,
        "email": user.email if to_owner else None,
        "is_active": user.is_active if to_owner else None,
        "created_at": user.created_at if to_owner else None,
    }


class PagedMembers(Paged):
    """Owners see everybody, others those who are active, by name."""

    def paginate_queryset(self, queryset: Any, pagination: Any, request: HttpRequest, **params: Any) -> Any:
        owns = request.user.has_role(Role.OWNER)  # type: ignore[union-attr]
        page = super().paginate_queryset(queryset, pagination, request, **params)
        return {**page, "items": [member_out(user, to_owner=owns) for user in page["items"]]}


@router.get("/members", response=list[MemberOut], auth=needs(Role.VIEWER), summary="Who shares the rig")
@paginate(PagedMembers)
def list_members(request: HttpRequest) -> QuerySet[User]:
    people = user_list()
    return people if request.user.has_role(Role.OWNER) else people.filter(is_active=True)  # type: ignore[union-attr]


@router.post("/members", response={201: InvitationOut}, auth=needs(Role.OWNER), summary="Invite somebody")
def invite_member(request: HttpRequest, data: InviteIn | None = None) -> dict[str, Any]:
    data = data or InviteIn()
    invitation, path = services.invitation_create(role=Role(data.role), email=data.email, actor=actor_of(request.user))
    return {
        "id": invitation.pk,
        "email": invitation.email,
        "role": invitation.role,
        "expires_at": invitation.expires_at,
        "link": absolute(path),
    }


@router.patch("/members/{member}", response=MemberOut, auth=needs(Role.OWNER), summary="Change role, name or access")
def update_member(request: HttpRequest, member: str, data: MemberPatch) -> dict[str, Any]:
    """Deactivating ends the person's sessions and keys at once."""
    user = services.user_update(
        user_get(member),
        actor=actor_of(request.user),
        role=Role(data.role) if data.role else None,
        is_active=data.is_active,
        name=data.name,
    )
    return member_out(user, to_owner=True)


@router.get("/keys", response=list[KeyOut], auth=needs(Role.MEMBER), summary="Your own keys")
@paginate(Paged)
def list_keys(request: HttpRequest) -> QuerySet[ApiKey]:
    return key_list(request.user)  # type: ignore[arg-type]


def _new_key(key: ApiKey, token: str) -> dict[str, Any]:
    secret = people_secret(key.digest) if key.names_people else ""
    return {**KeyOut.from_orm(key).dict(by_alias=True), "key": token, "people_secret": secret}


@router.post("/keys", response={201: NewKeyOut}, auth=needs(Role.MEMBER), summary="Make a key")
def create_key(request: HttpRequest, data: KeyIn) -> dict[str, Any]:
    return _new_key(
        *services.key_create(
            request.user,  # type: ignore[arg-type]
            name=data.name,
            actor=actor_of(request.user),
            expires_at=data.expires_at,
            allowed_models=data.models,
            allowed_networks=data.networks,
            names_people=data.names_people,
        )
    )


@router.post("/keys/{int:key}/rotate", response={201: NewKeyOut}, auth=needs(Role.MEMBER), summary="Replace a key")
def rotate_key(request: HttpRequest, key: int, data: RotateIn | None = None) -> dict[str, Any]:
    """A new key with the same limits; the old one goes on for a while."""
    data = data or RotateIn()
    return _new_key(
        *services.key_rotate(
            key_get(request.user, key),  # type: ignore[arg-type]
            actor=actor_of(request.user),
            overlap=timedelta(hours=data.overlap_hours),
        )
    )


@router.delete("/keys/{int:key}", response={204: None}, auth=needs(Role.MEMBER), summary="Revoke a key of yours")
def revoke_key(request: HttpRequest, key: int) -> None:
    services.key_revoke(key_get(request.user, key), actor=actor_of(request.user))  # type: ignore[arg-type]
