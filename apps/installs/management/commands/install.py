"""``manage.py install NAME``: install an engine on this rig."""

from __future__ import annotations

import sys
from typing import Any

import redis
from django.conf import settings
from django.core.management.base import BaseCommand, CommandParser

from apps.common.actors import COMMAND_LINE
from apps.common.errors import ApplicationError
from apps.common.store import last_heartbeat
from apps.installs.services import install_request
from apps.jobs.console import finish


class Command(BaseCommand):
    help = "Install an engine on this rig; 'starter' is the smallest (llama.cpp with Gemma 3 270M)."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("name", help="what to install: starter, llama-server, vllm, ray")
        parser.add_argument("--engine-version", dest="pin", default="", help="its version, where several exist")
        parser.add_argument("--reason", default="", help="why, for the history")
        parser.add_argument("--wait", action="store_true", help="wait for the end")
        parser.add_argument("--json", action="store_true", help="print the job as JSON")

    def handle(self, *args: Any, **options: Any) -> None:
        if not worker_is_up():
            print(
                f"No worker of {settings.RIG_NAME} runs, so nobody would do the work. Start the panel first: make up.",
                file=sys.stderr,
            )
            sys.exit(1)
        try:
            job = install_request(
                name=options["name"], version=options["pin"], actor=COMMAND_LINE, reason=options["reason"]
            )
        except ApplicationError as error:
            print(error.message, file=sys.stderr)
            sys.exit(2 if error.code in ("unknown_install", "invalid") else 1)
        sys.exit(finish(job, wait=options["wait"], as_json=options["json"]))


def worker_is_up() -> bool:
    try:
        return last_heartbeat("control", settings.RIG_NAME) is not None
    except redis.RedisError:
        return False
