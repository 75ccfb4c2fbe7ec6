"""Profiles and their versions in the API. Planning is in ``deployments``, which knows what runs."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse
from ninja import Router, Schema
from ninja.pagination import paginate
from pydantic import ConfigDict, Field

from apps.catalog.selectors import model_get
from apps.common.actors import actor_of
from apps.common.api import Paged, needs
from apps.common.errors import Invalid
from apps.common.roles import Role
from apps.profiles.models import Profile, ProfileVersion
from apps.profiles.recipes.export import export
from apps.profiles.recipes.matching import reading_dict
from apps.profiles.recipes.reading import read_recipe
from apps.profiles.recipes.result import RecipeError
from apps.profiles.selectors import newest, profile_get, profile_list
from apps.profiles.services import profile_archive, profile_create, profile_update
from apps.rigs.selectors import rig_default

router = Router(tags=["profiles"])
EngineName = Literal["vllm", "ray_serve", "llama_cpp", "simulated"]
DeviceName = Literal["gpu", "cpu"]
CLEARED_BY_NULL = ("power_limit_watts", "engine_version")


class VersionOut(Schema):
    """Never changes. ``model`` is a slug, ``layout`` reads ``TP4``, ``2×TP2`` or ``CPU``."""

    number: int
    model: str
    engine: str
    device: str
    layout: str
    replicas: int
    tensor_parallel_size: int
    pipeline_parallel_size: int
    served_name: str
    options: dict[str, Any]
    power_limit_watts: int | None
    engine_version: str | None
    note: str
    created_by: str
    created_at: datetime

    @staticmethod
    def resolve_model(version: ProfileVersion) -> str:
        return version.model.slug

    @staticmethod
    def resolve_created_by(version: ProfileVersion) -> str:
        return version.created_by_name


class ProfileOut(Schema):
    """``version`` is the newest one, which a switch starts."""

    id: int
    slug: str
    name: str
    description: str
    members_may_switch: bool
    shipped: bool
    archived_at: datetime | None
    created_at: datetime
    version: VersionOut

    @staticmethod
    def resolve_version(profile: Profile) -> ProfileVersion:
        return newest(profile)


class VersionIn(Schema):
    """``model`` is a slug or id. ``served_name`` is the model's slug when empty."""

    model_config = ConfigDict(extra="forbid")

    model: str
    engine: EngineName
    device: DeviceName = "gpu"
    replicas: int = 1
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    served_name: str = ""
    options: dict[str, Any] = Field(default_factory=dict)
    power_limit_watts: int | None = None
    engine_version: str | None = None

    def values(self) -> dict[str, Any]:
        """As the services take it. Raises NotFound for an unknown model."""
        names = VersionIn.model_fields.keys() - {"model"}
        return {name: getattr(self, name) for name in names} | {"model": model_get(self.model)}


class ProfileIn(VersionIn):
    slug: str
    name: str
    description: str = ""
    members_may_switch: bool = False
    note: str = ""


class ProfilePatch(Schema):
    """What is left out stays. ``options`` replaces all of them."""

    model_config = ConfigDict(extra="forbid")

    name: str | None = None
    description: str | None = None
    members_may_switch: bool | None = None
    note: str = ""
    model: str | None = None
    engine: EngineName | None = None
    device: DeviceName | None = None
    replicas: int | None = None
    tensor_parallel_size: int | None = None
    pipeline_parallel_size: int | None = None
    served_name: str | None = None
    options: dict[str, Any] | None = None
    power_limit_watts: int | None = None
    engine_version: str | None = None


@router.get("/profiles", response=list[ProfileOut], auth=needs(Role.VIEWER), summary="List profiles")
@paginate(Paged)
def list_profiles(request: HttpRequest, archived: bool = False) -> QuerySet[Profile]:
    return profile_list(include_archived=archived)


@router.post("/profiles", response={201: ProfileOut}, auth=needs(Role.OPERATOR), summary="Make a profile")
def create_profile(request: HttpRequest, data: ProfileIn) -> Profile:
    words = {name: getattr(data, name) for name in ("slug", "name", "description", "members_may_switch", "note")}
    return profile_create(actor=actor_of(request.user), **words, **data.values())


class RecipeIn(Schema):
    model_config = ConfigDict(extra="forbid")

    text: str = Field(max_length=65536)


class NoteOut(Schema):
    text: str
    sentence: str


class RecipeOut(Schema):
    """``profile`` is what ``POST /profiles`` takes; its ``model`` is empty where the catalogue has none that fits."""

    profile: dict[str, Any]
    understood: list[NoteOut]
    left_out: list[NoteOut]
    not_understood: list[NoteOut]


class RecipesOut(Schema):
    recipes: list[RecipeOut]
    notes: list[NoteOut]


@router.post("/profiles/recipe", response=RecipesOut, auth=needs(Role.OPERATOR), summary="Read a pasted recipe")
def read_a_recipe(request: HttpRequest, data: RecipeIn) -> dict[str, Any]:
    """A command line, compose or llama-swap file as profiles. Nothing is run or stored; secrets are dropped."""
    try:
        return reading_dict(read_recipe(data.text))
    except RecipeError as error:
        raise Invalid(str(error), fields={"text": [str(error)]}) from None


@router.get(
    "/profiles/{profile}/export",
    auth=needs(Role.VIEWER),
    summary="Export a profile",
    openapi_extra={"responses": {200: {"description": "The file", "content": {"text/plain": {}}}}},
)
def export_profile(
    request: HttpRequest, profile: str, format: Literal["yaml", "command", "systemd", "compose"] = "yaml"
) -> HttpResponse:
    """The file itself, as plain text. ``yaml`` is read back without loss by ``POST /profiles/recipe``."""
    name, text = export(profile_get(profile), rig_default(), format)
    response = HttpResponse(text, content_type="text/plain; charset=utf-8")
    response["Content-Disposition"] = f'attachment; filename="{name}"'
    return response


@router.get("/profiles/{profile}", response=ProfileOut, auth=needs(Role.VIEWER), summary="One profile")
def get_profile(request: HttpRequest, profile: str) -> Profile:
    return profile_get(profile)


@router.patch("/profiles/{profile}", response=ProfileOut, auth=needs(Role.OPERATOR), summary="Change a profile")
def update_profile(request: HttpRequest, profile: str, data: ProfilePatch) -> Profile:
    """A change of how it is served makes a new version; what runs goes on with its own."""
    sent = data.dict(exclude_unset=True)
    changes = {name: value for name, value in sent.items() if value is not None or name in CLEARED_BY_NULL}
    if "model" in changes:
        changes["model"] = model_get(changes["model"])
    return profile_update(profile_get(profile), actor=actor_of(request.user), **changes)


@router.delete("/profiles/{profile}", response={204: None}, auth=needs(Role.OPERATOR), summary="Archive a profile")
def archive_profile(request: HttpRequest, profile: str) -> None:
    """It leaves the lists; what ran with it keeps its history."""
    profile_archive(profile_get(profile), actor=actor_of(request.user))


@router.get("/profiles/{profile}/versions", response=list[VersionOut], auth=needs(Role.VIEWER), summary="Its versions")
@paginate(Paged)
def list_versions(request: HttpRequest, profile: str) -> QuerySet[ProfileVersion]:
    return profile_get(profile).versions.select_related("model").order_by("-number")
