"""Small middleware of ours: trusted proxies, and errors that are answers."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable

from django.conf import settings
from django.http import HttpRequest, HttpResponse

from apps.common.errors import ApplicationError

FORWARDED = ("HTTP_X_FORWARDED_FOR", "HTTP_X_FORWARDED_PROTO", "HTTP_X_FORWARDED_HOST", "HTTP_FORWARDED")


def is_trusted(address: str, trusted: list[str]) -> bool:
    """Whether ``address`` is one of the proxies (addresses or networks) whose headers count."""
    try:
        ip = ipaddress.ip_address(address)
        return any(ip in ipaddress.ip_network(network, strict=False) for network in trusted)
    except ValueError:
        return False


class TrustedProxyMiddleware:
    """Drops forwarded headers that did not come from a trusted proxy, before anybody reads them."""

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        if is_trusted(request.META.get("REMOTE_ADDR", ""), settings.TRUSTED_PROXIES):
            client = request.META.get("HTTP_X_FORWARDED_FOR", "").split(",")[-1].strip()
            if client:
                request.META["REMOTE_ADDR"] = client
        else:
            for name in FORWARDED:
                request.META.pop(name, None)
        return self.get_response(request)


class ApplicationErrorMiddleware:
    """Turns an ApplicationError that a view let through into its page or htmx fragment."""

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        return self.get_response(request)

    def process_exception(self, request: HttpRequest, exception: Exception) -> HttpResponse | None:
        if not isinstance(exception, ApplicationError):
            return None
        from apps.common.problems import application_error

        return application_error(request, exception)
