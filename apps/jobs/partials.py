"""The parts of a job's page that change: page, htmx GET and socket all render them here.

Each part is one element with one id, ``job-<pk>-<part>``, so that it can be swapped by id wherever it is shown.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from django.http import HttpRequest
from django.template.loader import render_to_string

from apps.common.access import covers
from apps.common.roles import Role
from apps.jobs.access import may_cancel
from apps.jobs.models import Job
from apps.jobs.selectors import LOG_TAIL_LINES, job_log_tail, job_steps

# head: state, progress, time left, cancel button, the closing sentence. steps: each with its time.
# evidence: what a failure left behind. log: the last lines.
PARTS = ("head", "steps", "evidence", "log")
TEMPLATE = "jobs/partials/job.html"


def job_context(job: Job, user: Any, parts: Iterable[str] = PARTS) -> dict[str, Any]:
    """What the partials of ``parts`` need; the whole page uses it with all of them."""
    asked = set(parts)
    context: dict[str, Any] = {"job": job, "may_cancel": not job.is_final and may_cancel(user, job)}
    if "steps" in asked:
        context["steps"] = job_steps(job)
    if "evidence" in asked:
        context["evidence"] = evidence(job)
        wanted = (job.result or {}).get("suggested_options")
        if wanted and job.profile_slug and covers(user, Role.OPERATOR):
            context["suggested"] = ", ".join(f"{name} {value}" for name, value in wanted.items())
    if "log" in asked:
        context["log_lines"] = job_log_tail(job)
        context["log_is_cut"] = len(context["log_lines"]) == LOG_TAIL_LINES
    return context


def job_part(part: str, job: Job, user: Any, request: HttpRequest | None = None) -> str:
    """One part as HTML. Without a request (from a socket) its forms rely on the page's CSRF header."""
    if part not in PARTS:
        raise ValueError(f"{part!r} is not one of {PARTS}.")
    return render_to_string(f"{TEMPLATE}#{part}", job_context(job, user, [part]), request)


def job_changed(job: Job, user: Any, *, log_only: bool = False) -> str:
    """All parts that a ``page.changed`` message of topic *job* asks for, in one string; ``log_only`` is
    its id ``log``: then only lines were added."""
    return "".join(job_part(part, job, user) for part in (("log",) if log_only else PARTS))


def evidence(job: Job) -> list[tuple[str, str, bool]]:
    """What a job's result holds besides its sentence: (label, text, whether it is a block of lines)."""
    found = []
    for key, value in (job.result or {}).items():
        if key == "summary" or value in (None, "", [], {}):
            continue
        if isinstance(value, list) and all(isinstance(line, str) for line in value):
            text = "\n".join(value)
        elif isinstance(value, dict):
            text = "\n".join(f"{name}: {item}" for name, item in value.items())
        else:
            text = str(value)
        found.append((key.replace("_", " ").capitalize(), text, "\n" in text))
    return found
