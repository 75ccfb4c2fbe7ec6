"""Errors as people see them: a page, or for htmx a strip above the page they are on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.template.loader import render_to_string

from apps.common.errors import ApplicationError
from apps.common.htmx import is_fragment

TITLES = {
    400: "That cannot be done",
    403: "You may not do that",
    404: "There is nothing here",
    409: "Something else is in the way",
    422: "Please look at this again",
    503: "Not available right now",
}


def problem_response(
    request: HttpRequest, status: int, message: str, fields: Mapping[str, Sequence[str]] | None = None
) -> HttpResponse:
    """The answer for an error with a sentence. htmx gets it into ``#problems``, whatever it aimed at."""
    context = {"title": TITLES.get(status, TITLES[400]), "message": message, "fields": dict(fields or {})}
    if is_fragment(request):
        response = render(request, "components/problem.html", context, status=status)
        response["HX-Retarget"] = "#problems"
        response["HX-Reswap"] = "innerHTML show:window:top"
        return response
    return render(request, "error.html", context, status=status)


def application_error(request: HttpRequest, error: ApplicationError) -> HttpResponse:
    return problem_response(request, error.status, error.message, error.fields)


def not_found(request: HttpRequest, exception: Exception) -> HttpResponse:
    return problem_response(request, 404, "This address leads nowhere; what it named may have been removed.")


def forbidden(request: HttpRequest, exception: Exception) -> HttpResponse:
    return problem_response(request, 403, str(exception) or "Your role does not allow this.")


def server_error(request: HttpRequest) -> HttpResponse:
    """Uses no context and no query: whatever broke must not break this too."""
    if request.headers.get("HX-Request"):
        message = "Something broke in rigpanel itself; the log of the web process has the details. What serves goes on."
        html = render_to_string("components/problem.html", {"message": message})
        return HttpResponse(html, status=500, headers={"HX-Retarget": "#problems", "HX-Reswap": "innerHTML"})
    return HttpResponse(render_to_string("500.html"), status=500)
