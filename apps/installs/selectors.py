"""Reads of engine installs."""

from __future__ import annotations

from typing import Any

from django.db.models import QuerySet

from apps.common.errors import NotFound
from apps.installs.models import EngineInstall, InstallState


def install_list(rig_name: str = "") -> QuerySet[EngineInstall]:
    """Without the removed ones, by engine and name."""
    installs = EngineInstall.objects.exclude(state=InstallState.REMOVED).order_by("rig_name", "engine", "name")
    return installs.filter(rig_name=rig_name) if rig_name else installs


def install_get(reference: str | int) -> EngineInstall:
    """By id. Raises NotFound."""
    found = None
    if str(reference).isdecimal() and len(str(reference)) < 19:
        found = EngineInstall.objects.filter(pk=int(reference)).first()
    if found is None:
        raise NotFound(f"There is no engine install {str(reference)[:40]!r}.")
    return found


def install_for(rig_name: str, engine: str, version: str | None = None) -> EngineInstall | None:
    """The install that serves ``engine`` on a rig: the one of ``version`` where it is there, else what a person set
    up goes before what the panel installed, and the newest before older ones."""
    ready = EngineInstall.objects.filter(rig_name=rig_name, engine=engine, state=InstallState.READY)
    ready = ready.order_by("managed", "-pk")
    return (ready.filter(version=version).first() if version else None) or ready.first()


def engines_ready(rig_name: str) -> set[str]:
    """The engines that have an install to serve with on a rig."""
    ready = EngineInstall.objects.filter(rig_name=rig_name, state=InstallState.READY)
    return set(ready.values_list("engine", flat=True))


def flags_known(engine: str) -> dict[str, Any]:
    """The flags that any ready vLLM has, with what its help tells of each; {} where none told its own."""
    if engine != "vllm":
        return {}
    known: dict[str, Any] = {}
    for flags in EngineInstall.objects.filter(engine=engine, state=InstallState.READY).values_list("flags", flat=True):
        known |= flags or {}
    return known


def starter_is_installed(rig_name: str) -> bool:
    """Whether the smallest engine is there; the home page offers it where it is not."""
    return install_for(rig_name, "llama_cpp") is not None
