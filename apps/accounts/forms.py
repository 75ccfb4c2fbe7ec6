"""Forms of people's pages: what was typed stays, errors stand beside their fields."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, time, timedelta
from typing import Any, cast

from django import forms
from django.conf import settings
from django.contrib.auth import password_validation
from django.utils import timezone

from apps.accounts.models import Invitation, User
from apps.accounts.services import LIFE_MAX, LIFE_TOLD
from apps.common.errors import ApplicationError
from apps.common.roles import Role

NEW_PASSWORD = forms.PasswordInput(attrs={"autocomplete": "new-password"})


class NewPasswordForm(forms.Form):
    """A password twice, against the validators, as ``user`` would have it."""

    password = forms.CharField(
        label="Password",
        strip=False,
        max_length=4096,
        widget=NEW_PASSWORD,
        help_text="Eight characters or more, no common one.",
    )
    password_again = forms.CharField(label="The same password again", strip=False, max_length=4096, widget=NEW_PASSWORD)

    def __init__(self, *args: Any, user: User | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.user = user

    def owner(self) -> User | None:
        return self.user

    def clean(self) -> dict[str, Any]:
        data = super().clean() or self.cleaned_data
        password, again = data.get("password"), data.get("password_again")
        if password and again and password != again:
            self.add_error("password_again", "The two passwords differ.")
        if password:
            try:
                password_validation.validate_password(password, self.owner())
            except forms.ValidationError as error:
                self.add_error("password", error)
        return data


class JoinForm(NewPasswordForm):
    email = forms.EmailField(label="Email", widget=forms.EmailInput(attrs={"autocomplete": "username"}))
    name = forms.CharField(
        label="Name", max_length=120, required=False, widget=forms.TextInput(attrs={"autocomplete": "name"}),
        help_text="How others see you in the history.",
    )  # fmt: skip
    field_order = ["email", "name", "password", "password_again"]

    def __init__(self, *args: Any, invitation: Invitation, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if invitation.email:
            # Disabled: whatever a request sends here is ignored, the invitation's address counts.
            self.fields["email"].initial = invitation.email
            self.fields["email"].disabled = True

    def owner(self) -> User:
        return User(email=self.cleaned_data.get("email", ""), name=self.cleaned_data.get("name", ""))


class InviteForm(forms.Form):
    email = forms.EmailField(
        label="Email", required=False, help_text="Left empty, whoever has the link may join with any address."
    )
    role = forms.ChoiceField(label="Role", choices=Role.choices, initial=Role.MEMBER)


class MemberForm(forms.Form):
    """What an owner may change about somebody."""

    role = forms.ChoiceField(label="Role", choices=Role.choices, required=False)
    is_active = forms.NullBooleanField(required=False)


class NameForm(forms.Form):
    name = forms.CharField(
        label="Name", max_length=120, required=False, widget=forms.TextInput(attrs={"autocomplete": "name"}),
        help_text="How others see you; without one, the first part of your address.",
    )  # fmt: skip


LIFETIMES = [("", "never"), ("7", "in 7 days"), ("30", "in 30 days"), ("90", "in 90 days"), ("365", "in a year")]
OVERLAPS = [("0", "ends at once"), ("1", "goes on for an hour"), ("24", "goes on for a day"),
            ("168", "goes on for 7 days"), ("720", "goes on for 30 days")]  # fmt: skip


class KeyForm(forms.Form):
    """``model_names``: what a key may be limited to; ``by_owner``: somebody who may have Open WebUI's key."""

    name = forms.CharField(
        label="Name of the new key", max_length=80, help_text="Where it will be used, say “laptop” or “Open WebUI”."
    )
    models = forms.MultipleChoiceField(
        label="Only for these models and aliases", required=False, widget=forms.CheckboxSelectMultiple,
        help_text="None ticked: all.",
    )  # fmt: skip
    networks = forms.CharField(
        label="Only from these networks", max_length=2000, required=False,
        widget=forms.TextInput(attrs={"autocomplete": "off", "spellcheck": "false"}),
        help_text="Like 192.168.1.0/24 or 10.0.0.7, with spaces between them. Empty: from anywhere.",
    )  # fmt: skip
    lifetime = forms.ChoiceField(label="Ends", choices=LIFETIMES, required=False)
    last_day = forms.DateField(
        label="Or with this day", required=False, widget=forms.DateInput(attrs={"type": "date"}, format="%Y-%m-%d")
    )
    names_people = forms.BooleanField(
        label="For Open WebUI, which says who asks", required=False,
        help_text="Use, limits and roles are then each person's own. You get the secret that it signs with.",
    )  # fmt: skip

    def __init__(self, *args: Any, model_names: Iterable[str] = (), by_owner: bool = False, **kwargs: Any) -> None:
        kwargs.setdefault("auto_id", "key_%s")  # it shares a page with NameForm, and ids are unique
        super().__init__(*args, **kwargs)
        names = list(model_names)
        models = cast(forms.MultipleChoiceField, self.fields["models"])
        models.choices = [(name, name) for name in names]
        self.fields["last_day"].help_text = f"To its end in {settings.PANEL_TIME_ZONE.key}."
        if not names:
            del self.fields["models"]
        if not by_owner:
            del self.fields["names_people"]

    def limits(self) -> list[forms.BoundField]:
        return [self[name] for name in self.fields if name != "name"]

    @property
    def limits_open(self) -> bool:
        """Whether something was typed there, or is wrong."""
        return self.is_bound and any(field.errors or field.value() for field in self.limits())

    def clean(self) -> dict[str, Any]:
        data = super().clean() or self.cleaned_data
        if data.get("lifetime") and data.get("last_day"):
            self.add_error("last_day", "Choose one of the two: after so many days, or with this day.")
        elif data.get("last_day") and data["last_day"] - timezone.now().date() >= LIFE_MAX:
            self.add_error("last_day", LIFE_TOLD)
        return data

    def values(self) -> dict[str, Any]:
        """As ``key_create`` takes it."""
        data, expires_at = self.cleaned_data, None
        if data["last_day"]:
            following = datetime.combine(data["last_day"] + timedelta(days=1), time.min, settings.PANEL_TIME_ZONE)
            expires_at = following.astimezone(UTC)
        elif data["lifetime"]:
            expires_at = timezone.now() + timedelta(days=int(data["lifetime"]))
        return {
            "name": data["name"],
            "expires_at": expires_at,
            "allowed_models": data.get("models", []),
            "allowed_networks": data["networks"].replace(",", " ").split(),
            "names_people": data.get("names_people", False),
        }

    def refused(self, error: ApplicationError) -> None:
        """The service's words beside the fields that they are about."""
        for name, sentences in error.fields.items():
            field = {"expires_at": "last_day"}.get(name, name)
            self.add_error(field if field in self.fields else None, [error.message, *sentences])
        if not error.fields:
            self.add_error(None, error.message)


class RotateForm(forms.Form):
    overlap_hours = forms.TypedChoiceField(label="The old key", choices=OVERLAPS, initial="24", coerce=int)


class ForgotForm(forms.Form):
    email = forms.EmailField(label="Email", widget=forms.EmailInput(attrs={"autocomplete": "username"}))
