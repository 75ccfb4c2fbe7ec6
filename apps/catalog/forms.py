"""The form of a catalogue entry. The rules themselves live in ``schema``."""

from __future__ import annotations

from typing import Any

from django import forms

from apps.catalog.models import Model
from apps.common.errors import ApplicationError

TEXTS = {
    "name": "Name",
    "hf_repo": "Hub repository",
    "checkpoint": "Checkpoint",
    "architecture": "Architecture",
    "quantization": "Quantization",
    "licence": "Licence",
    "tool_parser": "Tool parser",
    "reasoning_parser": "Reasoning parser",
    "chat_template": "Chat template",
}
NUMBERS = {
    "params_total": "Parameters",
    "weights_bytes": "Weights in bytes",
    "layers": "Layers",
    "hidden_size": "Hidden size",
    "attention_heads": "Attention heads",
    "kv_heads": "KV heads",
    "head_dim": "Head dimension",
    "max_context_tokens": "Longest context in tokens",
}
HELP = {
    "slug": "Lowercase letters, digits and dashes. It becomes the model's id at the gateway and stays as it is.",
    "checkpoint": "What the engine loads: owner/name on the hub, a path, or a .gguf file in the models folder.",
    "weights_bytes": "Without it nobody can tell whether the model fits.",
    "tool_parser": "The engine's own name for it, for example hermes.",
}


class ModelForm(forms.Form):
    """``save`` hands what was typed to a service and puts its answer beside the fields."""

    slug = forms.CharField(max_length=100, help_text=HELP["slug"])
    checkpoint_note = forms.CharField(
        required=False, widget=forms.Textarea(attrs={"rows": 2}), label="Note on the checkpoint"
    )
    sources = forms.CharField(
        required=False, widget=forms.Textarea(attrs={"rows": 3}), help_text="Where the facts come from, one per line."
    )
    notes = forms.CharField(required=False, widget=forms.Textarea(attrs={"rows": 3}), help_text="One per line.")

    field_order = ["slug", *TEXTS, *NUMBERS, "checkpoint_note", "sources", "notes"]

    def __init__(self, *args: Any, model: Model | None = None, **kwargs: Any) -> None:
        if model is not None:
            initial = {name: getattr(model, name) for name in ("slug", "checkpoint_note", *TEXTS, *NUMBERS)}
            kwargs["initial"] = initial | {name: "\n".join(getattr(model, name)) for name in ("sources", "notes")}
        super().__init__(*args, **kwargs)
        for name, label in TEXTS.items():
            self.fields[name] = forms.CharField(required=name == "name", label=label, help_text=HELP.get(name, ""))
        for name, label in NUMBERS.items():
            self.fields[name] = forms.IntegerField(
                required=False, min_value=1, label=label, help_text=HELP.get(name, "")
            )
        if model is not None:
            del self.fields["slug"]
        self.order_fields(self.field_order)

    def facts(self) -> dict[str, Any]:
        values = dict(self.cleaned_data)
        for name in ("sources", "notes"):
            values[name] = [line.strip() for line in values[name].splitlines() if line.strip()]
        return values

    def refused(self, error: ApplicationError) -> None:
        """Show a service's refusal: beside the fields it names, the rest above the form."""
        for name, sentences in error.fields.items():
            for sentence in sentences:
                self.add_error(name if name in self.fields else None, sentence)
        if not error.fields:
            self.add_error(None, error.message)
