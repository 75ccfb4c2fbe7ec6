"""What was read from a pasted text: profiles as far as they were understood, and a word for everything else."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

TEXT_SHOWN = 200


class RecipeError(Exception):
    """The text as a whole cannot be read; the sentence says why."""


@dataclass(frozen=True, slots=True)
class Note:
    """A piece of the text, with secrets taken out, and the sentence what became of it."""

    text: str
    sentence: str


@dataclass(slots=True)
class Recipe:
    """One profile, as far as the text tells. ``model`` is what the text calls it: a repository, folder or file.

    Every piece of the text is in exactly one of ``understood``, ``left_out`` (the panel does it itself, or differently)
    and ``not_understood``. ``exact`` marks the panel's own YAML, whose every field is taken as it is.
    """

    engine: str = ""
    model: str = ""
    served_name: str = ""
    name: str = ""
    slug: str = ""
    description: str = ""
    members_may_switch: bool = False
    device: str = "gpu"
    replicas: int = 1
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    power_limit_watts: int | None = None
    engine_version: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    exact: bool = False
    understood: list[Note] = field(default_factory=list)
    left_out: list[Note] = field(default_factory=list)
    not_understood: list[Note] = field(default_factory=list)

    def take(self, text: str, became: str) -> None:
        self.understood.append(Note(short(text), became))

    def leave(self, text: str, why: str) -> None:
        self.left_out.append(Note(short(text), why))

    def miss(self, text: str, why: str) -> None:
        self.not_understood.append(Note(short(text), why))


@dataclass(slots=True)
class Reading:
    """All profiles of a text, and notes about what belongs to none of them."""

    recipes: list[Recipe] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    shell_characters: int = 0  # read so far of lines that are given to a shell

    def note(self, text: str, sentence: str) -> None:
        self.notes.append(Note(short(text), sentence))


def short(text: str) -> str:
    from apps.profiles.recipes.hidden import redact

    text = redact(" ".join(text.split()))
    return text if len(text) <= TEXT_SHOWN else text[: TEXT_SHOWN - 1] + "…"
