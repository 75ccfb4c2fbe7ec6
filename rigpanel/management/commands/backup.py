"""``manage.py backup FILE``: everything but weights, engines and logs in one file."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand
from django.db import DatabaseError

from rigpanel.backup import backup


class Command(BaseCommand):
    help = "Write accounts, history, catalogue, profiles, telemetry and secrets into FILE. The panel may run."
    requires_system_checks: list[str] = []

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("file", type=Path)

    def handle(self, *args: Any, file: Path, **options: Any) -> None:
        try:
            rows = backup(file)
        except (OSError, DatabaseError) as error:
            print(f"rigpanel: no backup was written: {str(error).splitlines()[0]}", file=sys.stderr)
            sys.exit(1)
        print(f"rigpanel: {rows} rows and the secrets are in {file}. Keep it as safe as the panel itself.")
