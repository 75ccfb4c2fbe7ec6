"""htmx helpers: one partial with two doors, and the redirects and errors of both."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.shortcuts import render
from django.utils.http import url_has_allowed_host_and_scheme


def is_fragment(request: HttpRequest) -> bool:
    """Whether only a part of the page is wanted."""
    htmx: Any = getattr(request, "htmx", None)
    return bool(htmx) and not htmx.boosted and not htmx.history_restore_request


def render_either(
    request: HttpRequest, page: str, partial: str, context: dict[str, Any], *, status: int = 200
) -> HttpResponse:
    """The whole page, or for htmx only ``partial`` with the same context."""
    return render(request, partial if is_fragment(request) else page, context, status=status)


def form_status(form: Any) -> int:
    """422 for a form that was sent and is wrong, so that htmx and scripts can tell; else 200."""
    return 422 if form.is_bound and not form.is_valid() else 200


def redirect_either(request: HttpRequest, url: str) -> HttpResponse:
    """Go to ``url``: a plain redirect, or for htmx a header that makes the browser go there."""
    if is_fragment(request):
        return HttpResponse(status=200, headers={"HX-Redirect": url})
    return HttpResponseRedirect(url)


def begun(request: HttpRequest, job_url: str) -> HttpResponse:
    """After a click that began a job: to the job, or, where the form has ``next=home``, stay on the home
    page, which follows the job live (htmx needs no answer for that)."""
    if request.POST.get("next") != "home":
        return redirect_either(request, job_url)
    return HttpResponse(status=204) if is_fragment(request) else HttpResponseRedirect("/")


ASKED = ("csrfmiddlewaretoken", "confirmed", "about")


def ask(request: HttpRequest, title: str, question: str, *, verb: str, about: Iterable[str] = ()) -> HttpResponse:
    """Ask before a click is carried out: a dialog for htmx, else a page. Its yes sends the same form again
    with ``confirmed``, and with what the question was ``about``: a yes is no yes to what came up since."""
    fields = [(n, v) for n, values in request.POST.lists() if n not in ASKED for v in values]
    fields += [("about", one) for one in about]
    context = {"title": title, "question": question, "verb": verb, "action": request.path, "fields": fields}
    response = render_either(request, "ask.html", "components/ask.html", context)
    if is_fragment(request):
        response["HX-Retarget"] = "#ask"
        response["HX-Reswap"] = "innerHTML"
    return response


def safe_next(request: HttpRequest, default: str = "/") -> str:
    """The posted ``next``, when it leads to this panel."""
    target = request.POST.get("next", "")
    allowed = url_has_allowed_host_and_scheme(target, {request.get_host()}, require_https=request.is_secure())
    return target if allowed else default
