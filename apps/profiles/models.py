"""Serving profiles and their immutable versions."""

from __future__ import annotations

from django.db import models
from django.utils import timezone

from apps.catalog.models import Model


class Device(models.TextChoices):
    GPU = "gpu", "GPU"
    CPU = "cpu", "CPU"


class Engine(models.TextChoices):
    VLLM = "vllm", "vLLM"
    RAY_SERVE = "ray_serve", "Ray Serve"
    LLAMA_CPP = "llama_cpp", "llama.cpp"
    SIMULATED = "simulated", "Simulated"


class Profile(models.Model):
    """A model with how to serve it, under a name. What runs is always one of its versions."""

    slug = models.SlugField(max_length=100, unique=True)
    name = models.CharField(max_length=200)
    description = models.TextField(blank=True)
    members_may_switch = models.BooleanField(default=False)
    shipped = models.BooleanField(default=False)
    archived_at = models.DateTimeField(null=True, blank=True)
    created_at = models.DateTimeField(default=timezone.now)

    class Meta:
        ordering = ["name"]

    def __str__(self) -> str:
        return self.name

    @property
    def current(self) -> ProfileVersion:
        """The newest version; every profile has one."""
        return self.versions.select_related("model", "profile").latest("number")


class ProfileVersion(models.Model):
    """Never changed after it was made (database triggers see to it)."""

    profile = models.ForeignKey(Profile, on_delete=models.CASCADE, related_name="versions")
    number = models.IntegerField()
    model = models.ForeignKey(Model, on_delete=models.PROTECT, related_name="+")
    engine = models.CharField(max_length=16, choices=Engine.choices)
    device = models.CharField(max_length=8, choices=Device.choices, default=Device.GPU)
    replicas = models.IntegerField(default=1)
    tensor_parallel_size = models.IntegerField(default=1)
    pipeline_parallel_size = models.IntegerField(default=1)
    served_name = models.CharField(max_length=200)
    options = models.JSONField(default=dict, blank=True)
    # Of each card that it runs on, in force while it runs; null leaves the card's own.
    power_limit_watts = models.IntegerField(null=True, blank=True)
    # The version of the engine that it was verified with; another one is used with a warning. Null: any.
    engine_version = models.CharField(max_length=80, null=True, blank=True)  # noqa: DJ001 - see the migration
    created_at = models.DateTimeField(default=timezone.now)
    created_by_name = models.CharField(max_length=200, blank=True)
    note = models.CharField(max_length=300, blank=True)

    class Meta:
        ordering = ["-number"]
        constraints = [models.UniqueConstraint(fields=["profile", "number"], name="one_version_of_a_number")]

    def __str__(self) -> str:
        return f"{self.profile} v{self.number}"

    @property
    def gpus_needed(self) -> int:
        if self.device == Device.CPU:
            return 0
        return self.replicas * self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def layout(self) -> str:
        """``TP4``, ``2×TP2``, ``TP2·PP2``, ``CPU``, ``CPU·TP2``."""
        one = f"TP{self.tensor_parallel_size}"
        if self.device == Device.CPU:
            one = "CPU" if self.tensor_parallel_size == 1 else f"CPU·{one}"
        if self.pipeline_parallel_size > 1:
            one += f"·PP{self.pipeline_parallel_size}"
        return one if self.replicas == 1 else f"{self.replicas}×{one}"
