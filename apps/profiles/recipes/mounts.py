"""What a container must see of this disk for a command line, and the command line as it stands in there."""

from __future__ import annotations

import json
import re
from pathlib import PurePosixPath
from typing import Any

INSIDE = PurePosixPath("/models")
# Keys of an object that name a file or folder; any other word that begins with a slash is left as it is.
PATH_KEY = re.compile(r"(?:\A|_)(?:model|tokenizer|path|dir|file)\Z")
TEMPLATE = re.compile(r"\{\{|\{%|\n")


def contained(args: list[str]) -> tuple[list[str], dict[PurePosixPath, PurePosixPath]]:
    """The arguments with every absolute path where the container has it, and what is mounted: folders and files of
    this disk, each with its place inside. Nothing is looked up on the disk."""
    mounts: dict[PurePosixPath, PurePosixPath] = {}
    return [_argument(word, mounts) for word in args], mounts


def _argument(word: str, mounts: dict[PurePosixPath, PurePosixPath]) -> str:
    if word.startswith("{"):
        try:
            value = json.loads(word)
        except ValueError:
            return word  # a template
        moved = _values(value, mounts)
        return word if moved == value else json.dumps(moved, separators=(",", ":"), sort_keys=True)
    return _moved(word, mounts) if word.startswith("/") and not TEMPLATE.search(word) else word


def _values(value: Any, mounts: dict[PurePosixPath, PurePosixPath]) -> Any:
    if isinstance(value, list):
        return [_values(one, mounts) for one in value]
    if not isinstance(value, dict):
        return value
    return {
        key: _moved(one, mounts)
        if isinstance(one, str) and one.startswith("/") and PATH_KEY.search(key)
        else _values(one, mounts)
        for key, one in value.items()
    }


def _moved(word: str, mounts: dict[PurePosixPath, PurePosixPath]) -> str:
    path = PurePosixPath(word)
    root = _root(path)
    if root not in mounts:
        taken, number, place = set(mounts.values()), 1, INSIDE / root.name
        while place in taken:
            number += 1
            place = INSIDE / f"{number}-{root.name}"
        mounts[root] = place
    return str(mounts[root] / path.relative_to(root))


def _root(path: PurePosixPath) -> PurePosixPath:
    """What to mount for a path. A snapshot of a hub's cache is links to the blobs two folders up; a GGUF may be the
    first of several, and what belongs to it lies beside it."""
    for folder in path.parents:
        if folder.name == "snapshots" and folder.parent.name.startswith("models--"):
            return folder.parent
    beside = path.suffix.lower() == ".gguf" and path.parent.name
    return path.parent if beside else path
