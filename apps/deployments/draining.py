"""Letting running answers finish before an engine goes.

Past its deadline a drain cuts what still runs, where whoever asked has the right to: operators, and the panel itself.
For others it gives up instead, and the old model serves on. An operator may cut at once, too.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

from apps.accounts.models import User
from apps.common.roles import Role
from apps.deployments import routes
from apps.deployments.models import Deployment
from apps.deployments.policies.decide import Asker
from apps.deployments.signals import streams_asked
from apps.jobs.handlers import JobFailed
from apps.jobs.models import Job
from apps.jobs.runner import JobContext

DRAIN_SECONDS = 30.0
LOOK_SECONDS = 1.0  # between two looks at who it is, and whether an operator cuts
NAMES_MAX = 5


def may_cut(job: Job) -> bool:
    """What the panel or the command line does carries the right; of people, operators have it. A switch belongs to
    whoever asked for it last; a guest at the gateway has no account and the rights of a member."""
    asked = job.data.get("leave") or {"asker_pk": job.user_id}
    if asked.get("asker_pk") is None:
        return asked.get("asker") not in (Asker.MEMBER, Asker.AUTOMATIC)
    user = User.objects.filter(pk=asked["asker_pk"]).first()
    return user is not None and user.has_role(Role.OPERATOR)


def drain(ctx: JobContext, deployment_ids: Sequence[int], limit_seconds: float = DRAIN_SECONDS) -> str:
    """Wait until the gateways count no request to these deployments, at most ``limit_seconds``.

    Raises JobFailed when the time is over and whoever asked may not cut."""
    began = time.monotonic()
    looked, who, cut_by = 0.0, "", ""
    allowed = may_cut(ctx.job)
    while (left := routes.in_flight(deployment_ids)) > 0:
        now = time.monotonic()
        if now - looked >= LOOK_SECONDS:
            looked, who, cut_by = now, streaming(deployment_ids), cut_asked_by(deployment_ids)
        if cut_by:
            return f"{left} still under way{who}; cut by {cut_by}"
        waited = now - began
        if waited > limit_seconds and allowed:
            return f"{left} still under way after {limit_seconds:.0f} s{who}; they are cut"
        if waited > limit_seconds:
            raise JobFailed(
                f"{left} answers were still under way after {limit_seconds:.0f} s{who}; only an operator may cut them.",
                cause="still_streaming",
            )
        then = "cut" if allowed else "given up"
        ctx.progress(
            waited / limit_seconds, f"{left} answers still under way{who}; {then} in {limit_seconds - waited:.0f} s"
        )
        ctx.sleep(0.1)
    return "no answer was cut"


def streaming(deployment_ids: Sequence[int]) -> str:
    """`` (bob 2, carol)`` as far as anybody knows; empty otherwise. A gateway's ledger answers the signal."""
    counts: Counter[str] = Counter()
    for _, told in streams_asked.send_robust(sender=None, deployment_ids=list(deployment_ids)):
        if isinstance(told, dict):
            counts.update(told)
    if not counts:
        return ""
    named = [name if n == 1 else f"{name} {n}" for name, n in counts.most_common(NAMES_MAX)]
    more = ["others"] if len(counts) > NAMES_MAX else []
    return f" ({', '.join([*named, *more])})"


def cut_asked_by(deployment_ids: Sequence[int]) -> str:
    asked = Deployment.objects.filter(pk__in=deployment_ids).exclude(cut_by_name="")
    return asked.values_list("cut_by_name", flat=True).first() or ""
