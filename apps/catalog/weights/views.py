"""Pages of weights: the download panel of a model, what lies on the disk, the hub's token."""

from __future__ import annotations

from typing import Any

from django.conf import settings
from django.contrib import messages
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.template.loader import render_to_string
from django.urls import reverse
from django.views.decorators.http import require_http_methods, require_POST, require_safe

from apps.catalog.models import Model
from apps.catalog.selectors import model_get
from apps.catalog.services import weights_forget
from apps.catalog.weights import services
from apps.catalog.weights.disk import disk_report
from apps.catalog.weights.token import token_source, token_store
from apps.common.access import covers, role_required
from apps.common.actors import actor_of
from apps.common.errors import ApplicationError
from apps.common.htmx import redirect_either
from apps.common.roles import Role
from apps.jobs.models import LIVE_STATES, Job
from apps.jobs.selectors import job_get
from apps.rigs.selectors import rig_default

FILES_SHOWN = 40


def last_download(model: Model) -> Job | None:
    """The one under way, else the last that ended."""
    jobs = Job.objects.filter(kind="download", rig_name=rig_default().slug, params__model=model.slug)
    return jobs.filter(state__in=LIVE_STATES).first() or jobs.order_by("-pk").first()


def download_context(model: Model, job: Job | None, user: Any) -> dict[str, Any]:
    """What the download panel shows; page and socket use it alike."""
    files = []
    if job is not None and not job.is_final:
        done = job.data.get("done", {})
        for file in job.data.get("files", []):
            have = min(int(done.get(file["name"], 0)), file["size_bytes"])
            files.append({"name": file["name"], "size_bytes": file["size_bytes"], "done_bytes": have})
        # The ones that move come first, then what waits, then what is there.
        files.sort(key=lambda f: (f["done_bytes"] >= f["size_bytes"], f["done_bytes"] == 0, f["name"]))
    return {
        "model": model,
        "job": job,
        "step": job.steps.filter(state="running").first() if job is not None and not job.is_final else None,
        "files": files[:FILES_SHOWN],
        "more_files": max(0, len(files) - FILES_SHOWN),
        "repo": services.repo_of(model),
        "may_download": covers(user, Role.OPERATOR),
        "token": token_source(),
    }


def download_panel(job_id: str, user: Any) -> str:
    """The panel as HTML, for the socket. Without a request its forms rely on the page's CSRF header."""
    job = job_get(job_id)
    model = model_get(str(job.params.get("model", "")))
    return render_to_string("catalog/partials/download.html", download_context(model, job, user))


@role_required(Role.OPERATOR)
@require_POST
def download(request: HttpRequest, slug: str) -> HttpResponse:
    model = model_get(slug)
    services.download_request(
        model,
        actor=actor_of(request.user),
        rig=rig_default(),
        repo=request.POST.get("repo", ""),
        revision=request.POST.get("revision", ""),
        quantization=request.POST.get("quantization", ""),
        reason=request.POST.get("reason", ""),
    )
    return redirect_either(request, reverse("catalog:detail", args=[model.slug]))


@role_required(Role.OPERATOR)
@require_http_methods(["GET", "HEAD", "POST"])
def register(request: HttpRequest, slug: str) -> HttpResponse:
    model = model_get(slug)
    problem, path = "", request.POST.get("path", "")
    if request.method == "POST":
        try:
            weights = services.register_here(model, path=path, actor=actor_of(request.user))
        except ApplicationError as error:
            problem = error.message
        else:
            messages.success(request, f"{model.name} is served from {weights.path} from now on.")
            return redirect("catalog:detail", slug=model.slug)
    context = {"model": model, "path": path, "problem": problem, "rig_name": settings.RIG_NAME}
    return render(request, "catalog/register.html", context, status=422 if problem else 200)


@role_required(Role.OPERATOR)
@require_POST
def forget(request: HttpRequest, slug: str) -> HttpResponse:
    model = model_get(slug)
    for weights in model.weights.filter(rig_name=rig_default().slug):
        weights_forget(weights, actor=actor_of(request.user))
        messages.success(request, f"The panel no longer takes {model.name} from {weights.path}; the files stay.")
    return redirect("catalog:detail", slug=model.slug)


@role_required(Role.VIEWER)
@require_safe
def disk(request: HttpRequest) -> HttpResponse:
    jobs = Job.objects.filter(kind__in=("download", "remove_weights"), rig_name=settings.RIG_NAME)
    context = {
        "disk": disk_report(),
        "rig_name": settings.RIG_NAME,
        "under_way": list(jobs.filter(state__in=LIVE_STATES).order_by("pk")),
        "may_delete": covers(request.user, Role.OPERATOR),
        "may_set_token": covers(request.user, Role.OWNER),
        "token": token_source(),
    }
    return render(request, "catalog/disk.html", context)


@role_required(Role.OPERATOR)
@require_POST
def delete(request: HttpRequest) -> HttpResponse:
    job = services.removal_request(request.POST.get("place", ""), actor=actor_of(request.user))
    return redirect_either(request, reverse("jobs:detail", args=[job.pk]))


@role_required(Role.OWNER)
@require_POST
def token(request: HttpRequest) -> HttpResponse:
    value = "" if request.POST.get("remove") else request.POST.get("token", "")
    token_store(value, actor=actor_of(request.user))
    messages.success(request, "The hub's token is stored." if value.strip() else "The hub's token is removed.")
    return redirect("catalog:disk")
