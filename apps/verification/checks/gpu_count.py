"""Are all cards there and answering?"""

from __future__ import annotations

from apps.verification.judging import CheckContext, Data, Judgement, named
from apps.verification.models import Verdict

NAME = "gpu_count"
TITLE = "Number of GPUs"
NEEDS_CARDS = True
DEFAULT_COUNT = 4  # the rig that the panel was made for


def collect(context: CheckContext) -> Data:
    lost = {g.uuid for g in context.reading.gpus if g.lost} if context.reading else set()
    return {
        "present": [g.uuid for g in context.cards.gpus if g.uuid not in lost],
        "lost": sorted(g.index for g in context.cards.gpus if g.uuid in lost),
        "missing": sorted(c.index for c in context.known if c.uuid not in {g.uuid for g in context.cards.gpus}),
    }


def judge(data: Data, accepted: Data | None) -> Judgement:
    count = len(data["present"])
    wanted = len(accepted["present"]) if accepted else DEFAULT_COUNT
    measured = str(count)
    if data["lost"]:
        measured += f", and {named(data['lost'])} off the bus"
        advice = (
            f"{named(data['lost'])} no longer answer{'s' if len(data['lost']) == 1 else ''}. Power the rig off "
            "completely and on again; if it comes back, look at the power cables (no daisy chain), the riser and "
            "the slot, and cap the power."
        )
        return Judgement(Verdict.FAIL, str(wanted), measured, advice)
    if count < wanted:
        gone = f" {named(data['missing'])} was here before." if data["missing"] else ""
        advice = (
            f"{wanted - count} fewer than expected.{gone} Reseat the card and its power cables; an undersized "
            "supply makes the firmware drop cards at start, so try each card alone."
        )
        return Judgement(Verdict.FAIL, str(wanted), measured, advice)
    if count > wanted:
        return Judgement(
            Verdict.WARN,
            str(wanted),
            measured,
            "There are more cards than expected. If that is meant, accept this run as normal.",
        )
    if accepted and set(data["present"]) != set(accepted["present"]):
        return Judgement(
            Verdict.WARN,
            f"{wanted}, the accepted ones",
            measured,
            "A card was exchanged. If that is meant, accept this run as normal.",
        )
    return Judgement(Verdict.PASS, str(wanted), measured)
