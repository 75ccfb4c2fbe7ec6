"""The catalogue's model for what a recipe calls it, and the form that it fills."""

from __future__ import annotations

import json
import re
from pathlib import PurePosixPath
from typing import Any

from apps.catalog.models import Model, Weights
from apps.profiles.forms import options_text, parse_options
from apps.profiles.models import Profile
from apps.profiles.recipes.result import Note, Reading, Recipe, short

NOT_IN_CATALOGUE = "It is not in the catalogue; add the model first, or choose another one below."


def model_for(reference: str) -> Model | None:
    """By slug, repository, checkpoint or path of the weights; else by the last part of the name."""
    text = reference.strip().rstrip("/")
    if not text:
        return None
    whole = text.partition(":")[0] if not text.startswith("/") else text
    cached = next((part for part in PurePosixPath(whole).parts if part.startswith("models--")), "")  # a hub's cache
    repository = cached.removeprefix("models--").replace("--", "/", 1) or whole
    exact = (
        Model.objects.filter(slug=text).first()
        or Model.objects.filter(checkpoint__iexact=text).first()
        or Model.objects.filter(hf_repo__iexact=repository).first()
        or Model.objects.filter(checkpoint__iexact=repository).first()
    )
    if exact is None and text.startswith("/"):
        weights = Weights.objects.filter(path=text).select_related("model").first()
        exact = weights.model if weights else None
    if exact is not None:
        return exact
    by_name = (_called(last) for last in dict.fromkeys(PurePosixPath(path).name for path in (repository, whole)))
    return next((model for model in by_name if model is not None), None)


def _called(last: str) -> Model | None:
    named = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\.gguf\Z", "", last, flags=re.I).lower()).strip("-")
    if not named:
        return None
    return (
        Model.objects.filter(slug=named).first()
        or Model.objects.filter(checkpoint__iendswith="/" + last).order_by("pk").first()
    )


def filled(recipe: Recipe) -> dict[str, Any]:
    """The fields of a new profile, ``model`` as a slug or empty, with a slug that is still free."""
    model = model_for(recipe.model)
    served = recipe.served_name
    if model is not None and served == model.slug:
        served = ""
    return {
        "slug": recipe.slug if recipe.exact else free_slug(recipe.slug),
        "name": recipe.name,
        "description": recipe.description,
        "members_may_switch": recipe.members_may_switch,
        "model": model.slug if model else "",
        "engine": str(recipe.engine),
        "device": recipe.device,
        "replicas": recipe.replicas,
        "tensor_parallel_size": recipe.tensor_parallel_size,
        "pipeline_parallel_size": recipe.pipeline_parallel_size,
        "served_name": recipe.served_name if recipe.exact else served,
        "options": recipe.options,
        "power_limit_watts": recipe.power_limit_watts,
        "engine_version": recipe.engine_version,
    }


def form_values(fields: dict[str, Any]) -> dict[str, Any]:
    """As the profile's form takes them: one option a line."""
    options = fields["options"]
    text = options_text(options)
    try:
        lossless = parse_options(text) == options
    except ValueError:
        lossless = False
    return fields | {"options": text if lossless else json.dumps(options, indent=2, ensure_ascii=False)}


def free_slug(wanted: str) -> str:
    taken = set(Profile.objects.filter(slug__startswith=wanted).values_list("slug", flat=True))
    if wanted not in taken:
        return wanted
    return next(slug for n in range(2, len(taken) + 3) if (slug := f"{wanted}-{n}") not in taken)


def account(recipe: Recipe, fields: dict[str, Any]) -> Recipe:
    """Say of the model what the catalogue says."""
    if recipe.model and not fields["model"]:
        recipe.not_understood.append(Note(short(recipe.model), NOT_IN_CATALOGUE))
    elif not recipe.model:
        recipe.not_understood.append(Note("the model", "The text names none; choose it below."))
    return recipe


def reading_dict(reading: Reading) -> dict[str, Any]:
    """For the API: each profile as ``POST /profiles`` takes it, and what became of every piece of the text."""

    def notes(of: list[Note]) -> list[dict[str, str]]:
        return [{"text": n.text, "sentence": n.sentence} for n in of]

    recipes = []
    for recipe in reading.recipes:
        fields = filled(recipe)
        account(recipe, fields)
        recipes.append(
            {
                "profile": fields,
                "understood": notes(recipe.understood),
                "left_out": notes(recipe.left_out),
                "not_understood": notes(recipe.not_understood),
            }
        )
    return {"recipes": recipes, "notes": notes(reading.notes)}
