"""Engine installs: one executable of an engine with a version."""

from __future__ import annotations

from django.db import models
from django.utils import timezone


class InstallState(models.TextChoices):
    INSTALLING = "installing", "Installing"
    READY = "ready", "Ready"
    BROKEN = "broken", "Broken"
    REMOVED = "removed", "Removed"


class EngineInstall(models.Model):
    """``command`` is the argv prefix of the server. ``managed`` ones were installed by the panel into
    ``path`` and may be removed by it; the others were found."""

    rig_name = models.CharField(max_length=63)
    engine = models.CharField(max_length=16)
    name = models.CharField(max_length=80)
    version = models.CharField(max_length=80, blank=True)
    command = models.JSONField(default=list)
    env = models.JSONField(default=dict, blank=True)
    flags = models.JSONField(null=True, blank=True)  # the flags that its own help names; null: never asked
    path = models.CharField(max_length=500, blank=True)
    managed = models.BooleanField(default=False)
    state = models.CharField(max_length=16, choices=InstallState.choices, default=InstallState.READY)
    problem = models.CharField(max_length=500, blank=True)
    size_bytes = models.BigIntegerField(null=True)
    created_at = models.DateTimeField(default=timezone.now)

    class Meta:
        ordering = ["engine", "name"]
        constraints = [models.UniqueConstraint(fields=["rig_name", "name"], name="one_install_of_a_name_per_rig")]

    def __str__(self) -> str:
        return f"{self.name} {self.version}".strip()
