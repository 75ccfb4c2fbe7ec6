"""Which engine and which weights a profile version would start with on a rig, and what of them is not there."""

from __future__ import annotations

from pathlib import Path

from django.conf import settings

from apps.common.errors import Invalid
from apps.deployments.lacks import is_absent, model_source, runs_simulated
from apps.engines.protocol import EngineAdapter, EngineKind, Install, InvalidOptions
from apps.engines.registry import adapter, check_for
from apps.engines.simulated.adapter import simulated_install
from apps.installs.selectors import install_for
from apps.profiles.fit import GgufFile
from apps.profiles.gguf import gguf_sizes
from apps.profiles.models import ProfileVersion
from apps.rigs.models import Rig


def engine_adapter(version: ProfileVersion, rig: Rig) -> EngineAdapter:
    """Raises InvalidOptions for an engine that is not served."""
    return adapter(EngineKind.SIMULATED if runs_simulated(version, rig) else EngineKind(version.engine))


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
    if is_absent(source, rig):
        problems.append(f"The weights of {version.model} are not at {source}. Install or download them first.")
    return problems


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
