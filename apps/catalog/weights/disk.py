"""What lies in the models folder of this machine, who uses it, and taking it away (kind ``remove_weights``)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from django.conf import settings

from apps.catalog.models import Weights
from apps.catalog.selectors import Usage, usages_of
from apps.catalog.services import weights_forget
from apps.catalog.signals import weights_usage
from apps.catalog.weights.download import size
from apps.catalog.weights.fetch import PART
from apps.common.actors import Actor
from apps.jobs.handlers import JobFailed, Step
from apps.jobs.models import LIVE_STATES, Job
from apps.jobs.runner import JobContext

PLACES_MAX = 500


@dataclass(frozen=True, slots=True)
class Place:
    """One thing below the models folder that is there or taken away as a whole. ``name`` is its path below it,
    ``running`` what runs from it or waits to."""

    name: str
    path: Path
    size_bytes: int
    files: int
    unfinished: bool = False
    weights: list[Weights] = field(default_factory=list)  # two quantizations of a repository may share a folder
    profiles: list[Usage] = field(default_factory=list)
    running: list[Usage] = field(default_factory=list)
    fetching: int | None = None  # the download job that writes into it

    @property
    def in_use(self) -> bool:
        return bool(self.running) or self.fetching is not None


@dataclass(frozen=True, slots=True)
class Disk:
    folder: str
    total_bytes: int
    free_bytes: int
    places: list[Place]
    elsewhere: list[Weights]  # registered, but not below the models folder
    problem: str = ""

    @property
    def used_by_models_bytes(self) -> int:
        return sum(p.size_bytes for p in self.places)


def disk_report() -> Disk:
    root = Path(settings.MODELS_DIR)
    known = list(Weights.objects.filter(rig_name=settings.RIG_NAME).select_related("model"))
    try:
        usage = shutil.disk_usage(root)
        named = paths_named_by_processes()
        places = [_place(name, path, known, named) for name, path in _units(root)]
    except OSError as error:
        return Disk(str(root), 0, 0, [], known, f"{root} cannot be read: {error.strerror}.")
    inside = {w.pk for p in places for w in p.weights}
    places.sort(key=lambda p: (-p.size_bytes, p.name))
    return Disk(str(root), usage.total, usage.free, places, [w for w in known if w.pk not in inside])


def place_get(name: str) -> Place | None:
    """By its name below the models folder; None where no such unit lies there."""
    root = Path(settings.MODELS_DIR)
    known = list(Weights.objects.filter(rig_name=settings.RIG_NAME).select_related("model"))
    with suppress(OSError):
        for unit, path in _units(root):
            if unit == name:
                return _place(unit, path, known, paths_named_by_processes())
    return None


def _units(root: Path) -> list[tuple[str, Path]]:
    """A folder with files of its own is one thing; one with folders only (a model with its revisions) holds several.
    The hub's own cache keeps one folder per repository."""
    found: list[tuple[str, Path]] = []
    for entry in sorted(root.iterdir()):
        if entry.name.startswith(".") or not os.access(entry, os.R_OK | (os.X_OK if entry.is_dir() else 0)):
            continue  # lost+found of a disk of its own: root's, and nothing that could be taken away
        if entry.is_symlink() or entry.is_file() or entry.name.startswith("models--"):
            found.append((entry.name, entry))
            continue
        children = [c for c in sorted(entry.iterdir()) if not c.name.startswith(".")]
        if any(c.is_file() for c in children):
            found.append((entry.name, entry))
            # Revisions may stand beside a file that was put here by hand.
            found += [(f"{entry.name}/{c.name}", c) for c in children if c.is_dir() and (c / ".lock").exists()]
        else:
            found += [(f"{entry.name}/{c.name}", c) for c in children]
    return found[:PLACES_MAX]


def _measure(path: Path, without: Sequence[Path] = ()) -> tuple[int, int, bool]:
    """(bytes on the disk, files, whether a beginning of a file is among them); each inode once."""
    total, count, unfinished = 0, 0, False
    seen: set[tuple[int, int]] = set()
    if path.is_symlink():
        return 0, 1, False
    walk = os.walk(path) if path.is_dir() else [(str(path.parent), [], [path.name])]
    for folder, folders, names in walk:
        folders[:] = [f for f in folders if Path(folder, f) not in without]
        for name in names:
            with suppress(OSError):
                stat = os.lstat(os.path.join(folder, name))
                if (stat.st_dev, stat.st_ino) in seen or name == ".lock":
                    continue
                seen.add((stat.st_dev, stat.st_ino))
                total += stat.st_blocks * 512
                count += 1
                unfinished |= name.endswith(PART)
    return total, count, unfinished


def _revisions_inside(path: Path) -> list[Path]:
    return [c for c in path.iterdir() if (c / ".lock").exists()] if path.is_dir() and not path.is_symlink() else []


def _place(name: str, path: Path, known: Iterable[Weights], named: Sequence[tuple[Path, Usage]]) -> Place:
    inner = _revisions_inside(path)
    total, files, unfinished = _measure(path, inner)
    weights = [w for w in known if _holds(path, Path(w.path), inner)]
    jobs = Job.objects.filter(kind="download", rig_name=settings.RIG_NAME, state__in=LIVE_STATES)
    fetching = next((j.pk for j in jobs if str(j.data.get("folder", "")) == str(path)), None)
    return Place(
        name=name,
        path=path,
        size_bytes=total,
        files=files,
        unfinished=unfinished,
        weights=weights,
        profiles=[usage for w in weights for usage in usages_of(w.model)],
        running=running_from(path, inner, named),
        fetching=fetching,
    )


def _holds(place: Path, target: Path, inner: Sequence[Path]) -> bool:
    """The models folder may be a link to another disk: what was registered there is known by its real path."""
    target = Path(os.path.realpath(target))
    return target.is_relative_to(os.path.realpath(place)) and not any(
        target.is_relative_to(os.path.realpath(i)) for i in inner
    )


def paths_named_by_processes() -> list[tuple[Path, Usage]]:
    """Below the models folder, from every command line on this machine: also engines that the panel did not start."""
    roots = {str(settings.MODELS_DIR), os.path.realpath(settings.MODELS_DIR)}
    found = []
    for process in psutil.process_iter(["pid", "name", "cmdline"]):
        for word in process.info["cmdline"] or []:
            if any(root in word for root in roots):
                usage = Usage(f"process {process.info['pid']}", "", str(process.info["name"] or ""))
                found.append((Path(word.partition("=")[2] or word), usage))
    return found


def running_from(place: Path, inner: Sequence[Path], named: Sequence[tuple[Path, Usage]]) -> list[Usage]:
    """What the higher apps say runs from below ``place``, else the processes that name it."""
    told: list[Usage] = []
    for path in dict.fromkeys((str(place), os.path.realpath(place))):
        answers: list[tuple[Any, Any]] = weights_usage.send(sender=Weights, rig_name=settings.RIG_NAME, path=path)
        told += [usage for _, answer in answers for usage in answer]
    return told or [usage for path, usage in named if _holds(place, path, inner)]


class RemovalHandler:
    kind = "remove_weights"

    def steps(self, job: Job) -> Sequence[Step]:
        return (Step("remove", "Delete the files", remove_files, cancellable=False),)

    def compensation(self, job: Job) -> Sequence[Step]:
        return ()

    def summary(self, job: Job) -> dict[str, Any]:
        return {"summary": f"{job.params['place']} is deleted; {size(job.data.get('freed_bytes', 0))} are free again."}


def remove_files(context: JobContext) -> str:
    name = str(context.job.params["place"])
    place = place_get(name)
    if place is None:
        return "already gone"
    refuse_if_used(place)
    context.save_data(freed_bytes=place.size_bytes)
    for weights in place.weights:
        weights_forget(weights, actor=Actor("", context.job.user_name, context.job.user_id))
    if place.path.is_symlink() or place.path.is_file():
        place.path.unlink()
    elif inner := _revisions_inside(place.path):
        for child in place.path.iterdir():
            if child not in inner:
                shutil.rmtree(child) if child.is_dir() and not child.is_symlink() else child.unlink()
    else:
        shutil.rmtree(place.path)
        with suppress(OSError):
            if place.path.parent != Path(settings.MODELS_DIR):
                place.path.parent.rmdir()  # the model's folder, when this was its last revision
    return f"{size(place.size_bytes)} freed"


def refuse_if_used(place: Place) -> None:
    """Raises JobFailed."""
    if place.running:
        first = place.running[0]
        raise JobFailed(
            f"{place.name} is in use by {first.label}{f' ({first.detail})' if first.detail else ''}. "
            "Stop or cancel that first.",
            cause="in_use",
        )
    if place.fetching is not None:
        raise JobFailed(f"Download {place.fetching} writes into {place.name}. Cancel it first.", cause="in_use")
