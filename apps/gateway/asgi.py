"""The ASGI application of the gateway's own process: ``apps.gateway.asgi:application``."""

from __future__ import annotations

from apps.gateway.django_setup import setup

setup()

from django.conf import settings  # noqa: E402

from apps.gateway.accounting import Accounting  # noqa: E402
from apps.gateway.application import Gateway  # noqa: E402
from apps.gateway.limits import Limits  # noqa: E402

accounting = Accounting(settings.USAGE_DIR)
application = Gateway(Limits(wait_s=settings.GATEWAY_WAIT_SECONDS), accounting)
accounting.attach(application.routes, application.metrics.registry)
