from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.apps import AppConfig

if TYPE_CHECKING:
    from apps.catalog.models import Model
    from apps.catalog.selectors import Usage
    from apps.rigs.models import Rig


class ProfilesConfig(AppConfig):
    name = "apps.profiles"
    label = "profiles"

    def ready(self) -> None:
        from apps.catalog.signals import model_fits, model_usage
        from apps.installs.signals import weights_arrived

        model_usage.connect(profiles_using, dispatch_uid="profiles.usage")
        model_fits.connect(models_fitting, dispatch_uid="profiles.fits")
        # Installs and catalogue do not know each other: what an install brought is entered here.
        weights_arrived.connect(enter_weights, dispatch_uid="profiles.weights")


def profiles_using(sender: Any, model: Model, **_: Any) -> list[Usage]:
    """The profiles whose current version serves ``model``."""
    from django.urls import reverse

    from apps.catalog.selectors import Usage
    from apps.profiles.selectors import newest, profile_list

    using = [(p, newest(p)) for p in profile_list()]
    return [
        Usage(
            profile.name,
            reverse("profiles:detail", args=[profile.slug]),
            f"{version.get_engine_display()} · {version.layout}",
        )
        for profile, version in using
        if version.model_id == model.pk
    ]


def models_fitting(sender: Any, models: list[Model], rig: Rig, **_: Any) -> dict[int, tuple[str, str]]:
    """A verdict for each model on this rig, as the planner sees it."""
    from apps.profiles.forecast import model_fit
    from apps.profiles.preview import rig_facts

    facts = rig_facts(rig)
    return {model.pk: model_fit(model, facts) for model in models}


def enter_weights(sender: Any, model_slug: str, rig_name: str, path: str, size_bytes: int, **_: Any) -> None:
    from apps.catalog.models import Model
    from apps.catalog.services import load_shipped, weights_register

    if not Model.objects.filter(slug=model_slug).exists():
        load_shipped()
    weights_register(Model.objects.get(slug=model_slug), rig_name=rig_name, path=path, size_bytes=size_bytes)
