"""The form of a restart policy."""

from __future__ import annotations

from django import forms


class RestartPolicyForm(forms.Form):
    restarts = forms.IntegerField(
        label="Restarts", min_value=0, max_value=100, help_text="How often it is started again by itself; 0: never."
    )
    window_seconds = forms.FloatField(
        label="Within seconds", min_value=1, max_value=7 * 86400, help_text="After so many, it stays failed."
    )
    backoff_seconds = forms.FloatField(
        label="Pause in seconds",
        min_value=0,
        max_value=3600,
        help_text="Before the second restart; each later one waits twice as long. The first comes at once.",
    )
    probe_every_seconds = forms.FloatField(
        label="Test request every seconds",
        min_value=0,
        max_value=86400,
        help_text="One token, only while no tokens come anyway; 0: never.",
    )
    probe_limit_seconds = forms.FloatField(label="Waits for its answer, seconds", min_value=0.1, max_value=3600)
    probe_failures = forms.IntegerField(
        label="Counts as hanging after",
        min_value=1,
        max_value=100,
        help_text="Test requests in a row without an answer.",
    )
