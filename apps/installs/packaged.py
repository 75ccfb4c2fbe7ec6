"""Installs that are made of packages: an environment of its own per version, pip's words as progress."""

from __future__ import annotations

import platform
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from django.conf import settings
from django.db import transaction

from apps.audit.services import record
from apps.common.actors import Actor
from apps.common.realtime import page_changed
from apps.hardware.detect import nvidia_device_present
from apps.installs.causes import explain
from apps.installs.detection import flags_of, parse_version
from apps.installs.models import EngineInstall, InstallState
from apps.installs.recipes import NotOffered, Produced, Recipe, recipe
from apps.jobs import child
from apps.jobs.handlers import JobFailed, Step
from apps.jobs.models import Job
from apps.jobs.runner import JobContext

MARKER = "rigpanel.installed"
PIP_SECONDS = 4 * 3600.0
PROBE_SECONDS = 300.0  # vLLM imports for tens of seconds, the first time without bytecode


def steps() -> Sequence[Step]:
    return (
        Step("disk", "Look at the disk", check_disk, weight=0.1),
        Step("environment", "Make an environment", make_environment, weight=5),
        Step("packages", "Install the packages", install_packages, weight=120),
        Step("finish", "Put it right for this machine", finish, weight=0.5),
        Step("probe", "Ask the engine for its version and flags", probe, weight=60),
        Step("register", "Register", register, weight=1, cancellable=False),
    )


def recipe_here(name: str, version: str) -> Recipe:
    """Raises NotOffered. Of this machine: a worker asks, not the web process, which may be elsewhere."""
    return recipe(name, version, nvidia=nvidia_device_present(), machine=platform.machine())


def _recipe(job: Job) -> Recipe:
    try:
        return recipe_here(str(job.params["name"]), str(job.params.get("version", "")))
    except NotOffered as no:
        raise JobFailed(str(no), cause="not_offered") from None


def _folder(wanted: Recipe) -> Path:
    return Path(settings.INSTALLS_DIR) / wanted.folder


def _python(wanted: Recipe) -> Path:
    return _folder(wanted) / "bin" / "python"


def is_whole(wanted: Recipe) -> bool:
    try:
        return (_folder(wanted) / MARKER).read_text("utf-8") == wanted.wanted() and _python(wanted).is_file()
    except OSError:
        return False


def check_disk(context: JobContext) -> str:
    wanted = _recipe(context.job)
    if is_whole(wanted):
        return "already there"
    place = Path(settings.INSTALLS_DIR)
    try:
        place.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(place).free
    except OSError as error:
        raise JobFailed(f"{error.filename or place} cannot be used: {error.strerror}.", cause="disk") from error
    if free < wanted.needs_bytes:
        raise JobFailed(
            f"The disk is too full: {wanted.title} needs {wanted.needs_bytes / 1e9:.1f} GB while it is installed, and "
            f"{free / 1e9:.1f} GB are free at {place}. Make room and install again.",
            cause="disk_full",
        )
    return f"{wanted.needs_bytes / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free"


def _interpreter(wanted: Recipe) -> str:
    """A Python for the new environment. Raises JobFailed where the right one is missing."""
    major, minor = wanted.python or sys.version_info[:2]
    name = f"python{major}.{minor}"
    own = Path(sys.base_prefix) / "bin" / name
    if own.is_file():
        return str(own)
    if (found := shutil.which(name)) is not None:
        return found
    if wanted.python in (None, sys.version_info[:2]):
        return sys.executable
    raise JobFailed(
        f"{wanted.title} {wanted.version} needs Python {major}.{minor}, and there is none on this rig. "
        f"Install {name} (with its venv module) and try again.",
        cause="wrong_python",
    )


def make_environment(context: JobContext) -> str:
    wanted = _recipe(context.job)
    folder = _folder(wanted)
    if _python(wanted).is_file() and _starts(context, wanted):
        return "already there"
    interpreter = _interpreter(wanted)
    if folder.exists():
        context.log("A half-finished environment is there; it is made anew.")
        shutil.rmtree(folder)
    try:
        child.run(context, [interpreter, "-m", "venv", str(folder)], on_line=context.log, timeout_seconds=300)
    except child.ChildFailed as failed:
        raise JobFailed(explain(failed, "Making the environment"), log_tail=failed.tail[-15:]) from failed
    return str(folder)


def _starts(context: JobContext, wanted: Recipe) -> bool:
    argv = [str(_python(wanted)), "-c", "import pip, ssl"]
    try:
        child.run(context, argv, on_line=lambda _: None, timeout_seconds=120)
    except (child.ChildFailed, OSError):
        return False
    return True


def install_packages(context: JobContext) -> str:
    wanted = _recipe(context.job)
    if is_whole(wanted):
        return "already there"
    total = wanted.packages or 200
    seen = 0

    def on_line(line: str) -> None:
        nonlocal seen
        if "is ignored: it is neither a file nor a directory" in line or line.startswith("Looking in "):
            return  # pip's words about its configuration; addresses of private indexes may hold passwords
        context.log(line)
        if line.startswith(("Collecting ", "Requirement already")):
            seen += 1
            context.progress(0.7 * min(1.0, seen / total), detail=f"{seen} of {total}: {line.split(' ')[1]}")
        elif line.lstrip().startswith("Downloading "):
            context.progress(0.7 * min(1.0, seen / total), detail=line.strip())
        elif line.startswith("Installing collected"):
            context.progress(0.75, detail="Unpacking and compiling; this takes a while without a word")

    argv = [str(_python(wanted)), "-m", "pip", "install", "--progress-bar", "off"]
    if wanted.lock is not None:
        argv += ["--require-hashes", "--no-deps", "-r", str(wanted.lock)]
    else:
        argv += ["--only-binary", ":all:", *wanted.requirements]
    try:
        child.run(context, argv, on_line=on_line, timeout_seconds=PIP_SECONDS)
    except child.ChildFailed as failed:
        version = ".".join(map(str, wanted.python or sys.version_info[:2]))
        why = explain(failed, f"Installing {wanted.title} {wanted.version}", f"Python {version}")
        raise JobFailed(why, log_tail=failed.tail[-15:]) from failed
    return f"{wanted.title} {wanted.version}"


def finish(context: JobContext) -> str:
    wanted = _recipe(context.job)
    done = wanted.finish(_folder(wanted), wanted.version) if wanted.finish is not None else "nothing to do"
    (_folder(wanted) / MARKER).write_text(wanted.wanted(), "utf-8")
    return done


def probe(context: JobContext) -> str:
    """Ask every engine of the environment; what does not start here is not registered."""
    wanted = _recipe(context.job)
    told: dict[str, Any] = {}
    for number, produced in enumerate(wanted.produces):
        context.progress(number / len(wanted.produces), detail=f"Starting {produced.program}")
        program = _folder(wanted) / "bin" / produced.program
        argv = [str(program), "--version"]
        if produced.engine == "ray_serve":
            argv = [str(program), "-c", "import ray.serve, sys; print('version:', __import__('ray').__version__)"]
        try:
            lines = child.run(context, argv, on_line=context.log, timeout_seconds=PROBE_SECONDS)
        except child.ChildFailed as failed:
            (_folder(wanted) / MARKER).unlink(missing_ok=True)  # the next attempt goes through the packages again
            raise JobFailed(
                f"{wanted.title} {wanted.version} is installed but does not start on this machine; its last words are "
                "below. Its build may not fit this processor, driver or system.",
                log_tail=failed.tail[-15:],
            ) from failed
        version, problem = parse_version("\n".join(lines), 0)
        if problem:
            version = wanted.version
        flags = flags_of(produced.engine, program, version)
        told[produced.engine] = {"version": version, "flags": flags}
        context.log(f"{produced.engine} {version}" + (f", {len(flags)} flags" if flags else ""))
    context.save_data(told=told)
    return ", ".join(f"{engine} {what['version']}" for engine, what in told.items())


def register(context: JobContext) -> str:
    job, wanted = context.job, _recipe(context.job)
    names = []
    with transaction.atomic():
        for produced in wanted.produces:
            names.append(_register(job, wanted, produced))
    return ", ".join(names)


def _register(job: Job, wanted: Recipe, produced: Produced) -> str:
    folder = _folder(wanted)
    told = job.data["told"][produced.engine]
    name = wanted.folder + (f" ({produced.label})" if produced.label else "")
    install, _ = EngineInstall.objects.update_or_create(
        rig_name=job.rig_name,
        name=name,
        defaults={
            "engine": produced.engine,
            "version": str(told["version"])[:80],
            "command": [str(folder / "bin" / produced.program), *produced.arguments],
            "env": {},
            "flags": told["flags"],
            "path": str(folder),
            "managed": True,
            "state": InstallState.READY,
            "problem": "",
            "size_bytes": disk_bytes(folder),
        },
    )
    actor = Actor("", job.user_name, job.user_id)
    record(actor, "install.ready", "install", install.pk, str(install), {"rig": job.rig_name, "path": install.path})
    page_changed("install", install=install.pk)
    return str(install)


def disk_bytes(place: Path) -> int:
    return sum(f.lstat().st_size for f in place.rglob("*") if f.is_file() and not f.is_symlink())
