"""Jobs: every unit of work with who, why, steps, log and result."""

from __future__ import annotations

from django.conf import settings
from django.db import models
from django.db.models import Q
from django.utils import timezone

from apps.common.units import seconds


class JobState(models.TextChoices):
    QUEUED = "queued", "Queued"
    RUNNING = "running", "Running"
    SUCCEEDED = "succeeded", "Succeeded"
    FAILED = "failed", "Failed"  # the work said no
    ERRORED = "errored", "Errored"  # our bug
    CANCELLED = "cancelled", "Cancelled"


LIVE_STATES = frozenset({JobState.QUEUED, JobState.RUNNING})
FINAL_STATES = frozenset(set(JobState) - LIVE_STATES)
JOB_TRANSITIONS: dict[str, frozenset[str]] = {
    JobState.QUEUED: frozenset({JobState.RUNNING, JobState.CANCELLED, JobState.ERRORED}),
    JobState.RUNNING: frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.ERRORED, JobState.CANCELLED}),
}


class Job(models.Model):
    """Names of person, profile and rig are kept as text beside the keys: history outlives its subjects.

    While it runs, ``lease_owner`` (``identity.process_key`` of the worker and a nonce) holds it until ``lease_until``;
    after that any worker carries on from the last finished step. ``data`` is what steps hand on.
    """

    kind = models.CharField(max_length=32)
    title = models.CharField(max_length=200)
    state = models.CharField(max_length=16, choices=JobState.choices, default=JobState.QUEUED)
    rig_name = models.CharField(max_length=63)
    queue = models.CharField(max_length=100)
    # Of the jobs with one ``exclusion`` (say "switch:bench-01") at most one runs: a constraint.
    exclusion = models.CharField(max_length=100, blank=True)
    user = models.ForeignKey(
        settings.AUTH_USER_MODEL, null=True, blank=True, on_delete=models.SET_NULL, related_name="+"
    )
    user_name = models.CharField(max_length=200)
    reason = models.CharField(max_length=500, blank=True)
    params = models.JSONField(default=dict)
    data = models.JSONField(default=dict)
    profile_slug = models.CharField(max_length=100, blank=True)
    profile_name = models.CharField(max_length=200, blank=True)
    profile_version = models.IntegerField(null=True)
    deployment_id = models.BigIntegerField(null=True)
    progress = models.FloatField(default=0.0)
    eta_at = models.DateTimeField(null=True)
    created_at = models.DateTimeField(default=timezone.now)
    started_at = models.DateTimeField(null=True)
    finished_at = models.DateTimeField(null=True)
    cancel_requested_at = models.DateTimeField(null=True)
    cancel_requested_by = models.CharField(max_length=200, blank=True)
    superseded_by = models.ForeignKey(
        "self", null=True, blank=True, on_delete=models.SET_NULL, related_name="supersedes"
    )
    undo_cancel_at = models.DateTimeField(null=True)  # a cancel, or a later job, that came while things are put right
    failure = models.JSONField(null=True)  # set once steps are given up; the compensation runs then
    result = models.JSONField(null=True)  # {"summary": sentence, ...}
    lease_owner = models.CharField(max_length=120, blank=True)
    lease_until = models.DateTimeField(null=True)
    attempts = models.IntegerField(default=0)

    class Meta:
        ordering = ["-id"]
        indexes = [
            models.Index(fields=["state", "-id"], name="job_by_state"),
            models.Index(fields=["kind", "state", "-finished_at"], name="job_by_kind"),
            models.Index(fields=["kind", "profile_slug", "rig_name", "state", "-id"], name="job_by_profile"),
            # The history: a page deep inside a list takes its ids from one of these alone.
            models.Index(fields=["-created_at", "-id"], name="job_by_time"),
            models.Index(fields=["state", "-created_at", "-id"], name="job_by_state_and_time"),
            models.Index(fields=["kind", "-created_at", "-id"], name="job_by_kind_and_time"),
            models.Index(fields=["user", "-created_at", "-id"], name="job_by_user_and_time"),
        ]
        constraints = [
            models.UniqueConstraint(
                fields=["exclusion"],
                condition=Q(state="running") & ~Q(exclusion=""),
                name="one_running_job_per_exclusion",
            )
        ]

    def __str__(self) -> str:
        return f"job {self.pk}: {self.title}"

    @property
    def is_final(self) -> bool:
        return self.state in FINAL_STATES

    @property
    def summary(self) -> str:
        return str((self.result or {}).get("summary", ""))

    @property
    def duration_seconds(self) -> float | None:
        if self.started_at is None:
            return None
        return ((self.finished_at or timezone.now()) - self.started_at).total_seconds()

    @property
    def eta_seconds(self) -> float | None:
        if self.eta_at is None or self.is_final:
            return None
        return max(0.0, (self.eta_at - timezone.now()).total_seconds())

    @property
    def eta_words(self) -> str:
        """For people; empty where nobody can say."""
        left = self.eta_seconds
        if left is None:
            return ""
        return f"about {seconds(left)} left" if left else "takes longer than before"


class StepState(models.TextChoices):
    PENDING = "pending", "Pending"
    RUNNING = "running", "Running"
    DONE = "done", "Done"
    FAILED = "failed", "Failed"
    SKIPPED = "skipped", "Skipped"


class JobStep(models.Model):
    job = models.ForeignKey(Job, on_delete=models.CASCADE, related_name="steps")
    index = models.IntegerField()
    name = models.CharField(max_length=40)
    title = models.CharField(max_length=100)
    state = models.CharField(max_length=16, choices=StepState.choices, default=StepState.PENDING)
    started_at = models.DateTimeField(null=True)
    finished_at = models.DateTimeField(null=True)
    detail = models.CharField(max_length=500, blank=True)

    class Meta:
        ordering = ["index"]
        constraints = [models.UniqueConstraint(fields=["job", "name"], name="one_step_of_a_name_per_job")]

    def __str__(self) -> str:
        return f"{self.name} {self.state}"

    @property
    def duration_seconds(self) -> float | None:
        if self.started_at is None or self.finished_at is None:
            return None
        return (self.finished_at - self.started_at).total_seconds()


class JobLogLine(models.Model):
    """A line of a job's story; ``source`` is ``panel`` or ``engine``. Bounded per job by the writer."""

    job = models.ForeignKey(Job, on_delete=models.CASCADE, related_name="log_lines")
    at = models.DateTimeField(default=timezone.now)
    source = models.CharField(max_length=8, default="panel")
    text = models.CharField(max_length=2000)

    class Meta:
        ordering = ["id"]

    def __str__(self) -> str:
        return self.text
