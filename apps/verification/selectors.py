"""Reads of verification runs."""

from __future__ import annotations

from collections import Counter

from django.db.models import QuerySet

from apps.common.errors import NotFound
from apps.rigs.models import Rig
from apps.verification.judging import Data
from apps.verification.models import CheckResult, Verdict, VerificationRun


def run_get(reference: str | int) -> VerificationRun:
    """By id. Raises NotFound."""
    found = None
    if str(reference).isdecimal() and len(str(reference)) < 19:
        found = VerificationRun.objects.select_related("rig", "job").filter(pk=int(reference)).first()
    if found is None:
        raise NotFound(f"There is no verification {str(reference)[:40]}.")
    return found


def run_list(rig: Rig | None = None) -> QuerySet[VerificationRun]:
    """Newest first, with job and results at hand."""
    runs = VerificationRun.objects.select_related("rig", "job").prefetch_related("results").order_by("-pk")
    return runs.filter(rig=rig) if rig else runs


def accepted_run(rig: Rig, source: str) -> VerificationRun | None:
    """The run that people last accepted as this rig's normal; simulated and real cards are not compared."""
    runs = VerificationRun.objects.filter(rig=rig, hardware_source=source, accepted_at__isnull=False)
    return runs.order_by("-accepted_at").first()


def accepted_data(rig: Rig, source: str, check_name: str) -> Data | None:
    run = accepted_run(rig, source)
    if run is None:
        return None
    found = run.results.filter(check_name=check_name).values_list("data", flat=True).first()
    return found or None


def outcome(results: list[CheckResult]) -> tuple[Verdict, str]:
    """The worst verdict, and the sentence of the whole: "9 of 9 passed"."""
    counts = Counter(r.verdict for r in results)
    sentence = f"{counts[Verdict.PASS]} of {len(results)} passed"
    parts = []
    for verdict, words in (
        (Verdict.FAIL, "failed"),
        (Verdict.WARN, "to look at"),
        (Verdict.UNKNOWN, "not known"),
    ):
        if counts[verdict]:
            titles = ", ".join(r.title for r in results if r.verdict == verdict)
            parts.append(f"{counts[verdict]} {words} ({titles})")
    worst = next((v for v in (Verdict.FAIL, Verdict.WARN, Verdict.UNKNOWN) if counts[v]), Verdict.PASS)
    return worst, "; ".join([sentence, *parts]) + "."
