"""The part of a run's page that changes while it runs: page, htmx GET and socket render it here."""

from __future__ import annotations

from typing import Any

from apps.verification.checks import SUITES
from apps.verification.models import VerificationRun
from apps.verification.selectors import outcome


def run_context(run: VerificationRun) -> dict[str, Any]:
    """For ``verification/partials/results.html``, whose root is ``#verification-<pk>``."""
    results = list(run.results.all())
    worst, sentence = outcome(results)
    return {
        "run": run,
        "results": results,
        "worst": worst,
        "sentence": sentence,
        "waiting": max(0, len(SUITES.get(run.suite, ())) - len(results)) if run.finished_at is None else 0,
    }
