"""Pages of what runs, and the two buttons that change it."""

from __future__ import annotations

from django.contrib import messages
from django.core.paginator import Paginator
from django.forms.models import model_to_dict
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.urls import reverse
from django.views.decorators.http import require_POST

from apps.common.access import covers, role_of, role_required
from apps.common.actors import actor_of
from apps.common.htmx import ask, begun
from apps.common.roles import Role
from apps.deployments import launching
from apps.deployments.forms import RestartPolicyForm
from apps.deployments.models import Deployment, Status
from apps.deployments.policies.decide import Asker
from apps.deployments.policies.services import loading_set
from apps.deployments.policies.verdicts import asker_of, stop_verdict, switch_verdict
from apps.deployments.questions import pin_question, stop_question, switch_question
from apps.deployments.restarting import coming_back, policy_of
from apps.deployments.selectors import deployment_get
from apps.deployments.services import (
    cut_request,
    require_switch,
    restart_policy_set,
    stop_request,
    switch_request,
)
from apps.deployments.suggestions import Suggestion, suggestion_apply, suggestion_of
from apps.jobs.models import Job
from apps.jobs.selectors import job_get
from apps.profiles.selectors import profile_get
from apps.rigs.selectors import rig_default

PAGE_SIZE = 50


@role_required(Role.VIEWER)
def deployment_list(request: HttpRequest) -> HttpResponse:
    rig = rig_default()
    rows = Deployment.objects.filter(rig=rig).select_related("version__profile")
    page = Paginator(rows, PAGE_SIZE).get_page(request.GET.get("page"))
    return render(request, "deployments/list.html", {"page": page, "rig": rig})


@role_required(Role.VIEWER)
def deployment_detail(request: HttpRequest, pk: int) -> HttpResponse:
    deployment = deployment_get(pk)
    log_tail = ""
    here = deployment.rig == rig_default()
    if here and deployment.is_live:
        log_tail = "\n".join(launching.log_tail(r) for r in deployment.replicas.all())
    elif deployment.evidence:
        log_tail = str(deployment.evidence.get("log_tail", ""))
    context = {
        "deployment": deployment,
        "events": deployment.events.all(),
        "replicas": deployment.replicas.prefetch_related("reservations__gpu"),
        "log_tail": log_tail,
        "may_cut": deployment.status == Status.DRAINING and covers(request.user, Role.OPERATOR),
        "may_stop": (deployment.is_live or deployment.comes_back) and covers(request.user, Role.OPERATOR),
        "coming_back": coming_back(deployment),
        "suggestion": _suggestion(request, deployment),
    }
    return render(request, "deployments/detail.html", context)


def _suggestion(request: HttpRequest, deployment: Deployment) -> Suggestion | None:
    if deployment.is_live or not deployment.job_id or not covers(request.user, Role.OPERATOR):
        return None
    return suggestion_of(Job.objects.filter(pk=deployment.job_id).first())


@role_required(Role.OPERATOR)
def restarts(request: HttpRequest, slug: str) -> HttpResponse:
    """The restart policy of a profile."""
    profile = profile_get(slug)
    if request.method == "POST":
        form = RestartPolicyForm(request.POST)
        if form.is_valid():
            restart_policy_set(profile=profile, actor=actor_of(request.user), **form.cleaned_data)
            messages.success(request, "Saved.")
            return redirect("profiles:detail", slug)
    else:
        form = RestartPolicyForm(initial=model_to_dict(policy_of(profile)))
    return render(
        request, "deployments/restarts.html", {"profile": profile, "form": form}, status=422 if form.is_bound else 200
    )


@require_POST
@role_required(Role.OPERATOR)
def loading(request: HttpRequest, slug: str) -> HttpResponse:
    """Whose requests at the gateway may load a profile; the form stands on the profile's page."""
    profile = profile_get(slug)
    loading_set(profile=profile, actor=actor_of(request.user), by=request.POST.get("by", ""))
    messages.success(request, "Saved.")
    return redirect("profiles:detail", slug)


@require_POST
@role_required(Role.MEMBER)
def switch(request: HttpRequest) -> HttpResponse:
    profile = profile_get(request.POST.get("profile", ""))
    role, actor, rig = role_of(request.user), actor_of(request.user), rig_default()
    require_switch(role, profile)
    asker, version, passing = asker_of(role), profile.current, request.POST.getlist("about")
    verdict = switch_verdict(version, rig, asker=asker, asker_pk=actor.user_pk, passing=passing)
    asked = [pin_question(verdict), "" if "confirmed" in request.POST else switch_question(version, rig)]
    if question := " ".join(filter(None, asked)):
        return ask(request, f"Switch to {profile.name}?", question, verb="Switch", about=verdict.keys)
    reason = request.POST.get("reason", "")
    job = switch_request(profile=profile, actor=actor, reason=reason, rig=rig, asker=asker, passing=passing)
    return _to_job(request, job.pk)


@require_POST
@role_required(Role.OPERATOR)
def stop(request: HttpRequest, pk: int) -> HttpResponse:
    deployment = deployment_get(pk)
    actor, passing = actor_of(request.user), request.POST.getlist("about")
    verdict = stop_verdict(deployment, asker=Asker.OPERATOR, asker_pk=actor.user_pk, passing=passing)
    asked = [pin_question(verdict), "" if "confirmed" in request.POST else stop_question(deployment)]
    if question := " ".join(filter(None, asked)):
        return ask(request, f"Stop {deployment.profile_name}?", question, verb="Stop it", about=verdict.keys)
    reason = request.POST.get("reason", "")
    job = stop_request(deployment=deployment, actor=actor, reason=reason, passing=passing)
    return _to_job(request, job.pk)


@require_POST
@role_required(Role.OPERATOR)
def cut(request: HttpRequest, pk: int) -> HttpResponse:
    cut_request(deployment=deployment_get(pk), actor=actor_of(request.user))
    return redirect("deployments:detail", pk)


def _to_job(request: HttpRequest, job_id: int) -> HttpResponse:
    """Back to where the click was made (the page follows the job live there), or to the job itself."""
    return begun(request, reverse("jobs:detail", args=[job_id]))


@require_POST
@role_required(Role.OPERATOR)
def suggestion(request: HttpRequest, pk: int) -> HttpResponse:
    """What a failed job suggests becomes a new version of its profile."""
    version = suggestion_apply(job_get(pk), actor=actor_of(request.user))
    messages.success(
        request, f"Version {version.number} of {version.profile.name}: {version.note} Switch to it to try."
    )
    return begun(request, reverse("profiles:detail", args=[version.profile.slug]))
