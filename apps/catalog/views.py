"""The catalogue's pages."""

from __future__ import annotations

from django.contrib import messages
from django.core.paginator import Paginator
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_http_methods, require_POST, require_safe

from apps.catalog import services
from apps.catalog.forms import ModelForm
from apps.catalog.models import Model
from apps.catalog.selectors import Fit, boots_of, fits_of, model_get, model_list, usages_of
from apps.catalog.weights.views import download_context, last_download
from apps.common.access import role_required
from apps.common.actors import actor_of
from apps.common.errors import ApplicationError
from apps.common.htmx import form_status
from apps.common.roles import Role
from apps.rigs.selectors import rig_default

PER_PAGE = 60
FACTS = (
    ("architecture", "Architecture", ""),
    ("quantization", "Quantization", ""),
    ("params_total", "Parameters", ""),
    ("params_active", "Active per token", ""),
    ("max_context_tokens", "Longest context", "tokens"),
    ("attention_type", "Attention", ""),
    ("layers", "Layers", ""),
    ("hidden_size", "Hidden size", ""),
    ("intermediate_size", "Intermediate size", ""),
    ("attention_heads", "Attention heads", ""),
    ("kv_heads", "KV heads", ""),
    ("head_dim", "Head dimension", ""),
    ("vocab_size", "Vocabulary", ""),
    ("experts", "Experts", ""),
    ("experts_per_token", "Experts per token", ""),
    ("tool_parser", "Tool parser", ""),
    ("reasoning_parser", "Reasoning parser", ""),
    ("chat_template", "Chat template", ""),
    ("licence", "Licence", ""),
)


@role_required(Role.VIEWER)
@require_safe
def model_list_page(request: HttpRequest) -> HttpResponse:
    rig = rig_default()
    search = request.GET.get("q", "")[:200]
    wanted = request.GET.get("fits", "")
    gpus = rig.gpus.filter(present=True).count()
    models = list(model_list(search, rig.slug))
    fits = fits_of(models, rig)
    rows = []
    for model in models:
        fit = fits.get(model.pk, Fit())
        here = getattr(model, "here", [])
        if (wanted == "yes" and fit.word not in ("fits", "tight")) or (wanted == "here" and not here):
            continue
        rows.append({"model": model, "fit": fit, "here": here[0] if here else None})
    page = Paginator(rows, PER_PAGE).get_page(request.GET.get("page"))
    context = {"page": page, "rows": page.object_list, "search": search, "wanted": wanted, "rig": rig, "gpus": gpus}
    return render(request, "catalog/list.html", context)


@role_required(Role.VIEWER)
@require_safe
def model_detail(request: HttpRequest, slug: str) -> HttpResponse:
    model = model_get(slug)
    rig = rig_default()
    context = {
        "model": model,
        "facts": [(label, getattr(model, name), unit) for name, label, unit in FACTS],
        "kv": sorted((name.replace("_", " "), value) for name, value in model.kv.items()),
        "fit": fits_of([model], rig).get(model.pk, Fit()),
        "rig": rig,
        "boots": boots_of(model, rig),
        "weights": list(model.weights.order_by("rig_name")),
        "usages": usages_of(model),
        **download_context(model, last_download(model), request.user),
    }
    return render(request, "catalog/detail.html", context)


@role_required(Role.OPERATOR)
@require_http_methods(["GET", "HEAD", "POST"])
def model_new(request: HttpRequest) -> HttpResponse:
    form = ModelForm(request.POST or None)
    if request.method == "POST" and form.is_valid():
        try:
            model = services.model_create(actor=actor_of(request.user), **form.facts())
        except ApplicationError as error:
            form.refused(error)
        else:
            return redirect("catalog:detail", slug=model.slug)
    return render(request, "catalog/form.html", {"form": form}, status=form_status(form))


@role_required(Role.OPERATOR)
@require_http_methods(["GET", "HEAD", "POST"])
def model_edit(request: HttpRequest, slug: str) -> HttpResponse:
    model = model_get(slug)
    form = ModelForm(request.POST or None, model=model)
    if request.method == "POST" and form.is_valid():
        try:
            services.model_update(model, actor=actor_of(request.user), **form.facts())
        except ApplicationError as error:
            form.refused(error)
        else:
            return redirect("catalog:detail", slug=model.slug)
    return render(request, "catalog/form.html", {"form": form, "model": model}, status=form_status(form))


@role_required(Role.OPERATOR)
@require_POST
def model_delete_view(request: HttpRequest, slug: str) -> HttpResponse:
    model: Model = model_get(slug)
    services.model_delete(model, actor=actor_of(request.user))
    messages.success(request, f"{model.name} is no longer in the catalogue.")
    return redirect("catalog:list")
