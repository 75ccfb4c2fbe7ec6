"""What the flags of both engines have in common when they become a profile's options; each is accounted for."""

from __future__ import annotations

import json
import re
from typing import Any

from apps.engines.options import nearest
from apps.engines.protocol import InvalidOptions
from apps.engines.registry import adapter
from apps.profiles.recipes.result import Recipe

NUMBER = re.compile(r"-\d")
KEY_DROPPED = "A secret: it was neither kept nor shown; the panel makes a key of its own for every launch."


def accepts(engine: str, name: str, value: Any) -> tuple[Any, str]:
    """(the value in its normal form, "") or (None, the sentence why not)."""
    try:
        return adapter(engine).check({name: value}).get(name), ""
    except InvalidOptions as error:
        return None, error.errors[0].message


def set_option(recipe: Recipe, text: str, name: str, value: Any) -> None:
    normal, why = accepts(recipe.engine, name, value)
    if why:
        recipe.miss(text, f"{name}: {why}")
        return
    before = recipe.options.get(name)
    recipe.options[name] = normal
    shown = normal if isinstance(normal, str) else json.dumps(normal)
    recipe.take(text, f"{name} = {shown}" + (" (the last of several)" if before not in (None, normal) else ""))


def is_value(word: str | None) -> bool:
    return word is not None and (not word.startswith("-") or bool(NUMBER.match(word)) or word == "-")


def set_size(recipe: Recipe, text: str, field: str, value: str | None) -> None:
    if value is not None and value.isdecimal() and 1 <= int(value[:6]) <= 64 and len(value) <= 3:
        setattr(recipe, field, int(value))
        recipe.take(text, f"{field} = {int(value)}")
    else:
        recipe.miss(text, f"{field}: use a whole number from 1 to 64.")


def served_names(recipe: Recipe, text: str, values: list[str]) -> None:
    if not values:
        recipe.miss(text, "The name is missing.")
        return
    recipe.served_name = values[0]
    recipe.take(f"--served-model-name {values[0]}", f"served name {values[0]}")
    if len(values) > 1:
        recipe.miss(" ".join(values[1:]), "A profile answers to one name; make aliases of the others.")


def unknown(flag: str, known: tuple[str, ...]) -> str:
    similar = nearest(flag, known)
    return f"A profile has no such option{f'; the nearest is {similar}' if similar else ''}."
