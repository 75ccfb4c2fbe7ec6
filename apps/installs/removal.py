"""Taking a managed install away again."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from django.conf import settings
from django.db import transaction

from apps.audit.services import record
from apps.common.actors import Actor
from apps.common.realtime import page_changed
from apps.installs.models import EngineInstall, InstallState
from apps.jobs.handlers import JobFailed, Step
from apps.jobs.models import Job
from apps.jobs.runner import JobContext


class RemovalHandler:
    """Kind ``uninstall``: refuses while a process runs out of the folder."""

    kind = "uninstall"

    def steps(self, job: Job) -> Sequence[Step]:
        return (Step("remove", "Remove the files", remove_files, cancellable=False),)

    def compensation(self, job: Job) -> Sequence[Step]:
        return ()

    def summary(self, job: Job) -> dict[str, Any]:
        return {"summary": f"{job.params.get('name', 'The install')} was removed."}


def remove_files(context: JobContext) -> str:
    install = EngineInstall.objects.filter(pk=context.job.params.get("install")).first()
    if install is None or install.state == InstallState.REMOVED:
        return "already gone"
    place = Path(install.path)
    root = Path(settings.INSTALLS_DIR).resolve()
    if not install.managed or root not in place.resolve().parents:
        raise JobFailed(f"{install} does not lie in the panel's own folder and is not removed.")
    if user := running_from(place):
        raise JobFailed(f"{install} is in use by process {user}. Stop the deployment first.")
    with transaction.atomic():
        # vLLM and Ray Serve lie in one environment and go together.
        EngineInstall.objects.filter(rig_name=install.rig_name, path=install.path).update(
            state=InstallState.REMOVED, size_bytes=None
        )
        actor = Actor("", context.job.user_name, context.job.user_id)
        record(actor, "install.remove", "install", install.pk, str(install), {"path": install.path})
        page_changed("install", install=install.pk)
    if place.exists():
        shutil.rmtree(place)
    return f"{(install.size_bytes or 0) / 1e6:.0f} MB freed"


def running_from(place: Path) -> int | None:
    """A process whose program lies in ``place``."""
    prefix = f"{place}/"
    for process in psutil.process_iter(["pid"]):
        with suppress(psutil.Error):
            if any(part.startswith(prefix) for part in process.cmdline()[:2]):
                return int(process.pid)
    return None
