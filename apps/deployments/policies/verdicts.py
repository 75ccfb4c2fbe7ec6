"""The facts of a rig, brought before the pure decision."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime

from django.utils import timezone

from apps.audit.services import record
from apps.common.actors import Actor
from apps.common.errors import Conflict
from apps.common.roles import Role
from apps.deployments.cards_there import cards_lacking
from apps.deployments.models import LIVE, Deployment, Status
from apps.deployments.pauses import paused_cards
from apps.deployments.policies.decide import Asker, InTheWay, PausedCard, Verdict, may_switch, refused
from apps.deployments.policies.selectors import pin_facts, policy_of, slot_now
from apps.deployments.switch_sleep import effect_of
from apps.profiles.models import ProfileVersion
from apps.rigs.models import Rig


def asker_of(role: Role | None) -> Asker:
    return Asker.OPERATOR if role is not None and role.covers(Role.OPERATOR) else Asker.MEMBER


def switch_verdict(
    version: ProfileVersion,
    rig: Rig,
    *,
    asker: Asker,
    asker_pk: int | None,
    override: bool = False,
    passing: Collection[str] = (),
    exclusive: bool = False,
) -> Verdict:
    """Whether a switch to this version may happen now, and why not; for the last arguments see ``may_switch``.

    What the panel does by itself waits for cards that are missing or cannot be read: a job that fails for them would be
    one of few tries. People are told by the plan."""
    if asker not in (Asker.OPERATOR, Asker.MEMBER) and (lacking := cards_lacking(version, rig)):
        return refused("restarted" if asker is Asker.RESTART else "switched", lacking, "cards_lacking")
    if not _anything_binds(rig, asker):
        return Verdict(True)
    effect = effect_of(version, rig, exclusive=exclusive, keep=pinned_profiles(rig))
    paused = paused_cards(rig)
    return _verdict(
        [*(_in_the_way(d) for d in effect.replaced), *(_asleep(d) for d in effect.ended)],
        version.profile_id,
        rig,
        asker,
        asker_pk,
        override,
        passing,
        [paused[gpu] for gpu in effect.cards if gpu in paused],
    )


def stop_verdict(
    deployment: Deployment,
    *,
    asker: Asker,
    asker_pk: int | None,
    override: bool = False,
    passing: Collection[str] = (),
) -> Verdict:
    """Whether a deployment may be stopped: a pin speaks here too."""
    return _verdict([_in_the_way(deployment)], None, deployment.rig, asker, asker_pk, override, passing, [])


def _anything_binds(rig: Rig, asker: Asker) -> bool:
    """Spares the plan where there is nothing to decide: no pin, no paused card, and nothing that must stay, has these
    hours or may be in the place of a restart."""
    if pin_facts(rig, timezone.now()) or paused_cards(rig):
        return True
    if asker is Asker.RESTART:
        return Deployment.objects.filter(rig=rig, status__in=LIVE).exists()
    if not asker.waits_for_residents:
        return False
    policy = policy_of(rig)
    scheduled = asker is Asker.AUTOMATIC and slot_now(rig, policy, timezone.now()) is not None
    if not policy.minimum_residency_seconds and not scheduled:
        return False
    return Deployment.objects.filter(rig=rig, status__in=LIVE).exists()


def _in_the_way(deployment: Deployment) -> InTheWay:
    asleep = deployment.status == Status.SLEEPING
    return InTheWay(deployment.version.profile_id, deployment.profile_name, _serving_since(deployment), asleep)


def _asleep(deployment: Deployment) -> InTheWay:
    """A sleeper that would end: only a pin keeps it, it serves nobody."""
    return InTheWay(deployment.version.profile_id, deployment.profile_name, None, asleep=True)


def _verdict(
    in_the_way: Sequence[InTheWay],
    target_profile_id: int | None,
    rig: Rig,
    asker: Asker,
    asker_pk: int | None,
    override: bool,
    passing: Collection[str],
    cards: Sequence[PausedCard],
) -> Verdict:
    now, policy = timezone.now(), policy_of(rig)
    return may_switch(
        asker=asker,
        asker_pk=asker_pk,
        in_the_way=in_the_way,
        target_profile_id=target_profile_id,
        pins=pin_facts(rig, now),
        cards=cards,
        minimum_residency_seconds=policy.minimum_residency_seconds,
        now=now,
        zone=policy.zone,
        override=override,
        scheduled=slot_now(rig, policy, now) if asker is Asker.AUTOMATIC else None,
        passing=passing,
    )


def pinned_profiles(rig: Rig) -> set[int]:
    return {pin.profile_id for pin in pin_facts(rig, timezone.now())}


def _serving_since(deployment: Deployment) -> datetime | None:
    """When it was loaded or woken; a replica that went and came back does not count."""
    came = deployment.events.filter(to_status=Status.READY, from_status__in=(Status.LOADING, Status.SLEEPING)).last()
    return came.at if came else deployment.ready_at


def enforce(verdict: Verdict, actor: Actor) -> None:
    """Raise Conflict (code ``pinned``, ``card_paused`` or ``resident``) with the sentence; record each pin and each
    paused card that is passed over."""
    if not verdict.allowed:
        more = " An operator passes over that with override." if verdict.overridable else ""
        raise Conflict(verdict.sentence + more, code=verdict.code)
    for pin in verdict.overridden:
        record(
            actor,
            "pin.override",
            "pin",
            pin.pk,
            pin.profile_name,
            {"pinned_by": pin.owner_name, "until": pin.until.isoformat(), "reason": pin.reason},
        )
    for card in verdict.cards:
        record(actor, "card.override", "pause", card.pk, f"GPU {card.index}", {"why": card.why})
