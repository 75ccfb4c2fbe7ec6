"""Models and profiles for tests."""

from __future__ import annotations

from typing import Any

from apps.catalog.models import Model
from apps.profiles.models import Profile, ProfileVersion


def catalogue_model(slug: str = "tiny", **facts: Any) -> Model:
    defaults: dict[str, Any] = {
        "name": slug.title(),
        "hf_repo": f"lab/{slug}",
        "checkpoint": f"lab/{slug}",
        "weights_bytes": 8 * 2**30,
        "kv": {"bytes_per_token_bf16": 131072},
        "max_context_tokens": 32768,
    }
    return Model.objects.get_or_create(slug=slug, defaults=defaults | facts)[0]


def simulated_profile(
    slug: str = "coder",
    *,
    tp: int = 4,
    replicas: int = 1,
    members_may_switch: bool = False,
    model: Model | None = None,
    **options: Any,
) -> Profile:
    """A profile of the simulated engine that loads in a moment unless told otherwise."""
    profile = Profile.objects.create(slug=slug, name=slug.title(), members_may_switch=members_may_switch)
    add_version(profile, tp=tp, replicas=replicas, model=model or catalogue_model(slug), **options)
    return profile


def llama_cpp_profile(slug: str, model: Model | None = None) -> Profile:
    """A profile of the real engine on the CPU, whose install and weights are the test's to make."""
    profile = Profile.objects.create(slug=slug, name=slug.title())
    ProfileVersion.objects.create(
        profile=profile,
        number=1,
        model=model or catalogue_model(slug),
        engine="llama_cpp",
        device="cpu",
        served_name=slug,
        options={},
    )
    return profile


def add_version(profile: Profile, *, tp: int, replicas: int, model: Model, **options: Any) -> ProfileVersion:
    return ProfileVersion.objects.create(
        profile=profile,
        number=profile.versions.count() + 1,
        model=model,
        engine="simulated",
        device="gpu",
        replicas=replicas,
        tensor_parallel_size=tp,
        served_name=profile.slug,
        options={"load_seconds": 0.3, **options},
    )
