"""Checks a profile's engine options: typed, bounded, and a helpful word for what is not known."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from apps.engines.protocol import InvalidOptions, OptionError

# What may reach a command line as text. Nothing goes through a shell; this keeps control
# characters out, and a leading dash, which would read as another flag.
SAFE_TEXT = re.compile(r"[^\x00-\x1f\x7f-][^\x00-\x1f\x7f]*\Z")

PANEL_OWNED = {
    "host": "the panel chooses the address",
    "port": "the panel chooses a free port",
    "api_key": "the panel makes a key of its own for every launch",
    "api_key_file": "the panel makes a key of its own for every launch",
    "served_model_name": "the name comes from the profile's served name",
    "alias": "the name comes from the profile's served name",
    "model": "the model comes from the profile",
    "device_ids": "the panel pins the GPUs that it reserved",
    "tensor_parallel_size": "it comes from the profile's layout",
    "pipeline_parallel_size": "it comes from the profile's layout",
    "data_parallel_size": "replicas come from the profile's layout; data_parallel puts them behind one vLLM server",
}


class Options(BaseModel):
    """Base of the engines' option models. ``None`` leaves a choice to the engine."""

    model_config = ConfigDict(extra="forbid")


OptionsModel = TypeVar("OptionsModel", bound=Options)


def check_options(
    model: type[OptionsModel],
    options: Mapping[str, Any],
    *,
    owned: Mapping[str, str] = PANEL_OWNED,
    removed: Mapping[str, str] | None = None,
) -> OptionsModel:
    """Validate ``options``; raises InvalidOptions with one entry for each thing wrong.

    ``owned`` are options that the panel sets itself, ``removed`` ones that existed once: both
    map a name to the sentence that a person should read. Dashes count as underscores.
    """
    errors: list[OptionError] = []
    known: dict[str, Any] = {}
    for typed, value in options.items():
        name = normalise_name(typed)
        if name in model.model_fields:
            known[name] = value
        elif name in owned:
            errors.append(OptionError(typed, f"Not to be set here: {owned[name]}."))
        elif removed and name in removed:
            errors.append(OptionError(typed, removed[name]))
        else:
            errors.append(OptionError(typed, _unknown(name, tuple(model.model_fields))))
    try:
        checked = model.model_validate(known)
    except ValidationError as error:
        errors += [
            OptionError(str(part["loc"][0]) if part["loc"] else "options", _sentence(part["msg"]))
            for part in error.errors()
        ]
        raise InvalidOptions(errors) from error
    if errors:
        raise InvalidOptions(errors)
    return checked


def set_options(checked: Options) -> dict[str, Any]:
    """What was really set, in the model's order: the normal form that a profile version stores."""
    return {k: v for k, v in checked.model_dump(mode="json").items() if v is not None}


def normalise_name(name: str) -> str:
    """``--max-model-len`` and ``max-model-len`` mean ``max_model_len``."""
    return name.strip().lstrip("-").replace("-", "_")


def nearest(name: str, known: tuple[str, ...]) -> str | None:
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return found[0] if found else None


def safe_text(value: str, what: str) -> str:
    """For names and paths of the model itself. Raises InvalidOptions."""
    if not SAFE_TEXT.match(value):
        raise InvalidOptions(
            [OptionError(what, f"{value!r} cannot be used: it is empty, starts with '-' or has control characters.")]
        )
    return value


def _unknown(name: str, known: tuple[str, ...]) -> str:
    similar = nearest(name, known)
    return f"Unknown option. Did you mean {similar}?" if similar else "Unknown option, and no known one is similar."


def _sentence(message: str) -> str:
    message = message.removeprefix("Value error, ")
    return message[:1].upper() + message[1:] + ("" if message.endswith((".", "?")) else ".")
