"""Aliases in the API."""

from __future__ import annotations

from django.db.models import QuerySet
from django.http import HttpRequest
from ninja import Router, Schema
from ninja.pagination import paginate
from pydantic import Field

from apps.common.actors import actor_of
from apps.common.api import Paged, needs
from apps.common.roles import Role
from apps.gateway import aliases
from apps.gateway.models import Alias

router = Router(tags=["serving"])


class AliasOut(Schema):
    """``profile`` is a slug; null: whatever serves."""

    name: str
    profile: str | None = Field(None, alias="profile.slug")


class AliasIn(Schema):
    profile: str | None = Field(None, max_length=100, description="A slug. null: whatever serves.")


@router.get("/aliases", response=list[AliasOut], auth=needs(Role.VIEWER), summary="Names that stay")
@paginate(Paged)
def list_aliases(request: HttpRequest) -> QuerySet[Alias]:
    return aliases.alias_list()


@router.put("/aliases/{path:name}", response=AliasOut, auth=needs(Role.OPERATOR), summary="Make or change an alias")
def put_alias(request: HttpRequest, name: str, data: AliasIn) -> Alias:
    """Requests for the name go to what the profile serves."""
    return aliases.alias_set(name=name, profile=data.profile or "", actor=actor_of(request.user))


@router.delete("/aliases/{path:name}", response={204: None}, auth=needs(Role.OPERATOR), summary="Remove an alias")
def delete_alias(request: HttpRequest, name: str) -> None:
    aliases.alias_delete(aliases.alias_get(name), actor=actor_of(request.user))
