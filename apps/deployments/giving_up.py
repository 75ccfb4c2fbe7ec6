"""Ending the wish that what died comes back: of two who act on it at once one does."""

from __future__ import annotations

from django.db import transaction

from apps.audit.services import record
from apps.common.actors import PANEL
from apps.common.realtime import page_changed
from apps.deployments import routes
from apps.deployments.cards_there import cards_lacking, would_fit_beside
from apps.deployments.models import COMES_BACK, Deployment, Desired
from apps.deployments.policies.decide import Asker
from apps.deployments.policies.verdicts import switch_verdict


def claim(deployment: Deployment, **values: object) -> bool:
    """Take the wish away from the failed row, for what carries it on or for good; False where somebody has taken it."""
    won = Deployment.objects.filter(COMES_BACK, pk=deployment.pk).update(desired=Desired.STOPPED, **values)
    return won == 1


def give_up(deployment: Deployment, why: str) -> None:
    """It stays failed, which its page and the audit tell."""
    with transaction.atomic():
        if claim(deployment, status_reason=f"{deployment.status_reason} {why}"[:500]):
            record(PANEL, "deployment.given_up", "deployment", deployment.pk, str(deployment), {"why": why})
            page_changed("deployment", deployment=deployment.pk)


def give_up_for(target: Deployment, *, alone: bool) -> list[str]:
    """What has died in the place of ``target``, which was asked for and serves now, or ``alone`` all of the rig, is not
    started again: as if it had still run, which the switch would have ended. Returns the names.

    Here and not at the next look at what died: by then this one may have gone too.
    """
    names = []
    others = Deployment.objects.filter(COMES_BACK, rig=target.rig).exclude(version__profile=target.version.profile_id)
    for died in others.select_related("version__profile", "version__model", "rig"):
        if not alone and not _runs_in_the_place_of(died, target):
            continue
        how = "is to run alone" if alone else "runs in its place"
        give_up(died, f"{target.profile_name} was asked for since and {how}.")
        routes.end_wait_for_restart(died)
        names.append(died.profile_name)
    return names


def _runs_in_the_place_of(died: Deployment, target: Deployment) -> bool:
    version, rig = died.version, died.rig
    verdict = switch_verdict(version, rig, asker=Asker.RESTART, asker_pk=None)
    if target.version.profile_id in verdict.taken_by:
        return True
    # No plan says where it would lie now; it lay there before the card went.
    return bool(cards_lacking(version, rig) and target.version.gpus_needed) and not would_fit_beside(version, rig)
