"""Forms of the policies page. Times are typed in the rig's own time zone."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from django import forms
from django.utils import timezone

from apps.deployments.policies.calendar import DAYS
from apps.deployments.policies.models import IDLE_ACTIONS, RigPolicy
from apps.deployments.policies.times import as_utc
from apps.profiles.selectors import profile_get, profile_list

HOURS = [("1", "1 hour"), ("2", "2 hours"), ("4", "4 hours"), ("8", "8 hours"), ("24", "a day"), ("72", "3 days")]


def profile_choices() -> list[tuple[str, str]]:
    return [(p.slug, p.name) for p in profile_list()]


class ProfileChoice(forms.ChoiceField):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(choices=profile_choices, **kwargs)


class PinForm(forms.Form):
    """``zone`` is the rig's: ``until`` is typed in it."""

    profile = ProfileChoice()
    hours = forms.ChoiceField(choices=[("", "until a time"), *HOURS], required=False, initial="2", label="For")
    until = forms.DateTimeField(
        required=False, widget=forms.DateTimeInput(attrs={"type": "datetime-local"}), label="Or until"
    )
    reason = forms.CharField(max_length=200, required=False, help_text="Others see it.")

    def __init__(self, *args: Any, zone: ZoneInfo, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.zone = zone

    def clean(self) -> dict[str, Any]:
        data = super().clean() or {}
        typed: datetime | None = data.get("until")
        if typed is not None:
            data["until"] = as_utc(typed.replace(tzinfo=None), self.zone)
        elif data.get("hours"):
            data["until"] = timezone.now() + timedelta(hours=int(data["hours"]))
        elif "until" not in self.errors:
            self.add_error("until", "Say how long, or until when.")
        return data


class RequestForm(forms.Form):
    profile = ProfileChoice()
    reason = forms.CharField(max_length=300, required=False, help_text="Operators see it.")


class RigPolicyForm(forms.Form):
    time_zone = forms.CharField(max_length=60, help_text="A name like Europe/Berlin; all times here are in it.")
    minimum_residency_seconds = forms.IntegerField(
        min_value=0,
        max_value=86400,
        label="Minimum residency in seconds",
        help_text="Members, the gateway and the clock do not replace a model that has served for less. 0: no minimum.",
    )
    home_profile = forms.ChoiceField(
        choices=lambda: [("", "none"), *profile_choices()], required=False, help_text="Where the rig returns to."
    )
    home_after_idle_minutes = forms.IntegerField(
        min_value=1, max_value=10080, required=False, label="Home after idle minutes"
    )
    home_at = forms.TimeField(
        required=False, widget=forms.TimeInput(attrs={"type": "time"}, format="%H:%M"), label="Home every day at"
    )
    idle_action = forms.ChoiceField(choices=IDLE_ACTIONS, label="What is idle")
    idle_after_minutes = forms.IntegerField(min_value=1, max_value=10080, label="Idle after minutes")

    def values(self) -> dict[str, Any]:
        """As the service takes it. Raises NotFound for a profile that is gone."""
        data = dict(self.cleaned_data)
        home, minutes = data["home_profile"], data.pop("home_after_idle_minutes")
        return data | {
            "home_profile": profile_get(home) if home else None,
            "home_after_idle_seconds": minutes * 60 if minutes else None,
            "idle_after_seconds": data.pop("idle_after_minutes") * 60,
        }


def policy_initial(policy: RigPolicy) -> dict[str, Any]:
    home_after = policy.home_after_idle_seconds
    return {
        "time_zone": policy.time_zone,
        "minimum_residency_seconds": policy.minimum_residency_seconds,
        "home_profile": policy.home_profile.slug if policy.home_profile else "",
        "home_after_idle_minutes": home_after // 60 if home_after else None,
        "home_at": policy.home_at,
        "idle_action": policy.idle_action,
        "idle_after_minutes": policy.idle_after_seconds // 60,
    }


class SlotForm(forms.Form):
    profile = ProfileChoice()
    days = forms.TypedMultipleChoiceField(
        choices=list(enumerate(DAYS)), coerce=int, widget=forms.CheckboxSelectMultiple, initial=[0, 1, 2, 3, 4]
    )
    begin = forms.TimeField(widget=forms.TimeInput(attrs={"type": "time"}, format="%H:%M"), label="From")
    end = forms.TimeField(
        widget=forms.TimeInput(attrs={"type": "time"}, format="%H:%M"),
        label="Until",
        help_text="At or before the beginning means on the next day.",
    )
