"""Reads of models and of the weights that lie on disk."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from django.db.models import Prefetch, Q, QuerySet

from apps.catalog.models import Model, Weights
from apps.catalog.signals import model_boots, model_fits, model_usage
from apps.common.errors import NotFound
from apps.rigs.models import Rig


@dataclass(frozen=True, slots=True)
class Usage:
    """Something of a higher app that uses a model: a label, where it is shown, a detail."""

    label: str
    url: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Fit:
    """``word``: fits, tight, does not fit, not known."""

    word: str = "not known"
    sentence: str = "Nobody here can tell whether it fits."


def model_get(reference: str | int) -> Model:
    """By slug (``qwen2.5-…`` finds ``qwen2-5-…``) or id. Raises NotFound."""
    text = str(reference)
    found = Model.objects.filter(slug=text.replace(".", "-").lower()).first()
    if found is None and text.isdecimal() and len(text) < 19:
        found = Model.objects.filter(pk=int(text)).first()
    if found is None:
        raise NotFound(f"There is no model {text[:100]!r} in the catalogue.")
    return found


def model_list(search: str = "", rig_name: str = "") -> QuerySet[Model]:
    """By name. ``search`` looks into names, repositories, architecture and quantization; with ``rig_name`` each model's
    weights on that rig come along as ``model.here`` (a list of at most one)."""
    models = Model.objects.order_by("name", "pk")
    for word in search.split()[:8]:
        models = models.filter(
            Q(name__icontains=word)
            | Q(slug__icontains=word)
            | Q(hf_repo__icontains=word)
            | Q(checkpoint__icontains=word)
            | Q(architecture__icontains=word)
            | Q(quantization__icontains=word)
        )
    if rig_name:
        models = models.prefetch_related(Prefetch("weights", Weights.objects.filter(rig_name=rig_name), to_attr="here"))
    return models


def weights_path(model: Model, rig_name: str) -> str | None:
    """Where this rig keeps the model's weights, or None."""
    return Weights.objects.filter(model=model, rig_name=rig_name).values_list("path", flat=True).first()


def weights_paths(rig_name: str) -> dict[int, str]:
    """By model id where this rig keeps weights."""
    return dict(Weights.objects.filter(rig_name=rig_name).values_list("model_id", "path"))


def usages_of(model: Model) -> list[Usage]:
    """What the higher apps say uses this model."""
    answers: list[Iterable[Usage]] = [answer for _, answer in model_usage.send(sender=Model, model=model)]  # type: ignore[misc]
    return [usage for answer in answers for usage in answer]


def fits_of(models: Iterable[Model], rig: Rig) -> dict[int, Fit]:
    """What the planner says of each model on this rig with all of its cards free, by the model's id."""
    found: dict[int, Fit] = {}
    for _, answer in model_fits.send(sender=Model, models=list(models), rig=rig):
        verdicts: dict[int, tuple[str, str]] = answer or {}  # type: ignore[assignment]
        found.update({pk: Fit(word, sentence) for pk, (word, sentence) in verdicts.items()})
    return found


def boots_of(model: Model, rig: Rig) -> Any:
    """Launches of the model on this rig, predicted against actual, from the app that launches; None where none is."""
    answers = model_boots.send(sender=Model, model=model, rig=rig)
    return next((answer for _, answer in answers if answer), None)
