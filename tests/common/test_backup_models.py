"""A backup holds every model of the panel, and every kind of value comes back as it was."""

from __future__ import annotations

import datetime
import json
import uuid
from typing import Any

import pytest
from django.apps import apps
from django.core import serializers
from django.db import IntegrityError, models, transaction

from rigpanel import backup

pytestmark = pytest.mark.django_db

# What a backup need not hold, and why. Adding a line here is a decision, forgetting a model is not possible.
LEFT_OUT = {
    "contenttypes.ContentType": "made anew by migrations",
    "auth.Permission": "made anew by migrations",
    "sessions.Session": "people sign in again",
}
AT = datetime.datetime(2026, 3, 29, 1, 30, 0, 123456, tzinfo=datetime.UTC)
JSON = {"text": "Grüße \u2028 \u0000"[:-1], "number": 0.1, "none": None, "list": [1, {"deep": True}]}


def everything() -> list[type[models.Model]]:
    return [m for m in apps.get_models(include_auto_created=True) if m._meta.managed and not m._meta.proxy]


def test_no_model_is_forgotten() -> None:
    held = set(backup._models())
    for model in everything():
        if model._meta.auto_created:  # the table of a many-to-many field travels with its owner
            assert model._meta.auto_created in held or model._meta.auto_created._meta.label in LEFT_OUT
        else:
            assert (model in held) != (model._meta.label in LEFT_OUT), f"{model._meta.label} is not in the backup"
    assert {label.lower() for label in LEFT_OUT} == backup.LEFT_OUT


def value_for(field: models.Field[Any, Any], number: int) -> Any:
    """Something that is not the field's default; relations point at the first row there is."""
    if isinstance(field, models.ForeignKey):
        related: Any = field.remote_field.model
        return related._base_manager.first()
    if field.choices:
        return next(value for value, _ in field.flatchoices)
    if isinstance(field, models.JSONField):
        return JSON
    if isinstance(field, models.DateTimeField):
        return AT + datetime.timedelta(seconds=number)
    if isinstance(field, models.DateField):
        return AT.date()
    if isinstance(field, models.TimeField):
        return datetime.time(23, 59, 58, 7)
    if isinstance(field, models.BooleanField):
        return True
    if isinstance(field, models.UUIDField):
        return uuid.uuid4()
    if isinstance(field, models.FloatField):
        return 0.1 + number
    if isinstance(field, models.DecimalField):
        return 1
    if isinstance(field, models.IntegerField):
        return number + 3
    if isinstance(field, models.DurationField):
        return datetime.timedelta(days=1, microseconds=5)
    if isinstance(field, (models.EmailField)):
        return f"p{number}@lab.example"
    if isinstance(field, models.SlugField):
        return f"slug-{number}"
    if isinstance(field, (models.CharField, models.TextField)):
        return f"Grüße ☃ {number}"[: field.max_length or 40]
    if isinstance(field, models.BinaryField):
        return b"\x00\xff"
    if isinstance(field, models.GenericIPAddressField):
        return "::1"
    raise AssertionError(f"{field} is a {type(field).__name__}; teach this test what to put there")


def test_a_row_of_every_model_comes_back_as_it_was() -> None:
    checked = set()
    for number, model in enumerate(backup._models()):
        row = model._base_manager.order_by("pk").first()
        if row is None:
            fields = [f for f in model._meta.concrete_fields if not isinstance(f, models.AutoField)]
            values = {f.name: value_for(f, number) for f in fields}
            try:
                with transaction.atomic():
                    row = model._base_manager.create(**values)
            except IntegrityError:
                continue  # a constraint between fields that only the model's own services know
            row = model._base_manager.get(pk=row.pk)
        (entry,) = serializers.serialize("python", [row], use_natural_foreign_keys=True)
        line = json.dumps(entry, default=backup._plain, ensure_ascii=False)
        (back,) = serializers.deserialize("python", [json.loads(line)])
        for field in model._meta.concrete_fields:
            assert getattr(back.object, field.attname) == getattr(row, field.attname), f"{model._meta.label}.{field}"
        checked.add(model)
    assert len(checked) >= 0.8 * len(backup._models()), "too many models could not be filled"
