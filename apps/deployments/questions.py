"""What a click would cut, asked before it is done and only when somebody would notice.

Asked when the click arrives and not when the page was drawn: by then other answers run.
"""

from __future__ import annotations

from collections.abc import Iterable

from apps.deployments.models import Deployment
from apps.deployments.policies.decide import Verdict
from apps.deployments.selectors import streams_by_deployment
from apps.deployments.switch_sleep import in_the_way_of
from apps.profiles.models import ProfileVersion
from apps.rigs.models import Rig


def pin_question(verdict: Verdict) -> str:
    """Whose pin an operator would pass over, or which card was stopped; empty where there is none, and where it may not
    be passed over."""
    if verdict.allowed or not verdict.overridable:
        return ""
    told = verdict.sentence.partition(": ")[2]
    what = [] if not verdict.overridden else ["the pin" if len(verdict.overridden) == 1 else "the pins"]
    what += ["the card's pause" if len(verdict.cards) == 1 else "the cards' pauses"] if verdict.cards else []
    return f"{told[:1].upper()}{told[1:]} Going on passes over {' and '.join(what)}, which is recorded."


def switch_question(version: ProfileVersion, rig: Rig) -> str:
    """The sentence that says whose answers a switch would stop; empty where it stops none."""
    streams = streams_by_deployment()
    if not streams or not any(streams.values()):
        return ""
    told = _told(in_the_way_of(version, rig), streams)
    return f"This stops {told}. New requests wait; answers that do not end in time are cut." if told else ""


def stop_question(deployment: Deployment) -> str:
    told = _told([deployment], streams_by_deployment() or {})
    return f"This stops {told}. Answers that do not end in time are cut." if told else ""


def _told(deployments: Iterable[Deployment], streams: dict[int, int]) -> str:
    counts = [(streams.get(d.pk, 0), d.profile_name) for d in deployments]
    return " and ".join(
        f"{count} running answer{'' if count == 1 else 's'} of {name}" for count, name in counts if count
    )
