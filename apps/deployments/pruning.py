"""Deletes the folders of launches that ended long ago: each holds a log of up to 8 MiB.

What pages show of an end (its last lines, exit code and cause) was copied to the deployment and its job when it
ended, so nothing that can be looked at goes with a folder.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import structlog
from django.conf import settings
from django.utils import timezone

from apps.deployments import launching
from apps.deployments.models import LIVE, Replica
from apps.runners.protocol import RunnerError

log = structlog.get_logger(__name__)
KEEP_NEWEST = 50  # of the launches that ended, for whoever wants to read a whole log
KEEP = timedelta(days=14)
LAUNCH_ID = re.compile(r"d(?P<deployment>\d{1,18})-r(?P<index>\d{1,9})-[0-9a-f]+")  # as ``launching`` makes them
REPLICA = ("deployment_id", "index", "launch_id")


def prune_launches(rig_name: str, **_: Any) -> int:
    """Receiver of the rig's hour. Returns how many folders went.

    Only what is on record as ended goes; a folder that no row knows may belong to a stray engine and is left alone."""
    oldest, kept, gone = timezone.now() - KEEP, 0, 0
    for launch_id, ended_at in _ended(rig_name):
        has_log = (settings.ENGINES_DIR / launch_id / "log").exists()  # else it never began, and somebody may still try
        if ended_at > oldest and (kept < KEEP_NEWEST or not has_log):
            kept += has_log
            continue
        try:
            launching.runner().forget(launch_id)
        except RunnerError as error:  # a process of it lives: it is shown as a stray
            log.warning("folder of an ended launch kept", launch=launch_id, error=str(error))
            continue
        gone += 1
    if gone:
        log.info("folders of ended launches deleted", count=gone)
    return gone


def _ended(rig_name: str) -> list[tuple[str, datetime]]:
    """The launches of this rig that have ended and have a folder, each with when, newest first."""
    folders = {path.name: path for path in settings.ENGINES_DIR.iterdir()} if settings.ENGINES_DIR.is_dir() else {}
    replicas = Replica.objects.filter(deployment__rig__slug=rig_name)
    released = replicas.filter(launch_id__in=folders, released_at__isnull=False).exclude(deployment__status__in=LIVE)
    ended = {replica.launch_id: replica.released_at for replica in released if replica.released_at is not None}
    # A replica that was started again alone has left the folders of its earlier launches behind.
    of_replica = {name: (int(m["deployment"]), int(m["index"])) for name in folders if (m := LAUNCH_ID.fullmatch(name))}
    theirs = replicas.filter(deployment_id__in={deployment for deployment, _ in of_replica.values()})
    newest = {(deployment, index): name for deployment, index, name in theirs.values_list(*REPLICA)}
    for name, its_replica in of_replica.items():
        if newest.get(its_replica, name) != name:
            ended[name] = _last_written(folders[name])
    return sorted(ended.items(), key=lambda one: one[1], reverse=True)


def _last_written(folder: Path) -> datetime:
    """When a launch of which no row tells has ended: its exit was put on record then, or its log ends."""
    seconds = max((path.stat().st_mtime for path in (folder, folder / "log") if path.exists()), default=0.0)
    return datetime.fromtimestamp(seconds, tz=UTC)
