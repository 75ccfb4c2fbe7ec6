"""Deletes the folders of launches that ended long ago: each holds a log of up to 8 MiB.

What pages show of an end (its last lines, exit code and cause) was copied to the deployment and its job when it
ended, so nothing that can be looked at goes with a folder.
"""

from __future__ import annotations

from datetime import timedelta
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


def prune_launches(rig_name: str, **_: Any) -> int:
    """Receiver of the rig's hour. Returns how many folders went.

    Only what is on record as ended goes; a folder that no row knows may belong to a stray engine and is left alone."""
    folders = settings.ENGINES_DIR
    there = [path.name for path in folders.iterdir()] if folders.is_dir() else []
    ended = Replica.objects.filter(launch_id__in=there, deployment__rig__slug=rig_name, released_at__isnull=False)
    ended = ended.exclude(deployment__status__in=LIVE).order_by("-pk")
    oldest, gone = timezone.now() - KEEP, 0
    for index, replica in enumerate(ended):
        handle = launching.runner().recover(replica.launch_id)
        released = replica.released_at
        if handle is None or (index < KEEP_NEWEST and released and released > oldest):
            continue
        try:
            launching.runner().forget(handle)
        except RunnerError as error:  # a process of it lives: it is shown as a stray
            log.warning("folder of an ended launch kept", launch=replica.launch_id, error=str(error))
            continue
        gone += 1
    if gone:
        log.info("folders of ended launches deleted", count=gone)
    return gone
