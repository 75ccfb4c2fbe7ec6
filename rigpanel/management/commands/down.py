"""``manage.py down``: stop the panel's processes, then every engine of this rig."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand
from django.db import DatabaseError

from apps.common.actors import COMMAND_LINE
from apps.common.errors import ApplicationError
from rigpanel.processes import end_processes, process_names

SUPERVISOR_PATIENCE_SECONDS = 30.0  # it in turn gives each process its own time


class Command(BaseCommand):
    help = "Stop the panel and every engine of this rig. Exit 0 also when nothing runs."
    requires_system_checks: list[str] = []

    def handle(self, *args: Any, **options: Any) -> None:
        ended = end_processes(["supervisor"], SUPERVISOR_PATIENCE_SECONDS)
        # The kernel ends the children of a killed supervisor; this is for what it could not.
        ended += end_processes([n for n in process_names() if n != "supervisor"])
        print("rigpanel: the panel is stopped." if ended else "rigpanel: the panel was not running.")
        try:
            engines, left = self.stop_engines()
        except (DatabaseError, ApplicationError) as error:
            print(f"rigpanel: the engines could not be stopped: {str(error).splitlines()[0]}", file=sys.stderr)
            sys.exit(1)
        if engines:
            print(f"rigpanel: {engines} engine{'s' if engines > 1 else ''} stopped.")
        for rig, count in left.items():
            told = f"{count} engine{'s' if count > 1 else ''} of rig {rig!r} still run{'s' if count == 1 else ''} here"
            print(f"rigpanel: {told}; RIGPANEL_RIG={rig} make down stops {'them' if count > 1 else 'it'}.")

    def stop_engines(self) -> tuple[int, Mapping[str, int]]:
        """How many were stopped, and how many run on by the names of other rigs."""
        from django.db import connection

        if connection.vendor == "sqlite" and not Path(connection.settings_dict["NAME"]).exists():
            return 0, {}  # nothing was ever started here
        from apps.deployments.services import running_under_other_names, stop_everything

        # The store is down by now: that no page can be told is no news.
        logging.disable(logging.WARNING)
        return len(stop_everything(actor=COMMAND_LINE)), running_under_other_names()
