"""The profiles' pages."""

from __future__ import annotations

import json
from typing import Any

from django.contrib import messages
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.debug import sensitive_post_parameters
from django.views.decorators.http import require_http_methods, require_POST, require_safe

from apps.common.access import role_required
from apps.common.actors import actor_of
from apps.common.errors import ApplicationError, Invalid
from apps.common.htmx import form_status
from apps.common.roles import Role
from apps.jobs.selectors import job_list
from apps.profiles import services
from apps.profiles.access import may_switch
from apps.profiles.forecast import state_when_free, when_free
from apps.profiles.forms import ProfileForm, RecipeForm, profile_initial
from apps.profiles.preview import preview, rig_facts
from apps.profiles.recipes.export import export
from apps.profiles.recipes.hidden import redact
from apps.profiles.recipes.matching import account, filled, form_values
from apps.profiles.recipes.reading import read_recipe
from apps.profiles.recipes.result import RecipeError
from apps.profiles.selectors import history, newest, plan_panel, profile_get, profile_list
from apps.rigs.selectors import rig_default

JOBS_SHOWN = 8
CHANGEABLE = frozenset({"options", "replicas", "tensor_parallel_size", "pipeline_parallel_size"})


@role_required(Role.VIEWER)
@require_safe
def profile_list_page(request: HttpRequest) -> HttpResponse:
    archived = request.GET.get("archived") == "1"
    rig = rig_default()
    facts = rig_facts(rig)
    state = state_when_free(facts, host_total_bytes=rig.host_memory_bytes)
    rows = []
    for profile in profile_list(include_archived=archived):
        version = newest(profile)
        rows.append(
            {
                "profile": profile,
                "version": version,
                "fit": when_free(version, facts, state),
                "may_switch": may_switch(request.user, profile),
            }
        )
    return render(request, "profiles/list.html", {"rows": rows, "archived": archived})


@role_required(Role.VIEWER)
@require_safe
def profile_detail(request: HttpRequest, slug: str) -> HttpResponse:
    profile = profile_get(slug)
    rig = rig_default()
    facts = rig_facts(rig)
    versions = history(profile)
    version = versions[0][0]
    context = {
        "profile": profile,
        "version": version,
        "versions": versions,
        "plan": plan_panel(version, rig),
        "preview": preview(version, rig, facts),
        "rig": rig,
        "jobs": list(job_list().filter(profile_slug=profile.slug)[:JOBS_SHOWN]),
        "may_switch": may_switch(request.user, profile),
    }
    return render(request, "profiles/detail.html", context)


@role_required(Role.OPERATOR)
@require_http_methods(["GET", "HEAD", "POST"])
def profile_new(request: HttpRequest) -> HttpResponse:
    initial = {"model": request.GET.get("model", "")}
    if copied := request.GET.get("copy"):
        initial = profile_initial(profile_get(copied)) | {"name": ""}
    form = ProfileForm(request.POST or None, initial=initial)
    if request.method == "POST" and form.is_valid():
        try:
            profile = services.profile_create(actor=actor_of(request.user), **form.cleaned_data)
        except ApplicationError as error:
            form.refused(error)
        else:
            return redirect("profiles:detail", slug=profile.slug)
    return render(request, "profiles/form.html", {"form": form}, status=form_status(form))


@role_required(Role.OPERATOR)
@sensitive_post_parameters("text")
@require_http_methods(["GET", "HEAD", "POST"])
def recipe_page(request: HttpRequest) -> HttpResponse:
    """A pasted text as forms of new profiles. Nothing is stored: what comes back has its secrets taken out."""
    form = RecipeForm(request.POST or None)
    context: dict[str, Any] = {"form": form}
    if request.method == "POST":
        if form.is_valid():
            try:
                context |= _read(form.cleaned_data["text"])
            except RecipeError as error:
                form.add_error("text", str(error))
        shown = RecipeForm({"text": redact(request.POST.get("text", "")[:65536])})
        shown.errors.update(form.errors)
        context["form"] = shown
        return render(request, "profiles/recipe.html", context, status=form_status(form))
    return render(request, "profiles/recipe.html", context)


def _read(text: str) -> dict[str, Any]:
    reading = read_recipe(text)
    found = []
    for number, recipe in enumerate(reading.recipes):
        fields = filled(recipe)
        found.append(
            {
                "recipe": account(recipe, fields),
                "form": ProfileForm(initial=form_values(fields), auto_id=f"id_{number}_%s"),
            }
        )
    return {"found": found, "notes": reading.notes}


@role_required(Role.VIEWER)
@require_safe
def profile_export(request: HttpRequest, slug: str) -> HttpResponse:
    name, text = export(profile_get(slug), rig_default(), request.GET.get("format", "yaml"))
    response = HttpResponse(text, content_type="text/plain; charset=utf-8")
    response["Content-Disposition"] = f'attachment; filename="{name}"'
    return response


@role_required(Role.OPERATOR)
@require_http_methods(["GET", "HEAD", "POST"])
def profile_edit(request: HttpRequest, slug: str) -> HttpResponse:
    profile = profile_get(slug)
    form = ProfileForm(request.POST or None, profile=profile)
    if request.method == "POST" and form.is_valid():
        before = profile.current.number
        try:
            profile = services.profile_update(profile, actor=actor_of(request.user), **form.cleaned_data)
        except ApplicationError as error:
            form.refused(error)
        else:
            number = profile.current.number
            if number != before:
                messages.success(request, f"Version {number} is stored. What runs goes on with its own version.")
            return redirect("profiles:detail", slug=profile.slug)
    return render(request, "profiles/form.html", {"form": form, "profile": profile}, status=form_status(form))


@role_required(Role.OPERATOR)
@require_POST
def change(request: HttpRequest, slug: str) -> HttpResponse:
    """A suggested change in one click: ``values`` is a JSON object of version fields, ``note`` says what it is."""
    profile = profile_get(slug)
    try:
        values = json.loads(request.POST.get("values", ""))
    except ValueError:
        values = None
    if not isinstance(values, dict) or not values or not set(values) <= CHANGEABLE:
        raise Invalid("This is not a change that a profile can take; reload the page and try again.")
    before = profile.current.number
    profile = services.profile_update(
        profile, actor=actor_of(request.user), note=request.POST.get("note", ""), **values
    )
    number = profile.current.number
    if number != before:
        messages.success(request, f"Version {number} is stored. What runs goes on with its own version.")
    return redirect("profiles:detail", slug=profile.slug)


@role_required(Role.OPERATOR)
@require_POST
def archive(request: HttpRequest, slug: str) -> HttpResponse:
    profile = profile_get(slug)
    actor = actor_of(request.user)
    if request.POST.get("restore"):
        services.profile_restore(profile, actor=actor)
        return redirect("profiles:detail", slug=profile.slug)
    services.profile_archive(profile, actor=actor)
    messages.success(request, f"{profile.name} is archived. What runs with it goes on.")
    return redirect("profiles:list")
