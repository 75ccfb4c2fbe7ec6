"""All engines in one visible place. Modules load when they are asked for: the web process shows
profiles without importing every adapter."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from apps.engines.protocol import EngineAdapter, EngineKind, InvalidOptions, OptionError

ADAPTERS = {
    EngineKind.LLAMA_CPP: "apps.engines.llama_cpp.adapter:LlamaCppAdapter",
    EngineKind.RAY_SERVE: "apps.engines.ray_serve.adapter:RayServeAdapter",
    EngineKind.SIMULATED: "apps.engines.simulated.adapter:SimulatedAdapter",
    EngineKind.VLLM: "apps.engines.vllm.adapter:VllmAdapter",
}

_loaded: dict[EngineKind, EngineAdapter] = {}


def servers_of(kind: EngineKind | str, options: Mapping[str, Any], replicas: int) -> int:
    """How many servers stand before that many replicas: one each, unless the engine spreads requests itself."""
    one_server = getattr(adapter(kind), "one_server_for_all", None)
    return 1 if one_server is not None and one_server(options) else replicas


def check_for(kind: EngineKind | str, options: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """Check options by the flags of the install that would run them (``{}``: not known). Raises InvalidOptions."""
    engine = adapter(kind)
    by_flags = getattr(engine, "check_against", None)
    checked: dict[str, Any] = engine.check(options) if by_flags is None else by_flags(flags, options)
    return checked


def adapter(kind: EngineKind | str) -> EngineAdapter:
    """The adapter of one engine. Raises InvalidOptions for a kind that is not served."""
    try:
        kind = EngineKind(kind)
    except ValueError as error:
        known = ", ".join(ADAPTERS)
        raise InvalidOptions([OptionError("engine", f"There is no engine {kind!r}; known are {known}.")]) from error
    if kind not in _loaded:
        module, _, name = ADAPTERS[kind].partition(":")
        _loaded[kind] = getattr(import_module(module), name)()
    return _loaded[kind]
