"""The page of aliases: names that stay while models change."""

from __future__ import annotations

from django import forms
from django.contrib import messages
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.urls import path
from django.views.decorators.http import require_POST, require_safe

from apps.common.access import role_required
from apps.common.actors import actor_of
from apps.common.errors import ApplicationError
from apps.common.htmx import form_status
from apps.common.roles import Role
from apps.gateway.aliases import NAME_LENGTH_MAX, WHATEVER_SERVES, alias_delete, alias_get, alias_list, alias_set
from apps.profiles.selectors import profile_list


class AliasForm(forms.Form):
    name = forms.CharField(
        label="Alias", max_length=NAME_LENGTH_MAX, help_text="What programs write as their model, say coder or default."
    )
    profile = forms.ChoiceField(label="Leads to", required=False)

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        profiles = [(profile.slug, profile.name) for profile in profile_list()]
        self.fields["profile"].choices = [("", WHATEVER_SERVES), *profiles]  # type: ignore[attr-defined]


@role_required(Role.VIEWER)
@require_safe
def alias_page(request: HttpRequest) -> HttpResponse:
    return _page(request, AliasForm())


@role_required(Role.OPERATOR)
@require_POST
def alias_save(request: HttpRequest) -> HttpResponse:
    form = AliasForm(request.POST)
    if form.is_valid():
        try:
            alias = alias_set(
                name=form.cleaned_data["name"], profile=form.cleaned_data["profile"], actor=actor_of(request.user)
            )
        except ApplicationError as error:
            form.add_error("name", error.message)
        else:
            messages.success(request, f"Requests for {alias.name} go to {alias.profile or WHATEVER_SERVES}.")
            return redirect("aliases:list")
    return _page(request, form)


@role_required(Role.OPERATOR)
@require_POST
def alias_remove(request: HttpRequest, name: str) -> HttpResponse:
    alias_delete(alias_get(name), actor=actor_of(request.user))
    messages.success(request, f"The alias {name} is gone; requests for it get 404 now.")
    return redirect("aliases:list")


def _page(request: HttpRequest, form: AliasForm) -> HttpResponse:
    context = {"aliases": list(alias_list()), "form": form, "whatever_serves": WHATEVER_SERVES}
    return render(request, "gateway/aliases.html", context, status=form_status(form))


app_name = "aliases"
urlpatterns = [
    path("aliases/", alias_page, name="list"),
    path("aliases/save", alias_save, name="save"),
    path("aliases/<path:name>/remove", alias_remove, name="remove"),
]
