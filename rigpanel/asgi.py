"""The web process: pages, API and sockets."""

from __future__ import annotations

import os

from django.core.asgi import get_asgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "rigpanel.settings")
_http = get_asgi_application()  # loads the apps, which everything below needs

from channels.auth import AuthMiddlewareStack  # noqa: E402
from channels.routing import ProtocolTypeRouter, URLRouter  # noqa: E402
from channels.security.websocket import AllowedHostsOriginValidator, OriginValidator  # noqa: E402
from django.conf import settings  # noqa: E402

from rigpanel.routing import websocket_urlpatterns  # noqa: E402

_sockets = AuthMiddlewareStack(URLRouter(websocket_urlpatterns))
application = ProtocolTypeRouter(
    {
        "http": _http,
        # A browser sends cookies with sockets of any site, so where a socket was opened from is checked:
        # behind https it must be the public address itself, else one of the allowed hosts.
        "websocket": OriginValidator(_sockets, settings.CSRF_TRUSTED_ORIGINS)
        if settings.HTTPS
        else AllowedHostsOriginValidator(_sockets),
    }
)
