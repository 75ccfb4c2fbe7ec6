"""The catalogue in the API."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Optional

from django.db.models import QuerySet
from django.http import HttpRequest
from ninja import Router, Schema
from ninja.pagination import paginate
from pydantic import ConfigDict, Field, create_model

from apps.catalog.models import Model, Weights
from apps.catalog.schema import ModelFacts
from apps.catalog.selectors import model_get, model_list
from apps.catalog.services import model_create, model_delete, model_update
from apps.catalog.weights.disk import disk_report
from apps.catalog.weights.services import download_request, register_here, removal_request
from apps.common.actors import actor_of
from apps.common.api import Paged, needs
from apps.common.roles import Role
from apps.jobs.api import JobOut, WaitSeconds
from apps.jobs.models import Job
from apps.jobs.waiting import wait_for
from apps.rigs.selectors import rig_get

router = Router(tags=["models"])

# Every fact may be left out of a change. What is sent is checked by the service, together with the facts that stay.
_facts: dict[str, Any] = {
    name: (Optional[field.annotation], None)  # noqa: UP045 - built at run time
    for name, field in ModelFacts.model_fields.items()
    if name != "slug"
}
ModelPatch: Any = create_model("ModelPatch", __config__=ConfigDict(extra="forbid"), **_facts)


class WeightsOut(Schema):
    """``repo`` and ``revision`` (a commit) are empty for weights that the panel did not download."""

    rig: str
    path: str
    size_bytes: int | None
    kind: str
    quantization: str
    repo: str
    revision: str

    @staticmethod
    def resolve_rig(weights: Any) -> str:
        return str(weights.rig_name)


class DownloadIn(Schema):
    """``repo``: another than the model's own. ``revision``: branch, tag or commit. ``quantization``: of a GGUF.
    ``wait_s``: answer when the job has ended, or after so many seconds."""

    repo: str = ""
    revision: str = ""
    quantization: str = ""
    rig: str | None = None
    reason: str = Field(default="", max_length=500)
    wait_s: WaitSeconds = 0


class WeightsIn(Schema):
    """A folder or .gguf file on the machine that the panel's pages run on."""

    path: str


class PlaceIn(Schema):
    place: str
    reason: str = Field(default="", max_length=500)


class PlaceOut(Schema):
    """One thing in the models folder. ``models`` are served from it (``model`` is the first); ``used_by``: what runs
    from it now, or waits to."""

    place: str
    path: str
    size_bytes: int
    files: int
    unfinished: bool
    model: str | None
    models: list[str]
    profiles: list[str]
    used_by: list[str]


class DiskOut(Schema):
    folder: str
    total_bytes: int
    free_bytes: int
    places: list[PlaceOut]


class ModelOut(Schema):
    """Facts with their ``sources``; null or empty where nobody could source one."""

    id: int
    slug: str
    name: str
    hf_repo: str
    checkpoint: str
    checkpoint_note: str
    architecture: str
    licence: str
    params_total: int | None
    params_active: int | None
    layers: int | None
    hidden_size: int | None
    attention_heads: int | None
    kv_heads: int | None
    head_dim: int | None
    intermediate_size: int | None
    vocab_size: int | None
    experts: int | None
    experts_per_token: int | None
    max_context_tokens: int | None
    attention_type: str
    kv: dict[str, Any]
    quantization: str
    weights_bytes: int | None
    weights_formula: str
    tool_parser: str
    reasoning_parser: str
    chat_template: str
    sources: list[str]
    notes: list[str]
    shipped: bool
    created_at: datetime
    weights: list[WeightsOut]

    @staticmethod
    def resolve_weights(model: Model) -> list[Any]:
        return list(model.weights.all())


@router.get("/models", response=list[ModelOut], auth=needs(Role.VIEWER), summary="List models")
@paginate(Paged)
def list_models(request: HttpRequest, q: str = "") -> QuerySet[Model]:
    return model_list(q).prefetch_related("weights")


@router.post("/models", response={201: ModelOut}, auth=needs(Role.OPERATOR), summary="Add a model")
def create_model_entry(request: HttpRequest, data: ModelFacts) -> Model:
    return model_create(actor=actor_of(request.user), **data.model_dump())


@router.get("/models/{model}", response=ModelOut, auth=needs(Role.VIEWER), summary="One model")
def get_model(request: HttpRequest, model: str) -> Model:
    return model_get(model)


@router.patch("/models/{model}", response=ModelOut, auth=needs(Role.OPERATOR), summary="Change some facts")
def update_model(request: HttpRequest, model: str, data: ModelPatch) -> Model:
    """A shipped model becomes the team's own: updates of rigpanel leave it alone from then on."""
    return model_update(model_get(model), actor=actor_of(request.user), **data.model_dump(exclude_unset=True))


@router.delete("/models/{model}", response={204: None}, auth=needs(Role.OPERATOR), summary="Remove a model")
def delete_model(request: HttpRequest, model: str) -> None:
    """409 for a shipped model and for one that a profile uses."""
    model_delete(model_get(model), actor=actor_of(request.user))


@router.post("/models/{model}/download", response={202: JobOut}, auth=needs(Role.OPERATOR), summary="Download weights")
def download_model(request: HttpRequest, model: str, data: DownloadIn | None = None) -> Job:
    """The same request again answers with the job under way. What an earlier one left is carried on."""
    data = data or DownloadIn()
    values = data.model_dump(exclude={"rig", "wait_s"})
    rig = rig_get(data.rig) if data.rig else None
    job = download_request(model_get(model), actor=actor_of(request.user), rig=rig, **values)
    return wait_for(job, limit_seconds=data.wait_s)


@router.post(
    "/models/{model}/weights", response={201: WeightsOut}, auth=needs(Role.OPERATOR), summary="Register weights"
)
def register_weights(request: HttpRequest, model: str, data: WeightsIn) -> Weights:
    """422 with what is wrong when no engine could load them."""
    return register_here(model_get(model), path=data.path, actor=actor_of(request.user))


@router.get("/weights", response=DiskOut, auth=needs(Role.VIEWER), summary="What lies in the models folder")
def list_weights(request: HttpRequest) -> dict[str, Any]:
    """Of the machine that the panel's pages run on."""
    disk = disk_report()
    return {
        "folder": disk.folder,
        "total_bytes": disk.total_bytes,
        "free_bytes": disk.free_bytes,
        "places": [
            {
                "place": p.name,
                "path": str(p.path),
                "size_bytes": p.size_bytes,
                "files": p.files,
                "unfinished": p.unfinished,
                "model": p.weights[0].model.slug if p.weights else None,
                "models": [w.model.slug for w in p.weights],
                "profiles": [u.label for u in p.profiles],
                "used_by": [u.label for u in p.running],
            }
            for p in disk.places
        ],
    }


@router.post(
    "/weights/delete", response={202: JobOut}, auth=needs(Role.OPERATOR), summary="Delete weights from the disk"
)
def delete_weights(request: HttpRequest, data: PlaceIn) -> Job:
    """409 while something runs from there."""
    return removal_request(data.place, actor=actor_of(request.user), reason=data.reason)
