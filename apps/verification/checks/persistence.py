"""Does the driver stay loaded while nothing runs?"""

from __future__ import annotations

from apps.verification.judging import CheckContext, Data, Judgement, named, same_or_list
from apps.verification.models import Verdict

NAME = "persistence"
TITLE = "Persistence mode"
NEEDS_CARDS = True


def collect(context: CheckContext) -> Data:
    return {"cards": [{"index": g.index, "on": g.persistence_mode} for g in context.cards.gpus]}


def judge(data: Data, accepted: Data | None) -> Judgement:
    modes = {c["index"]: c["on"] for c in data["cards"]}
    if not modes:
        return Judgement(Verdict.FAIL, "enabled", "no cards", "There is no card to ask; see the number of GPUs.")
    words = {True: "enabled", False: "disabled", None: "not reported"}
    measured = same_or_list({i: words[on] for i, on in modes.items()})
    if off := [i for i, on in modes.items() if on is False]:
        advice = (
            f"It is off on {named(off)}: power limits are forgotten whenever nothing uses the cards, and the "
            "first start takes longer. Enable the service nvidia-persistenced, or run `nvidia-smi -pm 1` after "
            "each start."
        )
        return Judgement(Verdict.WARN, "enabled", measured, advice)
    if None in modes.values():
        return Judgement(Verdict.UNKNOWN, "enabled", measured, "Not every card tells.")
    return Judgement(Verdict.PASS, "enabled", measured)
