"""Asking for weights: to be fetched, registered where they lie, or deleted."""

from __future__ import annotations

import re

from django.conf import settings
from django.db import transaction

from apps.catalog.models import Model, Weights
from apps.catalog.services import weights_register
from apps.catalog.weights.disk import place_get, refuse_if_used
from apps.catalog.weights.inspect import look_at
from apps.common.actors import Actor
from apps.common.errors import Conflict, Invalid, NotFound
from apps.jobs.handlers import JobFailed
from apps.jobs.models import LIVE_STATES, Job
from apps.jobs.services import job_create
from apps.rigs.models import Rig
from apps.rigs.selectors import rig_here

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*\Z")
_REVISION = re.compile(r"[A-Za-z0-9][\w./-]{0,99}\Z")
_QUANTIZATION = re.compile(r"[A-Za-z0-9][\w./-]{0,99}\Z")


def repo_of(model: Model) -> str:
    """The repository that a download takes: the checkpoint where it names one, else the model's own."""
    return (
        model.checkpoint if _REPO.match(model.checkpoint) and not model.checkpoint.endswith(".gguf") else model.hf_repo
    )


def download_request(
    model: Model,
    *,
    actor: Actor,
    rig: Rig | None = None,
    repo: str = "",
    revision: str = "",
    quantization: str = "",
    reason: str = "",
) -> Job:
    """A job that fetches the weights; the one under way when it is for the same. Raises Invalid or Conflict."""
    repo, revision, quantization = repo.strip() or repo_of(model), revision.strip(), quantization.strip()
    if not repo:
        raise Invalid(
            f"Nobody has said where {model.name} can be downloaded. Name a repository of the hub, owner/name.",
            fields={"repo": ["Name a repository, owner/name."]},
        )
    for field, value, shape in (
        ("repo", repo, _REPO),
        ("revision", revision, _REVISION),
        ("quantization", quantization, _QUANTIZATION),
    ):
        if value and (not shape.match(value) or ".." in value):
            raise Invalid(f"{value[:100]!r} is not a {field}.", fields={field: ["This cannot be one."]})
    params = {"model": model.slug, "repo": repo, "revision": revision, "quantization": quantization}
    with transaction.atomic():
        rig = Rig.objects.select_for_update(no_key=True).get(pk=(rig or rig_here()).pk)
        exclusion = f"download:{rig.slug}:{model.slug}"[:100]
        live = Job.objects.filter(exclusion=exclusion, state__in=LIVE_STATES, cancel_requested_at=None).first()
        if live is not None and live.params == params:
            return live
        if live is not None:
            raise Conflict(
                f"{model.name} is being downloaded from {live.params['repo']} by job {live.pk}. Cancel that first.",
                code="download_under_way",
            )
        return job_create(
            kind="download",
            title=f"Download {model.name}" + (f" {quantization}" if quantization else ""),
            rig_name=rig.slug,
            queue=rig.control_queue,
            actor=actor,
            reason=reason,
            params=params,
            exclusion=exclusion,
        )


def register_here(model: Model, *, path: str, actor: Actor) -> Weights:
    """Weights that already lie on this machine. Raises Invalid with what is wrong with them."""
    found = look_at(path)
    return weights_register(
        model,
        rig_name=settings.RIG_NAME,
        path=found.path,
        size_bytes=found.size_bytes,
        actor=actor,
        kind=found.kind,
        quantization=found.quantization,
    )


def removal_request(name: str, *, actor: Actor, reason: str = "") -> Job:
    """A job that deletes one place of the models folder. Raises NotFound, or Conflict while it is in use."""
    place = place_get(name)
    if place is None:
        raise NotFound(f"There is no {name[:200]!r} in the models folder.")
    try:
        refuse_if_used(place)
    except JobFailed as no:
        raise Conflict(no.message, code="in_use") from None
    rig = rig_here()
    return job_create(
        kind="remove_weights",
        title=f"Delete {name}",
        rig_name=rig.slug,
        queue=rig.control_queue,
        actor=actor,
        reason=reason,
        params={"place": name, "size_bytes": place.size_bytes},
        exclusion=f"remove_weights:{rig.slug}:{name}"[:100],
    )
