"""Stored telemetry: means of live readings."""

from __future__ import annotations

from django.db import models

from apps.rigs.models import Rig


class Sample(models.Model):
    """The mean of a card's readings over ``seconds`` from ``at`` on; null where not reported."""

    rig = models.ForeignKey(Rig, on_delete=models.CASCADE, related_name="samples")
    gpu_uuid = models.CharField(max_length=64)
    at = models.DateTimeField()
    seconds = models.IntegerField()
    utilization_percent = models.FloatField(null=True)
    memory_used_bytes = models.BigIntegerField(null=True)
    power_watts = models.FloatField(null=True)
    temperature_celsius = models.FloatField(null=True)
    memory_temperature_celsius = models.FloatField(null=True)
    fan_percent = models.FloatField(null=True)
    sm_clock_mhz = models.FloatField(null=True)
    nvlink_bytes_per_second = models.FloatField(null=True)
    energy_joules = models.FloatField(null=True)  # used in this span

    class Meta:
        constraints = [models.UniqueConstraint(fields=["rig", "gpu_uuid", "seconds", "at"], name="one_sample_per_span")]
        indexes = [models.Index(fields=["seconds", "at"], name="sample_by_age")]

    def __str__(self) -> str:
        return f"{self.gpu_uuid} {self.at:%F %T}"
