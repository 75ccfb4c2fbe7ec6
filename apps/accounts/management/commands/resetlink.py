"""``manage.py resetlink EMAIL``: prints a link to set a new password; no mail server is needed."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from apps.accounts.links import absolute
from apps.accounts.selectors import user_get
from apps.accounts.services import reset_path, second_factor_remove
from apps.common.actors import COMMAND_LINE
from apps.common.errors import ApplicationError


class Command(BaseCommand):
    help = "Prints a single-use link with which somebody sets a new password."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("email")
        parser.add_argument(
            "--remove-second-factor", action="store_true", help="Also remove a second factor that was lost."
        )

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            user = user_get(options["email"])
            if options["remove_second_factor"]:
                second_factor_remove(user, actor=COMMAND_LINE)
            link = absolute(reset_path(user, actor=COMMAND_LINE))
        except ApplicationError as error:
            raise CommandError(error.message) from None
        self.stdout.write(link)
