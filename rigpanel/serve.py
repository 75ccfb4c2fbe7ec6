"""Runs the web server: ``python -m rigpanel.serve``. The gateway's is ``python -m apps.gateway``."""

from __future__ import annotations

import os
from importlib import import_module

from apps.common.loading import loading

SMALL_MESSAGE_BYTES = 64 * 1024  # what a page may send over its socket


def main() -> None:
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "rigpanel.settings")
    with loading():
        import uvicorn
        from django.conf import settings

        from rigpanel.asgi import application

        import_module(settings.ROOT_URLCONF)  # else the first request would load the pages and the API
    uvicorn.run(
        application,
        host=settings.HOST,
        port=settings.PORT,
        ws="websockets-sansio",
        ws_max_size=SMALL_MESSAGE_BYTES,
        lifespan="off",
        proxy_headers=False,  # whom to trust is RIGPANEL_TRUSTED_PROXIES, not uvicorn's own list
        server_header=False,
        access_log=False,
        log_config=None,  # Django's logging carries uvicorn's lines too
        timeout_graceful_shutdown=2,
    )


if __name__ == "__main__":
    main()
