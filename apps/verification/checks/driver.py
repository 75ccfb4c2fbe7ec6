"""Is the driver one that the engines run on, and the one it was?"""

from __future__ import annotations

from apps.verification.judging import CheckContext, Data, Judgement
from apps.verification.models import Verdict

NAME = "driver"
TITLE = "Driver"
NEEDS_CARDS = True
OLDEST_MAJOR = 560  # what the rig's guide installs


def collect(context: CheckContext) -> Data:
    return {"driver": context.cards.driver_version, "cuda": context.cards.cuda_version}


def judge(data: Data, accepted: Data | None) -> Judgement:
    version = data["driver"]
    expected = str(accepted["driver"]) if accepted and accepted.get("driver") else f"{OLDEST_MAJOR} or newer"
    if not version:
        return Judgement(Verdict.UNKNOWN, expected, "not reported", "The driver does not tell its version.")
    measured = f"{version}{', CUDA ' + data['cuda'] if data['cuda'] else ''}"
    major = version.partition(".")[0]
    if major.isdecimal() and int(major) < OLDEST_MAJOR:
        advice = f"Drivers before {OLDEST_MAJOR} are too old for today's engines. Install a newer one and restart."
        return Judgement(Verdict.FAIL, expected, measured, advice)
    if accepted and accepted.get("driver") not in (None, version):
        advice = (
            "The driver changed since this rig was accepted. Run a model once; if all is well, accept this run "
            "as normal."
        )
        return Judgement(Verdict.WARN, expected, measured, advice)
    return Judgement(Verdict.PASS, expected, measured)
