"""``manage.py openapi > docs/openapi.json``: the API's description as it is checked in."""

from __future__ import annotations

import json
from typing import Any

from django.core.management.base import BaseCommand


class Command(BaseCommand):
    help = "Prints the OpenAPI description of /api/v1/."

    def handle(self, *args: Any, **options: Any) -> None:
        from rigpanel.api import openapi_schema  # here, so that listing the commands does not load the API

        self.stdout.write(json.dumps(openapi_schema(), indent=1, ensure_ascii=False))
