"""Counters that others watch to learn that something changed."""

from __future__ import annotations

from django.db import models
from django.db.models import F


class Epoch(models.Model):
    """A named counter, raised in the same transaction as the change it announces.

    The gateway polls it: a cheap read that tells whether routes or keys must be loaded again,
    also when the message that should have said so was lost.
    """

    name = models.CharField(max_length=32, primary_key=True)
    value = models.BigIntegerField(default=0)

    def __str__(self) -> str:
        return f"{self.name} {self.value}"

    @classmethod
    def bump(cls, name: str) -> int:
        """Raise the counter; call it inside the transaction of the change. Returns the new value."""
        if not cls.objects.filter(name=name).update(value=F("value") + 1):
            cls.objects.get_or_create(name=name)
            cls.objects.filter(name=name).update(value=F("value") + 1)
        return cls.objects.get(name=name).value

    @classmethod
    def current(cls, name: str) -> int:
        row = cls.objects.filter(name=name).values_list("value", flat=True).first()
        return 0 if row is None else int(row)
