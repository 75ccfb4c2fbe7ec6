"""The policies, asked again when a switch begins: between the wish and its turn others pin, and cards run hot."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from django.utils import timezone

from apps.deployments.models import Deployment, Status
from apps.deployments.pauses import pause_words, paused_cards
from apps.deployments.policies.decide import Asker, in_its_place, pin_words
from apps.deployments.policies.selectors import pin_facts, policy_of
from apps.deployments.policies.verdicts import switch_verdict
from apps.jobs.handlers import JobFailed
from apps.jobs.models import Job
from apps.profiles.models import ProfileVersion
from apps.rigs.models import Rig


def ask_again(job: Job, version: ProfileVersion, rig: Rig) -> None:
    """Raises JobFailed with the sentence where a policy forbids by now what was granted at the click.

    What somebody passed over then is passed over still; a pin made since is another one."""
    leave = _leave(job)
    if leave is None:
        return
    verdict = switch_verdict(
        version,
        rig,
        asker=Asker(str(leave["asker"])),
        asker_pk=leave.get("asker_pk"),
        passing=leave.get("passed", ()),
        exclusive=bool(job.params.get("exclusive")),
    )
    if not verdict.allowed:
        raise JobFailed(verdict.sentence, cause=verdict.code)


def spared(job: Job, rig: Rig) -> dict[int, str]:
    """Profiles whose sleepers this switch may not end, each with the sentence why."""
    leave = _leave(job)
    if leave is None:
        return {}
    now = timezone.now()
    owner, passed = leave.get("asker_pk"), leave.get("passed", ())
    binding = [
        pin for pin in pin_facts(rig, now) if (pin.owner_pk is None or pin.owner_pk != owner) and pin.key not in passed
    ]
    return {pin.profile_id: f"Not switched: {pin_words(pin, now, policy_of(rig).zone)}." for pin in binding}


def why_not_back(
    job: Job, deployment: Deployment, cards: Sequence[int], others: Collection[Deployment] = ()
) -> JobFailed | None:
    """Why what a switch stopped is not brought back by itself now, or nothing: a card of it was stopped in the
    meantime, or is not well yet, or some of ``others`` are awake where it would be. A card that it served on before, as
    somebody said, is no reason."""
    paused = paused_cards(deployment.rig)
    found = [paused[gpu] for gpu in cards if gpu in paused]
    found = [card for card in found if card.free_at is None or card.at >= job.created_at]
    if found:
        return JobFailed(f"Not brought back: {pause_words(found, deployment.rig)}.", cause="card_paused")
    awake = [d for d in others if d.pk != deployment.pk and d.status != Status.SLEEPING]
    if awake:
        return JobFailed(f"Not brought back: {in_its_place([d.profile_name for d in awake])}.", cause="replaced")
    return None


def _leave(job: Job) -> dict | None:  # type: ignore[type-arg]
    """Who asked, and what they passed over; None of a job that an older panel made."""
    if "restart_of" in job.data:
        return {"asker": Asker.RESTART}
    found = job.data.get("leave")
    return found if isinstance(found, dict) else None
