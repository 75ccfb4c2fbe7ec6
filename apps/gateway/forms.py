"""The form of a quota: empty fields are no limits."""

from __future__ import annotations

from django import forms

from apps.gateway.quotas import FIELDS

LIMITS = {
    "requests_per_minute": ("Requests per minute", "Any 60 seconds."),
    "tokens_per_minute": ("Tokens per minute", "Of prompts and answers, counted when a request has ended."),
    "tokens_per_day": ("Tokens per day", ""),
    "tokens_per_month": ("Tokens per month", ""),
    "concurrent": ("Requests at once", ""),
    "share": ("Share under load", "1 to 100; 1 if empty. When an engine is full, turns go by these."),
}


class QuotaForm(forms.Form):
    subject = forms.RegexField(r"^(role|user|key)-[a-z0-9]{1,20}$", widget=forms.HiddenInput)

    def __init__(self, *args: object, of_key: bool = False, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        for name in FIELDS:
            label, help_text = LIMITS[name]
            if name == "share" and of_key:
                continue  # the queue goes by people
            self.fields[name] = forms.IntegerField(
                label=label, help_text=help_text, required=False, min_value=1 if name == "share" else 0,
                widget=forms.NumberInput(attrs={"inputmode": "numeric"}),
            )  # fmt: skip

    def limits(self) -> dict[str, int | None]:
        return {name: self.cleaned_data.get(name) for name in FIELDS}
