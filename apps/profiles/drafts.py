"""Versions that are only thought of: checked like stored ones, to be planned before anybody saves them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from apps.catalog.models import Model
from apps.profiles.checks import Problems, checked_version
from apps.profiles.models import Device, Profile, ProfileVersion


def version_draft(
    *,
    model: Model,
    engine: str,
    device: str = Device.GPU,
    replicas: int = 1,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    options: Mapping[str, Any] | None = None,
    served_name: str = "",
    power_limit_watts: int | None = None,
    engine_version: str | None = None,
) -> ProfileVersion:
    """A version of a profile that does not exist; nothing is stored. Raises Invalid with fields."""
    problems = Problems()
    version = checked_version(
        problems,
        {
            "model": model,
            "engine": engine,
            "device": device,
            "replicas": replicas,
            "tensor_parallel_size": tensor_parallel_size,
            "pipeline_parallel_size": pipeline_parallel_size,
            "served_name": served_name,
            "options": options or {},
            "power_limit_watts": power_limit_watts,
            "engine_version": engine_version,
        },
    )
    problems.raise_if_any()
    return ProfileVersion(profile=Profile(slug="", name=f"{model.name}, not saved"), number=0, **version)
