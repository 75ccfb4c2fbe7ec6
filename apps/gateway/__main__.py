"""``python -m apps.gateway``: the gateway on ``RIGPANEL_HOST:RIGPANEL_GATEWAY_PORT``."""

from __future__ import annotations

import gc
import sys

from apps.common.loading import loading
from rigpanel.environment import ConfigError

# Requests that begin together are many objects that live a while, some 80 each, and in what has ended there is next to
# nothing for the garbage collector (26 objects after 3,200 requests, 81 after 1,000 clients that left). At 10,000 it
# looked two or three times while 256 streams began, 8 ms each.
GC_OBJECTS = 100_000


def main() -> int:
    try:
        with loading():
            import uvicorn
            from django.conf import settings

            from apps.gateway.asgi import application
            from apps.gateway.server import listening_socket, raise_file_limit, server_config
    except ConfigError as error:
        print(f"rigpanel gateway: {error}", file=sys.stderr)  # noqa: T201 - before logging is set up
        return 1

    try:
        listener = listening_socket(settings.HOST, settings.GATEWAY_PORT)
    except OSError as error:
        reason = f"{settings.HOST}:{settings.GATEWAY_PORT} cannot be used: {error.strerror}"
        print(f"rigpanel gateway: {reason}. Set RIGPANEL_GATEWAY_PORT to a free port.", file=sys.stderr)  # noqa: T201
        return 1
    raise_file_limit()
    gc.set_threshold(GC_OBJECTS)
    gc.freeze()  # what is loaded stays: no look goes through it
    uvicorn.Server(server_config(application, drain_s=settings.GATEWAY_DRAIN_SECONDS)).run(sockets=[listener])
    return 0


if __name__ == "__main__":
    sys.exit(main())
