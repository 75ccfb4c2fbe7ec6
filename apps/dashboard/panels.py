"""What the home page's other panels show: one dataclass per panel, computed once for page and socket."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from django.conf import settings
from django.db.models import QuerySet
from django.utils import timezone

from apps.common.access import role_of
from apps.common.roles import Role
from apps.common.units import thousands
from apps.deployments.lacks import lacking
from apps.deployments.models import COMING_UP, SERVING, Deployment, Status
from apps.deployments.policies.models import Pin, SwitchRequest
from apps.deployments.policies.selectors import pins_in_force, requests_waiting
from apps.deployments.scrape import EngineFacts, engine_facts
from apps.deployments.selectors import last_ended, live_deployments, streams_by_deployment
from apps.deployments.services import may_switch
from apps.installs.selectors import install_list
from apps.jobs.estimates import typical_seconds_each
from apps.jobs.models import LIVE_STATES, Job, JobState, JobStep
from apps.profiles.forecast import Forecast, state_when_free, when_free
from apps.profiles.models import Profile, ProfileVersion
from apps.profiles.preview import rig_facts
from apps.profiles.selectors import newest, profile_list
from apps.rigs.models import Rig

LAST_JOBS = 6
FAILURE_SHOWN_FOR = timedelta(days=1)
WORD_TONES = {"fits": "ok", "tight": "warn", "does not fit": "bad"}
# Columns that lists do not show: a switch keeps kilobytes in them.
HEAVY = ("params", "data", "failure")


@dataclass(frozen=True, slots=True)
class Fact:
    """A number with its unit; None is "not reported"."""

    name: str
    value: str | None
    unit: str = ""


@dataclass(frozen=True, slots=True)
class Serving:
    """One live deployment. ``streams`` is None where no gateway reports."""

    deployment: Deployment
    facts: tuple[Fact, ...]
    job: Job | None
    steps: tuple[JobStep, ...]
    streams: int | None
    address: str
    may_stop: bool

    @property
    def is_serving(self) -> bool:
        return self.deployment.status in SERVING

    @property
    def is_coming_up(self) -> bool:
        return self.deployment.status in COMING_UP


@dataclass(frozen=True, slots=True)
class Failure:
    """The last switch when it failed, or an engine that died: why, what shows it and the one suggestion."""

    job: Job
    headline: str
    summary: str
    suggestion: str
    evidence: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ServingPanel:
    serving: tuple[Serving, ...]
    switching: tuple[tuple[Job, tuple[JobStep, ...]], ...]  # under way, with no deployment of their own yet
    failure: Failure | None
    has_profiles: bool


@dataclass(frozen=True, slots=True)
class Choice:
    """One row of *Switch to*."""

    profile: Profile
    version: ProfileVersion
    fit_tone: str
    fit_text: str
    ready_seconds: float | None
    state: str  # "", or how it runs now
    serves_now: bool  # the newest version, ready
    coming_up: bool
    lacks: str  # "engine" or "weights" that a start would miss; "" where both are there
    may: bool
    why_not: str
    may_request: bool


@dataclass(frozen=True, slots=True)
class SwitchPanel:
    choices: tuple[Choice, ...]
    nobody_may: bool


@dataclass(frozen=True, slots=True)
class PoliciesPanel:
    """Pins in force, and requests: operators see all that wait, members their own."""

    pins: tuple[Pin, ...]
    waiting: tuple[SwitchRequest, ...]
    may_answer: bool


@dataclass(frozen=True, slots=True)
class StarterPanel:
    """Shown while the rig has no engine of its own to serve a real model with."""

    wanted: bool
    job: Job | None
    may_install: bool


@dataclass(frozen=True, slots=True)
class JobsPanel:
    jobs: tuple[Job, ...]


def serving_panel(rig: Rig, user: Any, live: Sequence[Deployment] | None = None) -> ServingPanel:
    live = live_deployments(rig) if live is None else live
    jobs = {j.pk: j for j in Job.objects.filter(rig_name=rig.slug, kind="switch", state__in=LIVE_STATES).defer(*HEAVY)}
    steps: dict[int, list[JobStep]] = {}
    if jobs:
        for step in JobStep.objects.filter(job_id__in=jobs).order_by("index"):
            steps.setdefault(step.job_id, []).append(step)
    streams = streams_by_deployment()
    engines = engine_facts([d.pk for d in live if d.status in SERVING])
    operator = user.has_role(Role.OPERATOR)
    serving = []
    for d in sorted(live, key=lambda d: (d.status not in SERVING, d.pk)):
        job = jobs.get(d.job_id) if d.job_id and d.status in COMING_UP else None
        serving.append(
            Serving(
                deployment=d,
                facts=_facts(engines.get(d.pk)) if d.status in SERVING else (),
                job=job,
                steps=tuple(steps.get(job.pk, ())) if job else (),
                streams=None if streams is None else streams.get(d.pk, 0),
                address=f"{settings.GATEWAY_URL}/v1",
                may_stop=operator and d.status not in (Status.STOPPING,),
            )
        )
    shown = {s.job.pk for s in serving if s.job}
    switching = tuple((j, tuple(steps.get(pk, ()))) for pk, j in jobs.items() if pk not in shown)
    failure = None if jobs else _last_failure(rig)
    return ServingPanel(
        tuple(serving), switching, failure, bool(live) or Profile.objects.filter(archived_at=None).exists()
    )


def _facts(engine: EngineFacts | None) -> tuple[Fact, ...]:
    rate = engine.generation_tokens_per_second if engine else None
    waiting = engine.requests_waiting if engine else None
    cache = engine.kv_cache_usage_ratio if engine else None
    first = engine.time_to_first_token_seconds if engine else None
    return (
        Fact("decode", None if rate is None else thousands(rate), "tok/s"),
        Fact("first token, mean", None if first is None else f"{first:.2f}", "s"),
        Fact("waiting", None if waiting is None else thousands(waiting)),
        Fact("KV cache", None if cache is None else f"{100 * cache:.0f}", "%"),
    )


def _last_failure(rig: Rig) -> Failure | None:
    """The newest switch, if it failed within a day: also when the old model came back, somebody should read why.
    An engine that died by itself afterwards counts too."""
    # One look per kind: each takes its row from an index, however long the history is.
    newest = [
        _jobs(rig).filter(kind=kind).exclude(state=JobState.CANCELLED).order_by("-created_at", "-id").first()
        for kind in ("switch", "stop")
    ]
    job = max((j for j in newest if j is not None), key=lambda j: j.pk, default=None)
    if job is not None and (job.state not in (JobState.FAILED, JobState.ERRORED) or _old(job)):
        job = None
    ended = last_ended(rig)
    if job is None:
        if ended is None or ended.status != Status.FAILED or ended.ended_at is None:
            return None
        if timezone.now() - ended.ended_at > FAILURE_SHOWN_FOR or not ended.job_id:
            return None
        newer = _jobs(rig).filter(kind="switch", state=JobState.SUCCEEDED, finished_at__gt=ended.ended_at).exists()
        job = None if newer else _jobs(rig).filter(pk=ended.job_id).first()
        if job is None:
            return None
        facts = ended.evidence or {}
        return Failure(
            job,
            f"{ended.profile_name} stopped serving.",
            ended.status_reason,
            str(facts.get("suggestion") or ""),
            _lines(facts),
        )
    facts = job.result or {}
    return Failure(
        job,
        f"{job.title} {'broke' if job.state == JobState.ERRORED else 'did not go well'}.",
        job.summary,
        str(facts.get("suggestion") or ""),
        _lines(facts),
    )


def _old(job: Job) -> bool:
    return job.finished_at is None or timezone.now() - job.finished_at > FAILURE_SHOWN_FOR


def _lines(facts: dict[str, Any]) -> tuple[str, ...]:
    found = facts.get("evidence")
    return tuple(str(line) for line in found[:6]) if isinstance(found, list) else ()


def _jobs(rig: Rig) -> QuerySet[Job]:
    return Job.objects.filter(rig_name=rig.slug).defer(*HEAVY).order_by("-pk")


def policies_panel(rig: Rig, user: Any) -> PoliciesPanel:
    role = role_of(user)
    may_answer = role is not None and role.covers(Role.OPERATOR)
    waiting = requests_waiting(rig)
    return PoliciesPanel(
        tuple(pins_in_force(rig)), tuple(waiting if may_answer else waiting.filter(user_pk=user.pk)), may_answer
    )


def switch_panel(rig: Rig, user: Any, live: Sequence[Deployment] | None = None) -> SwitchPanel:
    live = live_deployments(rig) if live is None else live
    role = role_of(user)
    ready = typical_seconds_each("switch", rig.slug)
    facts = rig_facts(rig)
    state = state_when_free(facts, host_total_bytes=rig.host_memory_bytes)
    running = {d.version.profile_id: d for d in live}
    offered = [(profile, newest(profile)) for profile in profile_list()]
    lacks = lacking((version for _, version in offered), rig)
    choices = []
    for profile, version in offered:
        fit = when_free(version, facts, state)
        now = running.get(profile.pk)
        may = may_switch(role, profile)
        choices.append(
            Choice(
                profile=profile,
                version=version,
                fit_tone=WORD_TONES.get(fit.word, "idle"),
                fit_text=_fit_text(version, fit),
                ready_seconds=ready.get(profile.slug),
                state=now.get_status_display().lower() if now else "",
                serves_now=now is not None and now.version_id == version.pk and now.status == Status.READY,
                coming_up=now is not None and now.version_id == version.pk and now.status in COMING_UP,
                lacks=lacks.get(version.pk, ""),
                may=may and fit.word != "does not fit",
                why_not="" if may else _why_not(role),
                may_request=not may and role is not None and role.covers(Role.MEMBER),
            )
        )
    return SwitchPanel(tuple(choices), nobody_may=bool(choices) and not any(c.may for c in choices))


def _fit_text(version: ProfileVersion, fit: Forecast) -> str:
    """Weights and the cache of one full request on the fullest card."""
    if version.gpus_needed == 0:
        return "runs on the CPU"
    gpus, needed = fit.estimate.gpus, fit.estimate.needed_kv
    if not gpus or fit.word == "does not fit":
        return fit.sentence
    cache = f" + {needed.high / 2**30:.1f}" if needed else ""
    prefix = "tight: " if fit.word == "tight" else ""
    return f"{prefix}{max(gpu.weights.middle for gpu in gpus) / 2**30:.1f}{cache} GiB/GPU"


def _why_not(role: Role | None) -> str:
    if role is not None and role.covers(Role.MEMBER):
        return "operators only"
    return "your role only looks"


def starter_panel(rig: Rig, user: Any) -> StarterPanel:
    installed = any(i.state == "ready" for i in install_list(rig.slug))
    job = None
    if not installed:
        job = _jobs(rig).filter(kind="install").first()
        if job is not None and job.state == JobState.SUCCEEDED:
            job = None
    return StarterPanel(wanted=not installed, job=job, may_install=user.has_role(Role.OPERATOR))


def jobs_panel(rig: Rig) -> JobsPanel:
    return JobsPanel(tuple(_jobs(rig)[:LAST_JOBS]))
