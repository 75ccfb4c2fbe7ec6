"""Has the machine around the cards the memory it should have, and enough of it free?"""

from __future__ import annotations

import psutil

from apps.verification.judging import CheckContext, Data, Judgement
from apps.verification.models import Verdict

NAME = "host_memory"
TITLE = "Host memory"
NEEDS_CARDS = False
GIB = 2**30
# Weights stay in the page cache while they fit: below this, loading a 70B model at 4 bit again reads the disk again.
RIG_BYTES = 60 * GIB
PANEL_BYTES = 2 * GIB  # enough for the panel and its small model where the cards are simulated
FREE_SHARE = 0.10


def collect(context: CheckContext) -> Data:
    memory = psutil.virtual_memory()
    return {"simulated": context.simulated, "total": memory.total, "available": memory.available}


def judge(data: Data, accepted: Data | None) -> Judgement:
    least = accepted["total"] if accepted else (PANEL_BYTES if data["simulated"] else RIG_BYTES)
    expected = f"{least / GIB:.0f} GiB or more, {FREE_SHARE * 100:.0f} % of it available"
    measured = f"{data['total'] / GIB:.0f} GiB, {data['available'] / GIB:.0f} GiB available"
    if data["total"] < least * 0.95:
        if accepted:
            advice = (
                "There is less memory than when this rig was accepted: a module failed or lost contact. Reseat "
                "it and test it."
            )
            return Judgement(Verdict.FAIL, expected, measured, advice)
        advice = (
            "Weights that do not stay in memory are read from the disk at every switch. If it is meant, accept "
            "this run as normal."
        )
        return Judgement(Verdict.WARN, expected, measured, advice)
    if data["available"] < data["total"] * FREE_SHARE:
        advice = (
            "Little memory is available: loading a model may be slow, or end something else. See what else runs here."
        )
        return Judgement(Verdict.WARN, expected, measured, advice)
    return Judgement(Verdict.PASS, expected, measured)
