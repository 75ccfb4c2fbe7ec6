"""What of a start is not on the rig, for lists and for the gateway: nothing here loads an engine or the planner."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path

from django.conf import settings

from apps.catalog.selectors import weights_path, weights_paths
from apps.engines.protocol import EngineKind
from apps.installs.selectors import engines_ready
from apps.profiles.models import Device, ProfileVersion
from apps.rigs.models import Rig


class Lack(StrEnum):
    """What of a start is not on the rig."""

    ENGINE = "engine"
    WEIGHTS = "weights"


def runs_simulated(version: ProfileVersion, rig: Rig) -> bool:
    """On a simulated rig the simulated engine stands in for whatever needs a GPU; on the CPU the real one runs."""
    return version.engine == EngineKind.SIMULATED or (rig.is_simulated and version.device == Device.GPU)


def lacking(versions: Iterable[ProfileVersion], rig: Rig) -> dict[int, Lack]:
    """By version id what a start would miss first; versions that miss neither engine nor weights are left out.

    For lists: two queries however many versions, none where all of them run simulated."""
    real = [version for version in versions if not runs_simulated(version, rig)]
    if not real:
        return {}
    engines, paths = engines_ready(rig.slug), weights_paths(rig.slug)
    found: dict[int, Lack] = {}
    for version in real:
        if version.engine not in engines:
            found[version.pk] = Lack.ENGINE
        elif is_absent(_source(version, paths.get(version.model_id)), rig):
            found[version.pk] = Lack.WEIGHTS
    return found


def model_source(version: ProfileVersion, rig: Rig) -> str:
    """Where the engine loads the model from: this rig's weights, else the checkpoint's name."""
    return _source(version, weights_path(version.model, rig.slug))


def is_absent(source: str, rig: Rig) -> bool:
    """Whether a path on this machine leads nowhere; a name the engine looks up itself, another rig's disk nobody here
    can see."""
    return rig.slug == settings.RIG_NAME and Path(source).is_absolute() and not Path(source).exists()


def _source(version: ProfileVersion, weights: str | None) -> str:
    if weights is not None:
        return weights
    checkpoint = version.model.checkpoint or version.model.hf_repo
    if checkpoint.endswith(".gguf") and not Path(checkpoint).is_absolute():
        return str(settings.MODELS_DIR / checkpoint)
    return checkpoint
