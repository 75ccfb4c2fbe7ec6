"""Changes to the catalogue: the shipped entries, a team's own, and where weights lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import structlog
from django.db import IntegrityError, transaction
from django.db.models import ProtectedError

from apps.audit.services import record
from apps.catalog.models import Model, Weights
from apps.catalog.schema import ModelFacts, ShippedCatalogue, checked
from apps.common.actors import PANEL, Actor
from apps.common.errors import Conflict, Invalid
from apps.common.realtime import page_changed

log = structlog.get_logger(__name__)
SHIPPED_FILE = Path(__file__).parent / "data" / "models.json"


def shipped_catalogue() -> ShippedCatalogue:
    """The shipped file; raises pydantic.ValidationError when somebody broke it."""
    return ShippedCatalogue.model_validate_json(SHIPPED_FILE.read_text("utf-8"))


def load_shipped() -> int:
    """Bring the shipped entries up to date; returns how many rows changed.

    A row that the team made, or made its own by editing, is left alone.
    """
    changed = 0
    with transaction.atomic():
        rows = {m.slug: m for m in Model.objects.select_for_update(no_key=True)}
        for facts in shipped_catalogue().models:
            row = rows.get(facts.slug)
            if row is None:
                Model.objects.create(**facts.columns(), shipped=True)
                changed += 1
            elif row.shipped:
                changed += _assign(row, facts) != {}
            else:
                log.info("a model of the team keeps its facts", slug=facts.slug)
        if changed:
            record(PANEL, "model.load_shipped", "model", detail={"changed": changed})
    return changed


def model_create(*, actor: Actor, **facts: Any) -> Model:
    """``facts`` as in ``schema.ModelFacts``. Raises Invalid or Conflict."""
    entry = checked(facts)
    try:
        with transaction.atomic():
            model = Model.objects.create(**entry.columns())
            record(actor, "model.create", "model", model.pk, model.name, {"slug": model.slug})
            page_changed("model", model=model.pk)
    except IntegrityError:
        raise Conflict(
            f"There is already a model {entry.slug}.", code="slug_taken", fields={"slug": ["Choose another slug."]}
        ) from None
    return model


def model_update(model: Model, *, actor: Actor, **changes: Any) -> Model:
    """Change some facts. A shipped entry becomes the team's own: updates of rigpanel leave it alone from then on."""
    if changes.get("slug", model.slug) != model.slug:
        raise Invalid(
            "A model's slug cannot be changed: keys, routes and scripts use it.",
            fields={"slug": ["It stays as it is."]},
        )
    with transaction.atomic():
        model = Model.objects.select_for_update(no_key=True).get(pk=model.pk)
        current = {name: getattr(model, name) for name in ModelFacts.model_fields}
        current["kv"] = current["kv"] or None
        difference = _assign(model, checked({**current, **changes}))
        if difference:
            if model.shipped:
                model.shipped = False
                model.save(update_fields=["shipped"])
            record(actor, "model.update", "model", model.pk, model.name, difference)
            page_changed("model", model=model.pk)
    return model


def model_delete(model: Model, *, actor: Actor) -> None:
    """Raises Conflict for a shipped entry and for one that a profile uses."""
    if model.shipped:
        raise Conflict(f"{model.name} ships with rigpanel and would come back with the next start.", code="shipped")
    try:
        with transaction.atomic():
            record(actor, "model.delete", "model", model.pk, model.name, {"slug": model.slug})
            page_changed("model", model=model.pk)
            model.delete()
    except ProtectedError as error:
        users = sorted({str(user) for user in error.protected_objects})
        shown = ", ".join(users[:3]) + (" and others" if len(users) > 3 else "")
        raise Conflict(f"{model.name} is used by {shown}; its history needs it.", code="in_use") from None


def weights_register(
    model: Model,
    *,
    rig_name: str,
    path: str,
    size_bytes: int | None,
    actor: Actor = PANEL,
    kind: str = "",
    quantization: str = "",
    repo: str = "",
    revision: str = "",
) -> Weights:
    """Say where a rig keeps a model's weights; replaces what was known."""
    values = {
        "path": path,
        "size_bytes": size_bytes,
        "kind": kind or ("gguf" if path.endswith(".gguf") else ""),
        "quantization": quantization[:40],  # read out of a file's name, which may be anything
        "repo": repo,
        "revision": revision,
    }
    with transaction.atomic():
        weights, _ = Weights.objects.update_or_create(model=model, rig_name=rig_name, defaults=values)
        detail = {"rig": rig_name, "path": path, "size_bytes": size_bytes, "repo": repo, "revision": revision}
        record(actor, "weights.register", "model", model.pk, model.name, {k: v for k, v in detail.items() if v})
        page_changed("model", model=model.pk)
    return weights


def weights_forget(weights: Weights, *, actor: Actor) -> None:
    """The panel no longer knows of these weights; the files stay."""
    with transaction.atomic():
        model = weights.model
        record(actor, "weights.forget", "model", model.pk, model.name, {"rig": weights.rig_name, "path": weights.path})
        page_changed("model", model=model.pk)
        weights.delete()


def _assign(model: Model, facts: ModelFacts) -> dict[str, list[Any]]:
    """Write what differs; returns {column: [before, after]}."""
    difference = {
        name: [getattr(model, name), value] for name, value in facts.columns().items() if getattr(model, name) != value
    }
    if difference:
        for name, (_, value) in difference.items():
            setattr(model, name, value)
        model.save(update_fields=list(difference))
    return difference
