"""What a kind of job does: named steps, and what to do when they are given up.

Higher apps register their handlers in ``AppConfig.ready``. A step must be safe to run twice: a
killed worker's job is carried on from the last *finished* step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from django.utils.module_loading import import_string

if TYPE_CHECKING:
    from apps.jobs.models import Job
    from apps.jobs.runner import JobContext


class JobFailed(Exception):
    """The work said no: rig, engine or input. ``evidence`` is kept with the job (log tail, exit code, cause)."""

    def __init__(self, message: str, **evidence: Any) -> None:
        super().__init__(message)
        self.message = message
        self.evidence = evidence


class JobCancelled(Exception):
    """Somebody cancelled the job, or a later one superseded it."""


class LeaseLost(Exception):
    """Another worker has taken the job over: stop at once and touch nothing more."""


@dataclass(frozen=True, slots=True)
class Step:
    """``run`` gets the context and may return a detail for people. ``weight`` is its share of the
    progress bar where no history of this rig tells better. ``undo_cancellable``: of a step that puts things right,
    that a cancel ends it too; the steps after it still run."""

    name: str
    title: str
    run: Callable[[JobContext], str | None]
    weight: float = 1.0
    cancellable: bool = True
    undo_cancellable: bool = False


class JobHandler(Protocol):
    kind: str

    def steps(self, job: Job) -> Sequence[Step]:
        """The steps in order; the same for the whole life of a job."""

    def compensation(self, job: Job) -> Sequence[Step]:
        """Runs after ``job.failure`` was stored (failed, cancelled or errored), to put things right."""

    def summary(self, job: Job) -> dict[str, Any]:
        """The result of a job that succeeded: at least ``{"summary": sentence}``."""


_handlers: dict[str, str | JobHandler] = {}


def register(kind: str, handler: str | JobHandler) -> None:
    """``handler`` is the dotted path of a class without arguments, loaded with the first job of its kind:
    web and gateway know the kinds, but only workers pay for the engines behind them."""
    _handlers[kind] = handler


def handler_for(kind: str) -> JobHandler:
    found = _handlers[kind]
    if isinstance(found, str):
        found = _handlers[kind] = import_string(found)()
    return found


def known_kinds() -> list[str]:
    return sorted(_handlers)
