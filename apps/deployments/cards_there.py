"""Whether the cards that a version needs are there to be used, whoever lies on them."""

from __future__ import annotations

from apps.deployments.models import LIVE, WHOLE_CARD, GpuReservation
from apps.profiles.models import ProfileVersion
from apps.profiles.placement import named
from apps.profiles.preview import rig_facts
from apps.rigs.models import Rig
from apps.rigs.selectors import gpu_list


def cards_lacking(version: ProfileVersion, rig: Rig) -> str:
    """Why it cannot start whoever asks, until somebody has been at the machine: after a power cut a card is missing,
    after an upgrade the driver does not answer. Tries would use up its budget and leave the rig empty after the repair.
    Empty where nothing lacks, and where the rig has too few cards with all of them."""
    needed = version.gpus_needed
    if not needed:
        return ""
    if rig.hardware_error:
        return "the cards cannot be read"
    cards = rig_facts(rig).cards
    missing = [card for card in cards if not card.present]
    if len(cards) - len(missing) < needed <= len(cards):
        return f"{named(missing)} {'is' if len(missing) == 1 else 'are'} missing"
    return ""


def would_fit_beside(version: ProfileVersion, rig: Rig) -> bool:
    """Whether there would be cards for it beside those that are taken, were none missing."""
    taken = GpuReservation.objects.filter(
        rig=rig,
        gpu__retired_at=None,
        slot=WHOLE_CARD,
        released_at=None,
        replica__deployment__status__in=LIVE,
    )
    return gpu_list(rig).count() - taken.values("gpu").distinct().count() >= version.gpus_needed
