"""One file that holds a panel: every row as a line of JSON, the two secrets, and what made it.

Portable: a backup of SQLite can be restored into PostgreSQL and the other way. Weights, engines and logs
are not in it. A restore only inserts, so the triggers that keep history from being changed stay in force.
"""

from __future__ import annotations

import datetime
import io
import json
import os
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from django.apps import apps
from django.conf import settings
from django.core import serializers
from django.core.management.color import no_style
from django.db import connection, models, transaction
from django.db.migrations.loader import MigrationLoader

from apps.accounts.models import User
from apps.common.errors import ApplicationError
from apps.common.models import Epoch

FORMAT = 1
# Made anew by migrations, or worth nothing later.
LEFT_OUT = {"contenttypes.contenttype", "auth.permission", "sessions.session"}
CHUNK_ROWS = 500


class NotRestored(ApplicationError):
    """The file cannot be used here, or something would be overwritten."""


def _models() -> list[type[models.Model]]:
    found = [m for m in apps.get_models() if m._meta.managed and m._meta.label_lower not in LEFT_OUT]
    return serializers.sort_dependencies([(None, found)], allow_cycles=True)


def _schema() -> list[str]:
    loader = MigrationLoader(connection)
    return sorted(f"{app}.{name}" for app, name in loader.applied_migrations if app in loader.migrated_apps)


def _plain(value: Any) -> str:
    # Django's own encoder cuts times to milliseconds; the audit chain's hashes are over microseconds.
    if isinstance(value, (datetime.datetime, datetime.date, datetime.time)):
        return value.isoformat()
    return str(value)


def _lines() -> Iterator[str]:
    for model in _models():
        rows = model._base_manager.order_by("pk").iterator(chunk_size=CHUNK_ROWS)
        for row in rows:
            (entry,) = serializers.serialize("python", [row], use_natural_foreign_keys=True)
            yield json.dumps(entry, default=_plain, ensure_ascii=False) + "\n"


def backup(target: Path) -> int:
    """Write the file (0600: it holds secrets), also while the panel runs. Returns the number of rows."""
    rows = 0
    with tempfile.TemporaryFile() as data:
        with _snapshot():
            for line in _lines():
                data.write(line.encode())
                rows += 1
        manifest = {
            "service": "rigpanel",
            "format": FORMAT,
            "version": settings.VERSION,
            "made_at": datetime.datetime.now(datetime.UTC).isoformat(),
            "database": connection.vendor,
            "schema": _schema(),
            "rows": rows,
        }
        secrets = {"secret_key": settings.SECRET_KEY, "api_key_pepper": settings.API_KEY_PEPPER}
        draft = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "wb") as file, tarfile.open(fileobj=file, mode="w:gz") as archive:
                _add(archive, "manifest.json", io.BytesIO(json.dumps(manifest, indent=1).encode()))
                _add(archive, "secrets.json", io.BytesIO(json.dumps(secrets).encode()))
                _add(archive, "data.jsonl", data)
            draft.replace(target)
        finally:
            draft.unlink(missing_ok=True)
    return rows


def _add(archive: tarfile.TarFile, name: str, content: IO[bytes]) -> None:
    info = tarfile.TarInfo(name)
    info.size = content.seek(0, os.SEEK_END)
    info.mode, info.mtime = 0o600, int(time.time())
    content.seek(0)
    archive.addfile(info, content)


@contextmanager
def _snapshot() -> Iterator[None]:
    """One state of the database for all tables, without keeping others from writing meanwhile."""
    database: Any = connection
    mode = getattr(database, "transaction_mode", None)
    if connection.vendor == "sqlite":
        database.transaction_mode = "DEFERRED"  # the panel's own IMMEDIATE would hold the lock for all of it
    try:
        with transaction.atomic():
            if connection.vendor == "postgresql":
                with connection.cursor() as cursor:
                    cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
            yield
    finally:
        if connection.vendor == "sqlite":
            database.transaction_mode = mode


def read_manifest(source: Path) -> dict[str, Any]:
    try:
        with tarfile.open(source, "r:gz") as archive:
            manifest = json.loads(_member(archive, "manifest.json").read())
    except (OSError, tarfile.TarError, ValueError, EOFError) as error:
        raise NotRestored(f"{source} is not a backup of rigpanel, or it is damaged: {error}") from None
    if manifest.get("service") != "rigpanel" or manifest.get("format") != FORMAT:
        raise NotRestored(f"{source} was not made by a rigpanel that this one understands.")
    return dict(manifest)


def _member(archive: tarfile.TarFile, name: str) -> IO[bytes]:
    try:
        member = archive.extractfile(name)  # read by name, never unpacked: a path in it cannot lead anywhere
    except KeyError:
        member = None
    if member is None:
        raise NotRestored(f"The backup has no {name}; it is damaged.")
    return member


def has_accounts() -> bool:
    return User.objects.exists()


def is_empty() -> bool:
    """Whether nothing at all is here; a start that was prepared brings the shipped models and profiles."""
    return not any(model._base_manager.exists() for model in _models() if model is not Epoch)


def restore(source: Path) -> int:
    """Insert every row into a migrated, empty database and put the secrets in place. Returns the rows."""
    manifest = read_manifest(source)
    if manifest["schema"] != _schema():
        raise NotRestored(
            f"The backup was made by rigpanel {manifest['version']} with another schema. "
            "Restore it with that version, then bring it up to date with this one."
        )
    rows = 0
    with tarfile.open(source, "r:gz") as archive:
        secrets = json.loads(_member(archive, "secrets.json").read())
        with transaction.atomic():
            Epoch.objects.all().delete()  # counters that migrations and others make anew
            for line in io.TextIOWrapper(_member(archive, "data.jsonl"), encoding="utf-8"):
                for entry in serializers.deserialize("python", [json.loads(line)]):
                    entry.save()
                    rows += 1
            if rows != manifest["rows"]:
                raise NotRestored(f"The backup is cut short: {rows} of {manifest['rows']} rows. Nothing was changed.")
            statements = connection.ops.sequence_reset_sql(no_style(), _models())
            with connection.cursor() as cursor:
                for statement in statements:
                    cursor.execute(statement)
    _write_secrets(secrets)
    return rows


def _write_secrets(secrets: dict[str, str]) -> None:
    for name in ("secret_key", "api_key_pepper"):
        path = Path(settings.DATA_DIR) / "secrets" / name
        draft = path.with_name(f".{name}.restored")
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets[name])
        draft.replace(path)


def set_aside() -> str:
    """Make room for a restore over a panel in use; returns where the old database is, if it was kept."""
    if connection.vendor == "sqlite":
        path = Path(connection.settings_dict["NAME"])
        with connection.cursor() as cursor:
            cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.close()
        kept = path.with_name(f"{path.name}.before-restore-{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%S}")
        path.rename(kept)
        for suffix in ("-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
        return str(kept)
    # The triggers forbid deleting row by row, and rightly; emptying whole tables is another operation.
    quoted = ", ".join(connection.ops.quote_name(m._meta.db_table) for m in _models())
    with connection.cursor() as cursor:
        cursor.execute(f"TRUNCATE {quoted} RESTART IDENTITY CASCADE")
    return ""
