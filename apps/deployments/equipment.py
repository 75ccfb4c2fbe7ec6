"""Which engine and which weights a profile version would start with on a rig, and what of them is not there."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path

from django.conf import settings

from apps.catalog.selectors import weights_path, weights_paths
from apps.common.errors import Invalid
from apps.engines.protocol import EngineAdapter, EngineKind, Install, InvalidOptions
from apps.engines.registry import adapter, check_for
from apps.engines.simulated.adapter import simulated_install
from apps.installs.selectors import engines_ready, install_for
from apps.profiles.fit import GgufFile
from apps.profiles.gguf import gguf_sizes
from apps.profiles.models import Device, ProfileVersion
from apps.rigs.models import Rig


class Lack(StrEnum):
    """What of a start is not on the rig."""

    ENGINE = "engine"
    WEIGHTS = "weights"


def runs_simulated(version: ProfileVersion, rig: Rig) -> bool:
    """On a simulated rig the simulated engine stands in for whatever needs a GPU; on the CPU the real one runs."""
    return version.engine == EngineKind.SIMULATED or (rig.is_simulated and version.device == Device.GPU)


def engine_adapter(version: ProfileVersion, rig: Rig) -> EngineAdapter:
    """Raises InvalidOptions for an engine that is not served."""
    return adapter(EngineKind.SIMULATED if runs_simulated(version, rig) else EngineKind(version.engine))


def can_start(version: ProfileVersion, rig: Rig) -> bool:
    """Whether engine and weights are there and the options are known; whether it fits is the plan's to say."""
    return not missing(version, rig, runs_simulated(version, rig))


def missing(version: ProfileVersion, rig: Rig, simulated: bool) -> list[str]:
    """Sentences for what forbids a start: engine, options, weights."""
    problems = []
    install = None if simulated else install_for(rig.slug, version.engine, version.engine_version)
    try:
        flags = install.flags if install else None
        check_for(version.engine, version.options, flags if isinstance(flags, dict) else {})
    except InvalidOptions as error:
        problems += [f"Option {e.field}: {e.message}" for e in error.errors]
    if simulated:
        return problems
    if install is None:
        what = (
            "Install the starter engine"
            if version.engine == EngineKind.LLAMA_CPP
            else f"Install {version.get_engine_display()}"
        )
        problems.append(f"{version.get_engine_display()} is not installed on {rig.slug}. {what} first.")
    source = model_source(version, rig)
    if _is_absent(source, rig):
        problems.append(f"The weights of {version.model} are not at {source}. Install or download them first.")
    return problems


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
        elif _is_absent(_source(version, paths.get(version.model_id)), rig):
            found[version.pk] = Lack.WEIGHTS
    return found


def model_source(version: ProfileVersion, rig: Rig) -> str:
    """Where the engine loads the model from: this rig's weights, else the checkpoint's name."""
    return _source(version, weights_path(version.model, rig.slug))


def _is_absent(source: str, rig: Rig) -> bool:
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


def engine_install(version: ProfileVersion, rig: Rig) -> Install:
    """Raises Invalid when the engine is not installed."""
    found = engine_install_or_none(version, rig)
    if found is None:
        raise Invalid(f"{version.get_engine_display()} is not installed on {rig.slug}.")
    return found


def engine_install_or_none(version: ProfileVersion, rig: Rig) -> Install | None:
    if runs_simulated(version, rig):
        return simulated_install()
    found = install_for(rig.slug, version.engine, version.engine_version)
    if found is None:
        return None
    return Install(
        EngineKind(found.engine),
        found.version,
        tuple(found.command),
        dict(found.env),
        flags=found.flags or None,
    )


def engine_label(install: Install | None) -> str:
    """As a deployment keeps it: ``vllm 0.33.0``."""
    return f"{install.kind} {install.version}" if install else ""


def gguf_of(version: ProfileVersion, rig: Rig) -> GgufFile | None:
    """Real tensor sizes, where the file lies on this machine."""
    if version.engine != EngineKind.LLAMA_CPP or rig.slug != settings.RIG_NAME:
        return None
    source = model_source(version, rig)
    return gguf_sizes(source) if source.endswith(".gguf") and Path(source).is_absolute() else None
