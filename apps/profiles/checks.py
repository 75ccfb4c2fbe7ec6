"""What a profile version must be like before it is stored. Raises Invalid with a sentence per field."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from apps.catalog.models import Model
from apps.common.errors import Invalid
from apps.engines.protocol import InvalidOptions
from apps.engines.registry import check_for
from apps.installs.selectors import flags_known
from apps.profiles.models import Device, Engine

SLUG = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*\Z")
# A model's id in requests: what people type into clients. No leading dash, no space.
SERVED_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]*\Z")
RESERVED_SLUGS = frozenset({"new", "recipe"})
CONTROL = re.compile(r"[\x00-\x1f\x7f]")
OPTIONS_MAX_CHARACTERS = 20_000
MAX_GPUS = 64
CPU_ENGINES = (Engine.LLAMA_CPP, Engine.VLLM, Engine.RAY_SERVE, Engine.SIMULATED)


class Problems:
    """Collects what is wrong, so that a person sees all of it at once."""

    def __init__(self) -> None:
        self.fields: dict[str, list[str]] = {}

    def add(self, field: str, sentence: str) -> None:
        self.fields.setdefault(field, []).append(sentence)

    def raise_if_any(self) -> None:
        if self.fields:
            first = next(iter(self.fields.values()))[0]
            more = sum(map(len, self.fields.values())) - 1
            rest = f" ({more} more)" if more else ""
            raise Invalid(f"This profile cannot be stored: {first}{rest}", fields=self.fields)


def checked_words(problems: Problems, *, slug: str | None, name: str, description: str, note: str) -> None:
    if slug is not None and (len(slug) > 100 or not SLUG.match(slug)):
        problems.add("slug", "Use lowercase letters, digits and single dashes, at most 100.")
    if slug in RESERVED_SLUGS:
        problems.add("slug", f"{slug} is the address of another page; choose another word.")
    if slug is not None and slug.isdecimal():
        problems.add("slug", "It needs a letter: a number alone would be taken for an id.")
    if not name.strip() or len(name) > 200 or CONTROL.search(name):
        problems.add("name", "Give it a name of at most 200 characters on one line.")
    if len(description) > 5000:
        problems.add("description", "Use at most 5000 characters.")
    if len(note) > 300 or CONTROL.search(note):
        problems.add("note", "Use at most 300 characters on one line.")


def checked_version(problems: Problems, values: Mapping[str, Any]) -> dict[str, Any]:
    """The version's columns, with the options in the engine's normal form."""
    version = dict(values)
    if version["engine"] not in Engine.values:
        problems.add("engine", f"There is no engine {str(version['engine'])[:40]!r}.")
    if version["device"] not in Device.values:
        problems.add("device", "Use gpu or cpu.")
    if version["device"] == Device.CPU and version["engine"] not in CPU_ENGINES:
        problems.add("device", "This engine runs on GPUs only.")
    _layout(problems, version)
    name = version["served_name"] = str(version["served_name"] or "").strip() or version["model"].slug
    if len(name) > 200 or not SERVED_NAME.match(name):
        problems.add("served_name", "Use letters, digits and . _ : / @ + -, beginning with a letter or digit.")
    _power_and_engine(problems, version)
    if "engine" not in problems.fields:
        version["options"] = _options(problems, version["engine"], version["options"])
    return version


def _power_and_engine(problems: Problems, version: dict[str, Any]) -> None:
    watts = version.get("power_limit_watts")
    if watts is not None and (isinstance(watts, bool) or not isinstance(watts, int) or not 50 <= watts <= 1200):
        problems.add("power_limit_watts", "Use whole watts from 50 to 1200, or leave it empty.")
    elif watts is not None and version["device"] == Device.CPU:
        problems.add("power_limit_watts", "On the CPU there is no card to cap.")
    wanted = version["engine_version"] = str(version.get("engine_version") or "").strip() or None
    if wanted is not None and (len(wanted) > 80 or CONTROL.search(wanted)):
        problems.add("engine_version", "Use at most 80 characters on one line.")


def _layout(problems: Problems, version: Mapping[str, Any]) -> None:
    sizes = ("replicas", "tensor_parallel_size", "pipeline_parallel_size")
    for field in sizes:
        value = version[field]
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_GPUS:
            problems.add(field, f"Use a whole number from 1 to {MAX_GPUS}.")
    if any(field in problems.fields for field in sizes):
        return
    per_replica = version["tensor_parallel_size"] * version["pipeline_parallel_size"]
    if version["device"] == Device.CPU and per_replica > 1 and version["engine"] != Engine.VLLM:
        problems.add("tensor_parallel_size", "On the CPU a replica is one process: use 1.")
    if version["replicas"] * per_replica > MAX_GPUS:
        problems.add(
            "replicas", f"This layout needs {version['replicas'] * per_replica} GPUs; {MAX_GPUS} is the limit."
        )
    model: Model = version["model"]
    size = version["tensor_parallel_size"]
    splits_heads = version["engine"] in (Engine.VLLM, Engine.RAY_SERVE)
    if splits_heads and model.attention_heads and model.attention_heads % size:
        problems.add(
            "tensor_parallel_size",
            f"{model.name} has {model.attention_heads} attention heads, which {size} does not divide.",
        )
    elif splits_heads and model.kv_heads and model.kv_heads % size and size % model.kv_heads:
        problems.add(
            "tensor_parallel_size",
            f"{model.name} has {model.kv_heads} KV heads: neither divides the other with {size}.",
        )


def _options(problems: Problems, engine: str, options: Any) -> dict[str, Any]:
    if not isinstance(options, Mapping) or not all(isinstance(key, str) for key in options):
        problems.add("options", "Options are names with values, as a JSON object.")
        return {}
    try:
        text = json.dumps(options)
    except (TypeError, ValueError):
        problems.add("options", "Options must be plain JSON.")
        return {}
    size = len(text)
    if "\\u0000" in text:
        problems.add("options", "An option contains a NUL character; remove it.")
        return {}
    if size > OPTIONS_MAX_CHARACTERS:
        problems.add("options", f"The options are too long: at most {OPTIONS_MAX_CHARACTERS} characters.")
        return {}
    try:
        return check_for(engine, options, flags_known(engine))
    except InvalidOptions as error:
        for one in error.errors:
            problems.add("engine" if one.field == "engine" else "options", _named(one.field, one.message))
        return {}


def _named(field: str, message: str) -> str:
    return message if field in ("engine", "options") else f"{field}: {message}"
