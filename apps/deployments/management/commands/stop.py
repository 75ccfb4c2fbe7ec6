"""``manage.py stop [PROFILE]``: stop what runs or is to be started again, or one profile."""

from __future__ import annotations

import sys
from typing import Any

from django.core.management.base import BaseCommand, CommandParser

from apps.common.actors import COMMAND_LINE
from apps.common.errors import ApplicationError
from apps.deployments.models import LIVE_OR_COMES_BACK, Deployment
from apps.deployments.services import stop_request
from apps.jobs.console import finish
from apps.profiles.selectors import profile_get
from apps.rigs.selectors import rig_here


class Command(BaseCommand):
    help = "Stop what runs on this rig or is to be started again, or only one profile."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("profile", nargs="?", help="the profile's slug; all of them without")
        parser.add_argument("--reason", default="", help="why, for the history")
        parser.add_argument("--override", action="store_true", help="pass over somebody's pin; it is recorded")
        parser.add_argument("--wait", action="store_true", help="wait for the end")

    def handle(self, *args: Any, **options: Any) -> None:
        # One that died and waits for its restart is ended too: else it comes up on a rig that was to be empty.
        running = Deployment.objects.filter(LIVE_OR_COMES_BACK, rig=rig_here())
        live = list(running.select_related("version__profile", "rig"))
        try:
            if options["profile"]:
                profile = profile_get(options["profile"])
                live = [d for d in live if d.version.profile_id == profile.pk]
                if not live:
                    print(f"{profile} is not running.", file=sys.stderr)
                    sys.exit(1)
            jobs = [
                stop_request(deployment=d, actor=COMMAND_LINE, reason=options["reason"], override=options["override"])
                for d in live
            ]
        except ApplicationError as error:
            print(error.message, file=sys.stderr)
            sys.exit(1)
        if not jobs:
            print("Nothing runs.")
        sys.exit(max((finish(job, wait=options["wait"], as_json=False) for job in jobs), default=0))
