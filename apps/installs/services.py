"""Asking for engines: to be installed, to be removed."""

from __future__ import annotations

from django.conf import settings
from django.db import transaction

from apps.common.actors import Actor
from apps.common.errors import Conflict, Invalid, NotFound
from apps.installs import starter
from apps.installs.models import EngineInstall, InstallState
from apps.installs.recipes import OFFERS, is_version
from apps.jobs.models import LIVE_STATES, Job
from apps.jobs.services import job_create
from apps.rigs.models import Rig
from apps.rigs.selectors import rig_here

TITLES = {
    starter.NAME: "Install the starter engine (llama.cpp, with Gemma 3 270M)",
    **{name: f"Install {what}" for name, what in OFFERS.items()},
}


def install_request(*, name: str, actor: Actor, rig: Rig | None = None, version: str = "", reason: str = "") -> Job:
    """A job that installs ``name``; the one under way when there is one. Raises NotFound for an unknown name and
    Invalid for something that is not a version. Whether the rig can have it, its worker says in the job."""
    if name not in TITLES:
        raise NotFound(
            f"There is nothing to install called {name[:60]!r}; there is: {', '.join(TITLES)}.", code="unknown_install"
        )
    version = version.strip()
    if version and (name == starter.NAME or not is_version(version)):
        why = (
            "The starter comes in one version."
            if name == starter.NAME
            else f"{version[:40]!r} is not a version; they look like 0.32.0."
        )
        raise Invalid(why, fields={"version": [why]})
    with transaction.atomic():
        # The row lock makes two clicks at once into one job.
        rig = Rig.objects.select_for_update(no_key=True).get(pk=(rig or rig_here()).pk)
        # vLLM and Ray share their environment: one at a time may write into it.
        exclusion = f"install:{rig.slug}:{'vllm' if name == 'ray' else name}"
        live = Job.objects.filter(exclusion=exclusion, state__in=LIVE_STATES, cancel_requested_at=None)
        for under_way in live:
            if under_way.params.get("version", "") == version:
                return under_way
        return job_create(
            kind=starter.InstallHandler.kind,
            title=TITLES[name] + (f" {version}" if version else ""),
            rig_name=rig.slug,
            queue=rig.control_queue,
            actor=actor,
            reason=reason,
            params={"name": name, **({"version": version} if version else {})},
            exclusion=exclusion,
        )


def install_remove(install: EngineInstall, *, actor: Actor, reason: str = "") -> Job:
    """A job that removes a managed install. Raises Conflict for one that the panel did not make."""
    if not install.managed:
        raise Conflict(
            f"{install} was found, not installed by the panel; remove it where it came from.", code="not_managed"
        )
    if install.state == InstallState.REMOVED:
        raise Conflict(f"{install} is already removed.", code="already_removed")
    rig = Rig.objects.filter(slug=install.rig_name).first()
    return job_create(
        kind="uninstall",
        title=f"Remove the engine {install.name}",
        rig_name=install.rig_name,
        queue=rig.control_queue if rig else f"rig.{settings.RIG_NAME}.control",
        actor=actor,
        reason=reason,
        params={"install": install.pk, "name": str(install)},
        exclusion=f"install:{install.rig_name}:{install.name}"[:100],
    )
