"""What ``up`` prepares before the processes start: schema, static files, shipped content, the first owner."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from pathlib import Path

from django.conf import settings
from django.contrib.staticfiles.finders import get_finders
from django.core.management import call_command
from django.db import connection
from django.db.migrations.executor import MigrationExecutor

from apps.accounts.models import User
from apps.accounts.services import setup_link_path, user_create
from apps.catalog.services import load_shipped as load_models
from apps.common.actors import PANEL
from apps.common.errors import ApplicationError
from apps.common.roles import Role
from apps.profiles.services import load_shipped as load_profiles
from rigpanel.preflight import NotStarted

Say = Callable[[str], None]
# Parts of django-htmx that no page uses: other versions, and sources whose comments look like imports
# to the step that renames modules.
UNUSED_STATIC = ["*-4.js", "*-4.min.js", "hx-*-2.js"]


def migrate(say: Say) -> None:
    if connection.vendor == "sqlite":
        with connection.cursor() as cursor:  # a killed panel may have left a long write-ahead log
            cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    executor = MigrationExecutor(connection)
    plan = executor.migration_plan(executor.loader.graph.leaf_nodes())
    if not plan:
        return
    first = not executor.loader.applied_migrations
    call_command("migrate", interactive=False, verbosity=0)
    say(
        "database made"
        if first
        else f"database brought up to date ({len(plan)} migration{'s' if len(plan) > 1 else ''})"
    )


def collect_static(say: Say) -> None:
    """Compress and name the static files, when any of them changed since the last time."""
    stamp = Path(settings.STATIC_ROOT) / ".stamp"
    now = _static_digest()
    if stamp.is_file() and stamp.read_text() == now:
        return
    try:
        call_command(
            "collectstatic",
            interactive=False,
            verbosity=0,
            clear=True,
            ignore_patterns=UNUSED_STATIC,
            stdout=io.StringIO(),
        )
    except (OSError, ValueError) as error:
        raise NotStarted(f"The static files could not be collected: {error}") from None
    stamp.write_text(now)
    say("static files collected")


def _static_digest() -> str:
    digest = hashlib.sha256()
    for finder in get_finders():
        for name, storage in finder.list([]):
            stat = Path(storage.path(name)).stat()
            digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def load_shipped(say: Say) -> None:
    """The shipped models and profiles; what people changed stays as it is."""
    load_models()
    load_profiles()


def first_owner(say: Say) -> str | None:
    """The owner named by the environment, or the path of a one-time link for the first one."""
    if User.objects.filter(role=Role.OWNER, is_active=True).exists():
        return None
    if settings.ADMIN_EMAIL and settings.ADMIN_PASSWORD:
        try:
            user_create(email=settings.ADMIN_EMAIL, password=settings.ADMIN_PASSWORD, role=Role.OWNER, actor=PANEL)
        except ApplicationError as error:
            raise NotStarted(f"RIGPANEL_ADMIN_EMAIL cannot become the first owner: {error.message}") from None
        say(f"first owner: {settings.ADMIN_EMAIL}")
        return None
    if settings.ADMIN_EMAIL or settings.ADMIN_PASSWORD:
        missing = "RIGPANEL_ADMIN_PASSWORD" if settings.ADMIN_EMAIL else "RIGPANEL_ADMIN_EMAIL"
        raise NotStarted(
            f"RIGPANEL_ADMIN_EMAIL and RIGPANEL_ADMIN_PASSWORD go together; set {missing} too, or neither."
        )
    return setup_link_path()
