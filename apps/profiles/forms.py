"""The form of a profile. Options are one ``name = value`` per line, or a JSON object."""

from __future__ import annotations

import json
from typing import Any

from django import forms

from apps.catalog.models import Model
from apps.common.errors import ApplicationError
from apps.profiles.models import Device, Engine, Profile

ENGINES = [(e.value, e.label) for e in Engine]


def options_text(options: dict[str, Any]) -> str:
    """Options as people edit them."""
    return "\n".join(f"{k} = {v if isinstance(v, str) else json.dumps(v)}" for k, v in options.items())


def parse_options(text: str) -> dict[str, Any]:
    """``max_model_len = 32768`` line by line, ``--max-model-len 32768`` too, or one JSON object.

    Raises ValueError with a sentence.
    """
    if text.lstrip().startswith("{"):
        try:
            found = json.loads(text)
        except ValueError as error:
            raise ValueError(f"This is not JSON: {error}.") from None
        return dict(found)
    options: dict[str, Any] = {}
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        name, equals, value = line.partition("=")
        if line.startswith("--") and (not equals or " " in name.strip()):
            name, equals, value = line.partition(" ")
        name = name.strip().removeprefix("--").replace("-", "_")
        if not name or " " in name or (not equals and not line.startswith("--")):
            raise ValueError(f"Line {number} is not understood: write a name, an equals sign and a value.")
        if name in options:
            raise ValueError(f"Line {number} sets {name} a second time.")
        options[name] = _value(value.strip()) if equals else True  # a bare flag switches on
    return options


def _value(text: str) -> Any:
    """A number, true, false or JSON where it is one; else the text itself."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return text if value is None else value


class OptionsField(forms.CharField):
    def clean(self, value: Any) -> Any:
        text = super().clean(value)
        try:
            return parse_options(text)
        except ValueError as error:
            raise forms.ValidationError(str(error)) from None


class RecipeForm(forms.Form):
    text = forms.CharField(
        label="Command line or file",
        max_length=65536,
        strip=False,
        widget=forms.Textarea(attrs={"rows": 12, "class": "mono", "spellcheck": "false", "autocomplete": "off"}),
        help_text="vllm serve …, llama-server …, docker run …, a compose file, llama-swap’s YAML, or YAML exported "
        "here. Nothing of it is run. Keys and tokens in it are dropped.",
    )


class ProfileForm(forms.Form):
    name = forms.CharField(max_length=200)
    slug = forms.CharField(
        max_length=100, help_text="Lowercase letters, digits and dashes. Scripts use it, so it stays as it is."
    )
    model = forms.ModelChoiceField(Model.objects.none(), to_field_name="slug")
    engine = forms.ChoiceField(choices=ENGINES)
    device = forms.ChoiceField(choices=Device.choices, initial=Device.GPU)
    replicas = forms.IntegerField(min_value=1, initial=1, help_text="Engines beside each other, behind one address.")
    tensor_parallel_size = forms.IntegerField(min_value=1, initial=1, help_text="GPUs that share each layer.")
    pipeline_parallel_size = forms.IntegerField(
        min_value=1, initial=1, help_text="Groups of GPUs that share the layers."
    )
    served_name = forms.CharField(
        max_length=200, required=False, help_text="The model's id in requests; the model's slug when left empty."
    )
    options = OptionsField(
        required=False,
        widget=forms.Textarea(attrs={"rows": 8, "class": "mono", "spellcheck": "false"}),
        help_text="One <code>name = value</code> per line, as in <code>max_model_len = 32768</code>; or a JSON object.",
    )
    power_limit_watts = forms.IntegerField(
        required=False,
        min_value=50,
        label="Power cap per GPU in watts",
        help_text="In force while it runs, where the driver permits it. 280 W keeps over 95 % of a 3090's speed.",
    )
    engine_version = forms.CharField(
        required=False,
        max_length=80,
        label="Verified with engine version",
        help_text="Taken where it is installed; another version is used with a warning.",
    )
    members_may_switch = forms.BooleanField(required=False, label="Members may switch to it")
    description = forms.CharField(required=False, max_length=5000, widget=forms.Textarea(attrs={"rows": 3}))
    note = forms.CharField(required=False, max_length=300, help_text="Why, for the list of versions.")

    def __init__(self, *args: Any, profile: Profile | None = None, **kwargs: Any) -> None:
        if profile is not None:
            kwargs["initial"] = profile_initial(profile)
        super().__init__(*args, **kwargs)
        field = self.fields["model"]
        assert isinstance(field, forms.ModelChoiceField)  # noqa: S101 - declared above
        field.queryset = Model.objects.order_by("name")
        if profile is not None:
            del self.fields["slug"]

    def refused(self, error: ApplicationError) -> None:
        """Show a service's refusal beside the fields it names, the rest above the form."""
        for name, sentences in error.fields.items():
            for sentence in sentences:
                self.add_error(name if name in self.fields else None, sentence)
        if not error.fields:
            self.add_error(None, error.message)


def profile_initial(profile: Profile) -> dict[str, Any]:
    current = profile.current
    names = ("engine", "device", "replicas", "tensor_parallel_size", "pipeline_parallel_size", "power_limit_watts")
    return {
        "engine_version": current.engine_version or "",
        "name": profile.name,
        "description": profile.description,
        "members_may_switch": profile.members_may_switch,
        "model": current.model.slug,
        # Left empty it follows the model, also when another one is chosen.
        "served_name": "" if current.served_name == current.model.slug else current.served_name,
        "options": options_text(current.options),
        **{name: getattr(current, name) for name in names},
    }
