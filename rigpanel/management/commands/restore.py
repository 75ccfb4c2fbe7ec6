"""``manage.py restore FILE``: the panel as it was when the backup was made."""

from __future__ import annotations

import logging
import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from django.core.management import call_command
from django.core.management.base import BaseCommand
from django.db import DatabaseError

from apps.common.errors import ApplicationError
from rigpanel import preflight
from rigpanel.backup import NotRestored, examine, has_accounts, restore


class Command(BaseCommand):
    help = "Bring back what backup wrote. Stop the panel first; --force replaces a panel that has accounts."
    requires_system_checks: list[str] = []

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("file", type=Path)
        parser.add_argument("--force", action="store_true", help="replace what is there")

    def handle(self, *args: Any, file: Path, force: bool, **options: Any) -> None:
        logging.getLogger("apps.common.realtime").setLevel(logging.ERROR)  # the store is down: nobody listens
        try:
            preflight.take_lock()  # kept until this process ends: nobody starts the panel meanwhile
            manifest = examine(file)
            preflight.check_database()
            call_command("migrate", interactive=False, verbosity=0)
            if has_accounts() and not force:
                raise NotRestored("This panel has accounts already; --force replaces it with the backup.")
            kept = restore(file, manifest)
        except (preflight.NotStarted, ApplicationError, DatabaseError, OSError) as error:
            print(f"rigpanel: nothing was restored: {str(error).splitlines()[0]}", file=sys.stderr)
            sys.exit(1)
        if kept is not None:
            print(f"rigpanel: the database that was here is now {kept}")
        made_at = manifest["made_at"][:19].replace("T", " ")
        print(f"rigpanel: {manifest['rows']} rows of {made_at} UTC are back. Start with `make up`.")
