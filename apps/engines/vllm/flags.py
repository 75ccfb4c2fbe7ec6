"""The flags of one vLLM, read from its own ``vllm serve --help=all``.

The help text is argparse's: a flag at two spaces, its metavar or choices behind it, its words below, with
``(default: …)`` at the end. What type a value has is told only by these, so that is what is used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from typing import Any

HELP_ARGUMENTS = ("serve", "--help=all")
SHIPPED = Path(__file__).with_name(
    "flags.json"
)  # of 0.32; what a profile is checked against before it meets an install


class FlagKind(StrEnum):
    SWITCH = "switch"  # no value; ``--no-…`` where ``negatable``
    WHOLE = "whole"
    NUMBER = "number"
    TEXT = "text"
    JSON = "json"
    LIST = "list"


@dataclass(frozen=True, slots=True)
class Flag:
    """``name`` is without dashes in front and with underscores. ``choices`` is empty where any value goes."""

    name: str
    kind: FlagKind
    choices: tuple[str, ...] = ()
    negatable: bool = False
    default: str = ""

    def to_dict(self) -> dict[str, Any]:
        said: dict[str, Any] = {"kind": str(self.kind)}
        if self.choices:
            said["choices"] = list(self.choices)
        if self.negatable:
            said["negatable"] = True
        if self.default:
            said["default"] = self.default
        return said


Flags = Mapping[str, Flag]
ENTRY = re.compile(r"^  (--?[A-Za-z0-9][^\n]*)$", re.MULTILINE)
SPELLING = re.compile(r"--([a-zA-Z0-9][\w-]*)")
CHOICES = re.compile(r"[{\[]([^{}\[\]]*)[}\]]")
DEFAULT = re.compile(r"\(default:\s*(.*?)\)\s*\Z", re.DOTALL)
WHOLE = re.compile(r"-?\d+\Z")
NUMBER = re.compile(r"-?\d+\.\d*(e-?\d+)?\Z")
# Whole numbers whose default is None or computed, so that the default does not tell.
COUNTS = re.compile(
    r"_(size|size_local|len|num|count|seqs|reqs|tokens|bytes|blocks|override|rank|threads|workers|port|loras|interval)\Z"
    r"|\Aseed\Z"
)
OBJECTS = re.compile(r"_(kwargs|config|overrides|loras|per_prompt|priority)\Z")
NO_OBJECTS = frozenset({"generation_config", "max_loras", "max_cpu_loras", "enable_moe_shared_loras"})
DEFAULT_SHOWN = 40  # characters; some defaults are whole configurations


def parse_help(text: str) -> dict[str, Flag]:
    """Flags by name. Empty where the text is not vLLM's help."""
    found: dict[str, Flag] = {}
    starts = list(ENTRY.finditer(text))
    ends = [following.start() for following in starts[1:]] + [len(text)]
    for start, end in zip(starts, ends, strict=False):
        words = text[start.end() : end]
        # A group's heading stands at the left margin and ends the words of the flag before it.
        words = re.split(r"\n(?=\S)", words, maxsplit=1)[0]
        # The words may begin on the flag's own line, behind at least two spaces.
        head, _, behind = start[1].partition("  ")
        flag = _flag(head.strip(), f"{behind} {words}")
        if flag is not None:
            found[flag.name] = flag
    return found


def _flag(head: str, words: str) -> Flag | None:
    spelled = SPELLING.findall(head)
    names = [name.replace("-", "_") for name in spelled if not name.startswith("no-")]
    if not names or names[0] == "help":
        return None
    name = names[0]
    value = head.split(", ")[0].partition(" ")[2].strip()
    default_match = DEFAULT.search(words)
    default = " ".join(default_match[1].split()) if default_match else ""
    default = default if len(default) <= DEFAULT_SHOWN else ""
    negatable = f"--no-{spelled[0]}" in head
    if not value:
        return Flag(name, FlagKind.SWITCH, (), negatable, default)
    if value.endswith("...]"):
        return Flag(name, FlagKind.LIST, (), False, default)
    whole_head = head[head.index(value) :]
    choices = CHOICES.match(whole_head)
    if choices is not None and "," in choices[1]:
        listed = tuple(c.strip().strip("'\"") for c in choices[1].split(","))
        listed = tuple(c for c in listed if c != "None")
        whole = all(c.isdecimal() for c in listed)
        return Flag(name, FlagKind.WHOLE if whole else FlagKind.TEXT, listed, False, default)
    return Flag(name, _kind(name, default), (), False, default)


def _kind(name: str, default: str) -> FlagKind:
    if name not in NO_OBJECTS and (default.startswith("{") or OBJECTS.search(name)):
        return FlagKind.JSON
    if NUMBER.match(default) or re.search(r"_(gb|s|seconds|rate|margin)\Z", name):
        return FlagKind.NUMBER
    if WHOLE.match(default) or COUNTS.search(name):
        return FlagKind.WHOLE
    return FlagKind.TEXT


def flags_to_dict(flags: Flags) -> dict[str, Any]:
    """Plain JSON, for the install's row."""
    return {name: flag.to_dict() for name, flag in flags.items()}


def flags_from_dict(stored: Mapping[str, Any]) -> dict[str, Flag]:
    return {
        name: Flag(
            name,
            FlagKind(values["kind"]),
            tuple(values.get("choices", ())),
            bool(values.get("negatable")),
            str(values.get("default", "")),
        )
        for name, values in stored.items()
    }


@lru_cache(maxsize=1)
def shipped_flags() -> dict[str, Flag]:
    return flags_from_dict(json.loads(SHIPPED.read_text("utf-8")))
