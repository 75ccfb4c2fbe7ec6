"""``manage.py switch PROFILE``: switch this rig to a profile."""

from __future__ import annotations

import sys
from typing import Any

from django.core.management.base import BaseCommand, CommandParser

from apps.common.actors import COMMAND_LINE
from apps.common.errors import ApplicationError
from apps.deployments.services import switch_request
from apps.jobs.console import finish
from apps.profiles.selectors import profile_get
from apps.rigs.selectors import rig_here


class Command(BaseCommand):
    help = "Switch this rig to a profile."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("profile", help="the profile's slug")
        parser.add_argument("--reason", default="", help="why, for the history")
        parser.add_argument("--exclusive", action="store_true", help="replace everything that runs")
        parser.add_argument(
            "--override", action="store_true", help="pass over somebody's pin or a card's pause; it is recorded"
        )
        parser.add_argument("--wait", action="store_true", help="wait for the end")
        parser.add_argument("--json", action="store_true", help="print the job as JSON")

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            job = switch_request(
                profile=profile_get(options["profile"]),
                actor=COMMAND_LINE,
                reason=options["reason"],
                exclusive=options["exclusive"],
                rig=rig_here(),
                override=options["override"],
            )
        except ApplicationError as error:
            print(error.message, file=sys.stderr)
            sys.exit(1)
        sys.exit(finish(job, wait=options["wait"], as_json=options["json"]))
