"""On which cards a profile lies: those it is placed on, or others of the rig where it does not fit these.

A placement knows no memory: a card may be smaller than the others, or a program that is none of the panel's may fill
it. Another placement is looked for only where the first does not fit, since a reading must not move what fits. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from apps.profiles import fit
from apps.profiles.forecast import Forecast, RigState, forecast
from apps.profiles.models import ProfileVersion
from apps.profiles.placement import Placement, RigFacts, place


@dataclass(frozen=True, slots=True)
class Taken:
    """Uuids, as ``place`` takes them."""

    avoid: frozenset[str] = field(default_factory=frozenset)
    resting: frozenset[str] = field(default_factory=frozenset)
    slept_on: frozenset[str] = field(default_factory=frozenset)


@dataclass(frozen=True, slots=True)
class Lying:
    """``state`` is the rig's without sleepers where these must be stopped."""

    placement: Placement
    state: RigState
    forecast: Forecast
    stops_sleepers: bool = False

    @property
    def fits(self) -> bool:
        return self.forecast.verdict is not fit.Verdict.DOES_NOT_FIT


def placed(version: ProfileVersion, facts: RigFacts, taken: Taken) -> Placement:
    """Raises DoesNotFit where the rig has too few cards."""
    return place(
        facts,
        replicas=version.replicas,
        tensor_parallel_size=version.tensor_parallel_size,
        pipeline_parallel_size=version.pipeline_parallel_size,
        avoid=taken.avoid,
        resting=taken.resting,
        slept_on=taken.slept_on,
    )


def settle(version: ProfileVersion, facts: RigFacts, state: RigState, placement: Placement, taken: Taken) -> Lying:
    """There, or where it fits only these: on other cards that nobody serves on."""
    first = last = _judged(version, facts, state, placement)
    while not last.fits:
        taken = replace(taken, avoid=taken.avoid | _no_better(last, state))
        left = [c for c in facts.cards if c.present and c.uuid in state.cards and c.uuid not in taken.avoid]
        if not last.forecast.estimate.gpus or len(left) < len(placement.cards):
            break
        last = _judged(version, facts, state, placed(version, facts, taken), advise=False)
    # Where it fits nowhere, the roomiest cards may have advice that the first ones have not.
    if last is first or (not last.fits and first.forecast.suggestions):
        return first
    last = _judged(version, facts, state, last.placement)
    return last if last.fits or last.forecast.suggestions else first


def _judged(
    version: ProfileVersion, facts: RigFacts, state: RigState, placement: Placement, *, advise: bool = True
) -> Lying:
    others = [c for c in facts.cards if c.present and c not in placement.cards]
    found = Lying(placement, state, forecast(version, placement.cards, others, state, advise=advise))
    if found.fits or not any(state.cards[c.uuid].sleeping_neighbours for c in placement.cards if c.uuid in state.cards):
        return found
    # A switch stops sleepers that do not leave enough.
    alone = _without_sleepers(state)
    stopped = forecast(version, placement.cards, others, alone, advise=advise)
    return found if stopped.verdict is fit.Verdict.DOES_NOT_FIT else Lying(placement, alone, stopped, True)


def _without_sleepers(state: RigState) -> RigState:
    return replace(state, cards={uuid: replace(c, sleeping_neighbours=0) for uuid, c in state.cards.items()})


def _no_better(found: Lying, state: RigState) -> frozenset[str]:
    """The cards that fall short, else the fullest, and all of their size that have no more free."""
    gpus = found.forecast.estimate.gpus
    used = [state.cards[found.forecast.cards[gpu.position].uuid] for gpu in gpus]
    short = [card for card, gpu in zip(used, gpus, strict=True) if gpu.slack.high < 0]
    short = short or sorted(used, key=lambda card: card.free_bytes)[:1]
    return frozenset(
        uuid
        for uuid, card in state.cards.items()
        if any(card.total_bytes == one.total_bytes and card.free_bytes <= one.free_bytes for one in short)
    )
