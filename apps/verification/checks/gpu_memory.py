"""Does every card report the memory it should have?"""

from __future__ import annotations

from apps.verification.judging import CheckContext, Data, Judgement, named, same_or_list
from apps.verification.models import Verdict

NAME = "gpu_memory"
TITLE = "GPU memory"
NEEDS_CARDS = True
GIB = 2**30
DEFAULT_BYTES = 24 * GIB
TOLERANCE = 0.98  # drivers keep a little for themselves, and not always the same


def collect(context: CheckContext) -> Data:
    return {"cards": [{"index": g.index, "uuid": g.uuid, "bytes": g.memory_total_bytes} for g in context.cards.gpus]}


def judge(data: Data, accepted: Data | None) -> Judgement:
    before = {c["uuid"]: c["bytes"] for c in accepted["cards"]} if accepted else {}
    wanted = {c["index"]: before.get(c["uuid"]) or DEFAULT_BYTES for c in data["cards"]}
    expected = same_or_list({i: f"{size / GIB:.0f} GiB" for i, size in wanted.items()}) if wanted else "some"
    sizes = {c["index"]: c["bytes"] for c in data["cards"]}
    measured = (
        same_or_list({i: "not reported" if s is None else f"{s / GIB:.1f} GiB" for i, s in sizes.items()})
        if sizes
        else "none"
    )
    if not sizes:
        return Judgement(Verdict.FAIL, expected, "no cards", "There is no card to ask; see the number of GPUs.")
    if small := [i for i, s in sizes.items() if s is not None and s < wanted[i] * TOLERANCE]:
        advice = (
            f"{named(small)} has less memory than expected: a card of another kind, or one with a fault. Profiles "
            "are planned for the smallest card. If it is meant, accept this run as normal."
        )
        return Judgement(Verdict.FAIL if accepted else Verdict.WARN, expected, measured, advice)
    if unknown := [i for i, s in sizes.items() if s is None]:
        return Judgement(Verdict.UNKNOWN, expected, measured, f"{named(unknown)} does not report its memory.")
    return Judgement(Verdict.PASS, expected, measured)
