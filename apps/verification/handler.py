"""Kind ``verify``: one step per check, then the verdict.

A check that fails makes the job *failed*: the rig said no. One that asks to be looked at does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from django.conf import settings
from django.utils import timezone

from apps.common.realtime import page_changed
from apps.hardware.client import HardwareClient
from apps.hardware.protocol import HardwareError
from apps.jobs.handlers import JobFailed, Step
from apps.jobs.models import Job
from apps.jobs.runner import JobContext
from apps.verification.checks import Check, check_get, suite_checks
from apps.verification.judging import CheckContext, Judgement, KnownCard
from apps.verification.models import CheckResult, Verdict, VerificationRun
from apps.verification.selectors import accepted_data, outcome
from apps.verification.services import KIND

TEXT_MAX = 300


class VerifyHandler:
    kind = KIND

    def steps(self, job: Job) -> Sequence[Step]:
        checks = suite_checks(str(job.params.get("suite", "quick")))
        steps = [Step(c.NAME, c.TITLE, partial(run_check, name=c.NAME)) for c in checks]
        return (*steps, Step("verdict", "Verdict", give_verdict, weight=0.1, cancellable=False))

    def compensation(self, job: Job) -> Sequence[Step]:
        return (Step("close", "Close the run", close_run, weight=0.1),)

    def summary(self, job: Job) -> dict[str, Any]:
        run = _run(job)
        _, sentence = outcome(list(run.results.all()))
        return {"summary": _said(run, sentence), "verification": run.pk}


def run_check(context: JobContext, name: str) -> str:
    """Collect and judge one check; the result replaces that of an attempt before this one."""
    check = check_get(name)
    run = _run(context.job)
    data, judgement = measure(check, run)
    CheckResult.objects.update_or_create(
        run=run,
        check_name=name,
        defaults={
            "title": check.TITLE,
            "verdict": judgement.verdict,
            "expected": judgement.expected[:TEXT_MAX],
            "measured": judgement.measured[:TEXT_MAX],
            "advice": judgement.advice,
            "data": data,
        },
    )
    page_changed("verification", verification=run.pk)
    context.log(
        f"{check.TITLE}: {judgement.measured} (expected {judgement.expected}): {judgement.verdict.label.lower()}"
    )
    return f"{judgement.verdict.label}: {judgement.measured}"


def measure(check: Check, run: VerificationRun) -> tuple[dict[str, Any], Judgement]:
    """What the check found and how that is judged; cards that cannot be read are a failure with its sentence."""
    rig = run.rig
    known = tuple(KnownCard(g.index, g.uuid, g.present) for g in rig.gpus.order_by("index", "pk"))
    inventory = reading = None
    if check.NEEDS_CARDS:
        client = HardwareClient(settings.SAMPLER_SOCKET)
        try:
            inventory, reading = client.inventory(), client.read()
        except HardwareError as error:
            return {}, Judgement(Verdict.FAIL, "cards that can be read", "nothing", str(error))
        finally:
            client.close()
        if inventory.source != run.hardware_source:
            run.hardware_source = inventory.source
            VerificationRun.objects.filter(pk=run.pk).update(hardware_source=inventory.source)
    context = CheckContext(
        simulated=run.hardware_source == "simulated",
        inventory=inventory,
        reading=reading,
        known=known,
        models_dir=Path(settings.MODELS_DIR),
        data_dir=Path(settings.DATA_DIR),
    )
    data = dict(check.collect(context))
    return data, check.judge(data, accepted_data(rig, run.hardware_source, check.NAME))


def give_verdict(context: JobContext) -> str:
    close_run(context)
    run = _run(context.job)
    results = list(run.results.all())
    worst, sentence = outcome(results)
    if worst == Verdict.FAIL:
        raise JobFailed(
            _said(run, sentence),
            verification=run.pk,
            failed=[
                f"{r.title}: {r.measured}, expected {r.expected}. {r.advice}"
                for r in results
                if r.verdict == Verdict.FAIL
            ],
        )
    return _said(run, sentence)


def close_run(context: JobContext) -> None:
    run = _run(context.job)
    VerificationRun.objects.filter(pk=run.pk, finished_at=None).update(finished_at=timezone.now())
    page_changed("verification", verification=run.pk)


def _run(job: Job) -> VerificationRun:
    return VerificationRun.objects.select_related("rig").get(job=job)


def _said(run: VerificationRun, sentence: str) -> str:
    return f"Simulated: {sentence}" if run.hardware_source == "simulated" else sentence
