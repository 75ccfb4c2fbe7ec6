"""Is there room for weights, logs and the database?"""

from __future__ import annotations

import shutil
from pathlib import Path

from apps.verification.judging import CheckContext, Data, Judgement
from apps.verification.models import Verdict

NAME = "disk_space"
TITLE = "Disk space"
NEEDS_CARDS = False
GB = 1e9
WARN_BELOW_BYTES = 50 * GB  # a 70B model at 4 bit is 40 GB
FAIL_BELOW_BYTES = 5 * GB  # the database and logs need to go on


def collect(context: CheckContext) -> Data:
    places = []
    for what, place in (("models", context.models_dir), ("data", context.data_dir)):
        usage = shutil.disk_usage(_existing(place))
        places.append({"what": what, "path": str(place), "free": usage.free, "total": usage.total})
    return {"places": places}


def _existing(place: Path) -> Path:
    """The folder may not have been made yet; its parent's disk is where it will be."""
    while not place.exists() and place != place.parent:
        place = place.parent
    return place


def judge(data: Data, accepted: Data | None) -> Judgement:
    expected = f"{WARN_BELOW_BYTES / GB:.0f} GB free or more"
    measured = ", ".join(f"{p['what']}: {p['free'] / GB:.0f} GB free of {p['total'] / GB:.0f}" for p in data["places"])
    least = min(data["places"], key=lambda p: p["free"])
    if least["free"] < FAIL_BELOW_BYTES:
        advice = f"The disk of {least['path']} is nearly full: make room now, or the database and the logs stop."
        return Judgement(Verdict.FAIL, expected, measured, advice)
    if least["free"] < WARN_BELOW_BYTES:
        advice = f"Another large model will not fit on the disk of {least['path']}: a 70B model at 4 bit takes 40 GB."
        return Judgement(Verdict.WARN, expected, measured, advice)
    return Judgement(Verdict.PASS, expected, measured)
