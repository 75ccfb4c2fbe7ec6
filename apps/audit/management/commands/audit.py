"""``manage.py audit verify``: exit 0 when the chain is whole, 1 with a sentence when it is not."""

from __future__ import annotations

import json
from argparse import ArgumentParser
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from apps.audit.services import verify_chain


class Command(BaseCommand):
    help = "Checks the hash-chained record of every change."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("action", choices=["verify"])
        parser.add_argument("--json", action="store_true", help="Print the report as JSON.")

    def handle(self, *args: Any, **options: Any) -> None:
        report = verify_chain()
        if options["json"]:
            found = {
                "entries": report.entries,
                "whole": report.whole,
                "broken_at": report.broken_at,
                "problem": report.problem,
            }
            self.stdout.write(json.dumps(found))
        if not report.whole:
            raise CommandError(
                f"{report.problem} The {report.entries} entries before it are whole. "
                "Somebody changed the database by hand; compare it with a backup."
            )
        if not options["json"]:
            self.stdout.write(f"The chain is whole: {report.entries} entries.")
