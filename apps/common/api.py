"""What every part of the API shares: who may call, errors in one shape, paged lists.

Only the web process imports this: the library behind it costs memory that workers do without.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import structlog
from django.conf import settings
from django.db.models import QuerySet
from django.http import Http404, HttpRequest, HttpResponse, JsonResponse
from django.utils.module_loading import import_string
from ninja import NinjaAPI, Schema
from ninja.errors import HttpError, ValidationError
from ninja.pagination import LimitOffsetPagination
from ninja.utils import check_csrf
from pydantic import Field

from apps.common.access import ROLE_ATTRIBUTE, role_of
from apps.common.errors import ApplicationError, NotAllowed
from apps.common.paging import page_of
from apps.common.roles import Role

log = structlog.get_logger(__name__)
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
LIMIT_DEFAULT, LIMIT_MAX = 50, 500
CODES = {
    400: "bad_request", 401: "unauthorized", 403: "forbidden", 404: "not_found", 405: "method_not_allowed",
    409: "conflict", 413: "too_large", 422: "invalid", 429: "too_many_requests", 503: "unavailable",
}  # fmt: skip


class NotSignedIn(ApplicationError):
    status = 401
    code = "unauthorized"


class Needs:
    """Who may call an operation: somebody with ``required_role`` or more, by session or by key."""

    def __init__(self, role: Role) -> None:
        self.required_role = role

    def __call__(self, request: HttpRequest) -> Any:
        """The caller. Raises NotSignedIn or NotAllowed."""
        header = request.headers.get("Authorization", "")
        if header:
            request.user = _key_owner(header)
        role = role_of(request.user)
        if role is None:
            raise NotSignedIn("Sign in, or send a key of yours: 'Authorization: Bearer rp-…'. Keys are made on /me/.")
        # A key is sent on purpose; a session's cookie comes along with whatever page made the browser ask.
        if not header and request.method not in SAFE_METHODS and check_csrf(request) is not None:
            raise NotAllowed("With a session, send the CSRF token in X-CSRFToken; or use a key.", code="csrf")
        if not role.covers(self.required_role):
            raise NotAllowed(f"This needs the role {self.required_role.label.lower()}; yours is {role.label.lower()}.")
        return request.user


def _key_owner(header: str) -> Any:
    scheme, _, token = header.partition(" ")
    user = import_string(settings.API_KEY_OWNER)(token.strip()) if scheme.lower() == "bearer" else None
    if user is None:
        raise NotSignedIn("This key is not known here: it was revoked, has expired, or belongs to somebody who left.")
    return user


@lru_cache
def needs(role: Role) -> Needs:
    """``auth=needs(Role.OPERATOR)``: every operation declares its role with this and nothing else."""
    return Needs(role)


assert ROLE_ATTRIBUTE == "required_role"  # noqa: S101 - the route-by-role matrix reads one name everywhere


class PageIn(Schema):
    limit: int = Field(LIMIT_DEFAULT, ge=1, le=LIMIT_MAX)
    offset: int = Field(default=0, ge=0, le=2**31)


class Paged(LimitOffsetPagination):
    """``?limit=&offset=`` in, ``items`` and ``count`` out: ``@paginate(Paged)``."""

    Input = PageIn  # type: ignore[assignment]

    def paginate_queryset(self, queryset: Any, pagination: Any, request: HttpRequest, **params: Any) -> Any:
        if not isinstance(queryset, QuerySet):
            return super().paginate_queryset(queryset, pagination, request, **params)
        return {
            "items": page_of(queryset, pagination.offset, pagination.limit),
            "count": self._items_count(queryset),
        }


class Problem(Schema):
    code: str
    message: str
    fields: dict[str, list[str]] | None = None


class ErrorOut(Schema):
    """The shape of every answer that is not a success."""

    error: Problem


def error_response(
    status: int, message: str, *, code: str = "", fields: dict[str, list[str]] | None = None
) -> HttpResponse:
    error: dict[str, Any] = {"code": code or CODES.get(status, "error"), "message": message}
    if fields:
        error["fields"] = fields
    return JsonResponse({"error": error}, status=status)


def install_error_handlers(api: NinjaAPI) -> None:
    def application_error(request: HttpRequest, error: ApplicationError) -> HttpResponse:
        response = error_response(error.status, error.message, code=error.code, fields=error.fields)
        if error.status == 401:
            response["WWW-Authenticate"] = "Bearer"
        return response

    def validation_error(request: HttpRequest, error: ValidationError) -> HttpResponse:
        fields: dict[str, list[str]] = {}
        for part in error.errors:
            # ("body", "data", "name") is the field "name"; ("query", "limit") is "limit".
            where = [str(step) for step in part.get("loc", ())]
            where = where[2:] if where[:1] == ["body"] and len(where) > 2 else where[1:]
            message = str(part.get("msg", "")).removeprefix("Value error, ")
            fields.setdefault(".".join(where) or "body", []).append(message)
        return error_response(422, "The request cannot be used: see " + ", ".join(sorted(fields)) + ".", fields=fields)

    def http_error(request: HttpRequest, error: HttpError) -> HttpResponse:
        return error_response(error.status_code, str(error))

    def not_found(request: HttpRequest, error: Http404) -> HttpResponse:
        return error_response(404, "There is nothing at this address.")

    def our_bug(request: HttpRequest, error: Exception) -> HttpResponse:
        log.exception("api errored", path=request.path, exc_info=error)
        return error_response(
            500, "Something broke in rigpanel itself; the log of the web process has the trace.", code="errored"
        )

    handlers: dict[type[Exception], Any] = {
        ApplicationError: application_error,
        ValidationError: validation_error,
        HttpError: http_error,
        Http404: not_found,
        Exception: our_bug,
    }
    for kind, handler in handlers.items():
        api.add_exception_handler(kind, handler)
