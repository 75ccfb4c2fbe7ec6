"""Pins, requests and the rig's policies."""

from __future__ import annotations

from zoneinfo import ZoneInfo

from django.db import models
from django.db.models import Q
from django.utils import timezone

from apps.deployments.policies.calendar import Slot
from apps.profiles.models import Profile
from apps.rigs.models import Rig


class Pin(models.Model):
    """Nobody but its owner replaces this profile's deployment before ``until``. Names outlive people."""

    rig = models.ForeignKey(Rig, on_delete=models.CASCADE, related_name="pins")
    profile = models.ForeignKey(Profile, on_delete=models.CASCADE, related_name="pins")
    reason = models.CharField(max_length=200, blank=True)
    created_at = models.DateTimeField(default=timezone.now)
    until = models.DateTimeField()
    user_pk = models.BigIntegerField(null=True)
    user_name = models.CharField(max_length=200)
    released_at = models.DateTimeField(null=True)
    released_by_name = models.CharField(max_length=200, blank=True)

    class Meta:
        ordering = ["until", "pk"]
        constraints = [
            models.UniqueConstraint(
                fields=["rig", "profile"], condition=Q(released_at=None), name="one_pin_in_force_per_profile"
            )
        ]

    def __str__(self) -> str:
        return f"{self.profile} pinned by {self.user_name}"


class RequestState(models.TextChoices):
    WAITING = "waiting", "Waiting"
    APPROVED = "approved", "Approved"
    DECLINED = "declined", "Declined"
    WITHDRAWN = "withdrawn", "Withdrawn"
    EXPIRED = "expired", "Expired"


class SwitchRequest(models.Model):
    """A member's wish to switch to what they may not switch to themselves; ``job_id`` once approved."""

    rig = models.ForeignKey(Rig, on_delete=models.CASCADE, related_name="switch_requests")
    profile = models.ForeignKey(Profile, on_delete=models.CASCADE, related_name="switch_requests")
    reason = models.CharField(max_length=300, blank=True)
    state = models.CharField(max_length=12, choices=RequestState.choices, default=RequestState.WAITING)
    created_at = models.DateTimeField(default=timezone.now)
    user_pk = models.BigIntegerField(null=True)
    user_name = models.CharField(max_length=200)
    decided_at = models.DateTimeField(null=True)
    decided_by_name = models.CharField(max_length=200, blank=True)
    answer = models.CharField(max_length=300, blank=True)
    job_id = models.BigIntegerField(null=True)

    class Meta:
        ordering = ["-pk"]
        constraints = [
            models.UniqueConstraint(
                fields=["rig", "profile", "user_pk"],
                condition=Q(state="waiting"),
                name="one_waiting_request_per_person_and_profile",
            )
        ]

    def __str__(self) -> str:
        return f"{self.user_name} asks for {self.profile}"


class LoadBy(models.TextChoices):
    """Whose requests at the gateway may cause the switch to a profile that does not serve."""

    MARKED = "marked", "members' if members may switch to it, else nobody's"
    MEMBERS = "members", "members', operators' and owners'"
    OPERATORS = "operators", "operators' and owners'"
    NOBODY = "nobody", "nobody's"


class LoadingPolicy(models.Model):
    """Of a profile, whichever version. One without a row goes by its mark *members may switch*."""

    profile = models.OneToOneField(Profile, on_delete=models.CASCADE, related_name="loading_policy")
    by = models.CharField(max_length=12, choices=LoadBy.choices, default=LoadBy.MARKED)

    class Meta:
        verbose_name_plural = "loading policies"

    def __str__(self) -> str:
        return f"loading of {self.profile}"


IDLE_ACTIONS = [("nothing", "leave it"), ("sleep", "put it to sleep, else unload it"), ("unload", "unload it")]


class CalendarSlot(models.Model):
    """A profile for a part of each week; minutes from Monday 00:00 on the rig's own clocks (``calendar.Slot``)."""

    rig = models.ForeignKey(Rig, on_delete=models.CASCADE, related_name="calendar")
    profile = models.ForeignKey(Profile, on_delete=models.CASCADE, related_name="calendar")
    begin = models.PositiveIntegerField()
    end = models.PositiveIntegerField()
    acted_for = models.DateTimeField(null=True)  # the beginning of the occurrence that was dealt with

    class Meta:
        ordering = ["begin"]
        constraints = [
            models.CheckConstraint(condition=Q(begin__lt=10080) & Q(end__lt=10080), name="slots_lie_in_a_week")
        ]

    def __str__(self) -> str:
        return f"{self.profile} {self.words}"

    @property
    def words(self) -> str:
        return self.as_slot().words

    def as_slot(self) -> Slot:
        return Slot(self.pk or 0, self.profile_id, self.profile.name, self.begin, self.end)


class RigPolicy(models.Model):
    """What holds for every switch of a rig. A rig without a row has the defaults."""

    rig = models.OneToOneField(Rig, on_delete=models.CASCADE, related_name="policy")
    time_zone = models.CharField(max_length=60, default="UTC")
    minimum_residency_seconds = models.PositiveIntegerField(default=60)
    home_profile = models.ForeignKey(Profile, null=True, blank=True, on_delete=models.SET_NULL, related_name="+")
    home_after_idle_seconds = models.PositiveIntegerField(null=True, blank=True)
    home_at = models.TimeField(null=True, blank=True)  # on the rig's own clocks
    home_acted_for = models.DateTimeField(null=True)
    idle_action = models.CharField(max_length=8, choices=IDLE_ACTIONS, default="nothing")
    idle_after_seconds = models.PositiveIntegerField(default=1800)
    clock_answer = models.CharField(max_length=500, blank=True)  # why the clock did not do what it wanted
    clock_at = models.DateTimeField(null=True)

    def __str__(self) -> str:
        return f"policy of {self.rig}"

    @property
    def zone(self) -> ZoneInfo:
        return ZoneInfo(self.time_zone)
