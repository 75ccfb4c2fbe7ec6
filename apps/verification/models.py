"""Runs of check suites, measured beside expected."""

from __future__ import annotations

from django.db import models
from django.utils import timezone

from apps.jobs.models import Job
from apps.rigs.models import Rig


class Verdict(models.TextChoices):
    PASS = "pass", "Passed"
    WARN = "warn", "Look at it"
    FAIL = "fail", "Failed"
    UNKNOWN = "unknown", "Not known"


class VerificationRun(models.Model):
    suite = models.CharField(max_length=40)
    rig = models.ForeignKey(Rig, on_delete=models.CASCADE, related_name="verification_runs")
    job = models.OneToOneField(Job, null=True, on_delete=models.SET_NULL, related_name="verification_run")
    hardware_source = models.CharField(max_length=16, blank=True)
    user_name = models.CharField(max_length=200, blank=True)
    created_at = models.DateTimeField(default=timezone.now)
    finished_at = models.DateTimeField(null=True)
    # People accepted what this run measured as normal for the rig; later runs compare with it.
    accepted_at = models.DateTimeField(null=True)
    accepted_by_name = models.CharField(max_length=200, blank=True)

    class Meta:
        ordering = ["-id"]

    def __str__(self) -> str:
        return f"{self.suite} on {self.rig}"


class CheckResult(models.Model):
    """``expected`` and ``measured`` are texts for people; ``data`` is what was collected."""

    run = models.ForeignKey(VerificationRun, on_delete=models.CASCADE, related_name="results")
    check_name = models.CharField(max_length=60)
    title = models.CharField(max_length=120)
    verdict = models.CharField(max_length=8, choices=Verdict.choices)
    expected = models.CharField(max_length=300, blank=True)
    measured = models.CharField(max_length=300, blank=True)
    advice = models.TextField(blank=True)
    data = models.JSONField(default=dict)
    created_at = models.DateTimeField(default=timezone.now)

    class Meta:
        ordering = ["id"]
        constraints = [models.UniqueConstraint(fields=["run", "check_name"], name="one_result_per_check")]

    def __str__(self) -> str:
        return f"{self.check_name} {self.verdict}"
