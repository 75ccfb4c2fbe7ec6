"""``manage.py createkey EMAIL --name NAME``: prints a new API key once, alone on stdout."""

from __future__ import annotations

from argparse import ArgumentParser
from datetime import timedelta
from typing import Any

from django.core.management.base import BaseCommand, CommandError
from django.utils import timezone

from apps.accounts.selectors import user_get
from apps.accounts.services import key_create
from apps.accounts.tokens import people_secret
from apps.common.actors import COMMAND_LINE
from apps.common.errors import ApplicationError


class Command(BaseCommand):
    help = "Makes an API key for somebody and prints it once."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("email")
        parser.add_argument("--name", required=True, help="Where the key will be used.")
        parser.add_argument("--model", action="append", default=[], help="Limit it to this model or alias; repeatable.")
        parser.add_argument(
            "--network", action="append", default=[], help="Limit where it may be used from; repeatable."
        )
        parser.add_argument("--days", type=float, help="End it after so many days.")
        parser.add_argument(
            "--open-webui",
            action="store_true",
            help="A key of Open WebUI's: its signed header says who asks. Prints the secret for it on a second line.",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            days = options["days"]
            key, token = key_create(
                user_get(options["email"]),
                name=options["name"],
                actor=COMMAND_LINE,
                expires_at=None if days is None else timezone.now() + timedelta(days=days),
                allowed_models=options["model"],
                allowed_networks=options["network"],
                names_people=options["open_webui"],
            )
        except ApplicationError as error:
            raise CommandError(error.message) from None
        self.stdout.write(token)
        if key.names_people:
            self.stdout.write(people_secret(key.digest))
