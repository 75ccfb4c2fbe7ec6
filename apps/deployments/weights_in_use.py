"""Whose weights are needed: by what runs, by what will be started again, and by switches that wait or are under way."""

from __future__ import annotations

from collections.abc import Iterator

from django.urls import reverse

from apps.catalog.selectors import Usage
from apps.deployments.heirs import owed
from apps.deployments.lacks import model_source, runs_simulated
from apps.deployments.models import LIVE_OR_COMES_BACK, Deployment
from apps.jobs.models import LIVE_STATES, Job
from apps.profiles.models import ProfileVersion
from apps.rigs.models import Rig


def needed_from(rig_name: str, path: str) -> list[Usage]:
    """What needs weights at ``path`` or below it, for those who would delete them."""
    rig = Rig.objects.filter(slug=rig_name).first()
    if rig is None:
        return []
    found: dict[str, Usage] = {}
    for version, usage in (*_deployments(rig), *_switches(rig)):
        if runs_simulated(version, rig):
            continue  # its weights are read by nobody
        source = model_source(version, rig)
        if source == path or source.startswith(f"{path}/"):
            found.setdefault(usage.label, usage)
    return list(found.values())


def _deployments(rig: Rig) -> Iterator[tuple[ProfileVersion, Usage]]:
    wanted = Deployment.objects.filter(LIVE_OR_COMES_BACK, rig=rig, simulated=False)
    for one in wanted.select_related("version__profile", "version__model"):
        detail = "is started again" if one.comes_back else one.get_status_display()
        yield one.version, Usage(one.profile_name, reverse("deployments:detail", args=[one.pk]), detail)


def _switches(rig: Rig) -> Iterator[tuple[ProfileVersion, Usage]]:
    """Their target, and what they owe a return to should they fail."""
    for job in Job.objects.filter(kind="switch", rig_name=rig.slug, state__in=LIVE_STATES):
        wanted = [job.params.get("version_id"), *owed(job), *map(int, job.data.get("returning", {}))]
        for version in ProfileVersion.objects.filter(pk__in=wanted).select_related("profile", "model"):
            yield version, Usage(version.profile.name, reverse("jobs:detail", args=[job.pk]), job.title)
