"""The panel's own YAML of a profile: written by the export, read back without loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from apps.profiles.recipes.result import Recipe, RecipeError

MARK = "rigpanel_profile"
FORMAT = 1
WORDS = ("slug", "name", "description", "engine", "device", "served_name")
SIZES = ("replicas", "tensor_parallel_size", "pipeline_parallel_size")
MAY_BE_UNSET = {"power_limit_watts": int, "engine_version": str}
KNOWN = frozenset({MARK, "model", "members_may_switch", "options", *WORDS, *SIZES, *MAY_BE_UNSET})


def write_own(fields: Mapping[str, Any]) -> str:
    """YAML of a profile's fields, ``model`` as its slug."""
    ordered = {MARK: FORMAT, **{name: fields[name] for name in ("slug", "name", "model", "engine", "device", *SIZES)}}
    ordered |= {name: fields[name] for name in ("served_name", "members_may_switch", "description", "options")}
    ordered |= {name: fields[name] for name in MAY_BE_UNSET if fields.get(name) is not None}
    # A width without end: folding would be read back well, but a person's diff should not move.
    return yaml.dump(ordered, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**6)


class _Dumper(yaml.SafeDumper):
    """Quotes what YAML would fold away: its other line breaks, which a plain or single-quoted word loses."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        style = '"' if any(c in text for c in "\x85\u2028\u2029\ufeff") else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _Dumper.represent_text)


def is_own(data: Any) -> bool:
    return isinstance(data, Mapping) and MARK in data


def read_own(data: Mapping[Any, Any]) -> Recipe:
    """Raises RecipeError for a file of another format, or with a field of the wrong type."""
    if data[MARK] != FORMAT:
        raise RecipeError(
            f"This profile was exported in format {str(data[MARK])[:20]}; this panel reads format {FORMAT}."
        )
    recipe = Recipe(exact=True)
    for name, value in data.items():
        if name not in KNOWN:
            recipe.miss(f"{name}: …", "A profile has no such field.")
        elif name in WORDS or name == "model":
            _typed(name, value, str)
            setattr(recipe, name, value)
        elif name in SIZES:
            _typed(name, value, int)
            setattr(recipe, name, value)
        elif name in MAY_BE_UNSET:
            _typed(name, value, MAY_BE_UNSET[name])
            setattr(recipe, name, value)
        elif name == "members_may_switch":
            _typed(name, value, bool)
            recipe.members_may_switch = value
        elif name == "options":
            _typed(name, value, dict)
            recipe.options = value
        if name in KNOWN and name not in (MARK, "options"):
            recipe.take(f"{name}: {value}", "taken as it is")
        elif name == "options":
            for key, one in value.items():
                recipe.take(f"{key}: {one}", f"{key} = {one}")
    if not recipe.model:
        raise RecipeError("This profile names no model.")
    return recipe


def _typed(name: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise RecipeError(f"{name} must be {'a number' if kind is int else 'text' if kind is str else kind.__name__}.")
