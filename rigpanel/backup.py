"""One file that holds a panel: every row as a line of JSON, the two secrets, and what made it.

Portable: a backup of SQLite can be restored into PostgreSQL and the other way. Weights, engines and logs
are not in it. A restore only inserts, so the triggers that keep history from being changed stay in force. What was
there before goes only when all of the new is there: by one transaction, on SQLite by a file that takes another's name.
"""

from __future__ import annotations

import datetime
import io
import json
import os
import tarfile
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from django.apps import apps
from django.conf import settings
from django.core import serializers
from django.core.management import call_command
from django.core.management.color import no_style
from django.core.serializers.base import DeserializationError
from django.db import connection, models, transaction
from django.db.migrations.loader import MigrationLoader

from apps.accounts.models import User
from apps.common.errors import ApplicationError
from apps.common.models import Epoch
from rigpanel.preflight import known_migrations

FORMAT = 1
# Made anew by migrations, or worth nothing later.
LEFT_OUT = {"contenttypes.contenttype", "auth.permission", "sessions.session"}
CHUNK_ROWS = 500
SECRETS = ("secret_key", "api_key_pepper")


class NotRestored(ApplicationError):
    """The file cannot be used here, or something would be overwritten."""


def _models() -> list[type[models.Model]]:
    found = [m for m in apps.get_models() if m._meta.managed and m._meta.label_lower not in LEFT_OUT]
    return serializers.sort_dependencies([(None, found)], allow_cycles=True)


def _applied() -> list[str]:
    loader = MigrationLoader(connection)
    return sorted(f"{app}.{name}" for app, name in loader.applied_migrations if app in loader.migrated_apps)


def _known() -> list[str]:
    """What ``_applied`` is after ``migrate``, without asking the database."""
    return sorted(f"{app}.{name}" for app, name in known_migrations(MigrationLoader(None)))


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
            "schema": _applied(),
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


@contextmanager
def _reading(source: Path) -> Iterator[tarfile.TarFile]:
    """The archive; whatever shows that it is none, or damaged, is NotRestored."""
    try:
        with tarfile.open(source, "r:gz") as archive:
            yield archive
    except (OSError, tarfile.TarError, zlib.error, EOFError, ValueError) as error:
        raise NotRestored(f"{source} is not a backup of rigpanel, or it is damaged: {error}") from None


def _member(archive: tarfile.TarFile, name: str) -> IO[bytes]:
    # Read by name, never unpacked: a path in it cannot lead anywhere. Not by getmember(), which reads all of the file.
    member = next((member for member in archive if member.name == name), None)
    content = archive.extractfile(member) if member is not None else None
    if content is None:
        raise NotRestored(f"The backup has no {name}; it is damaged.")
    return content


def _read_object(source: Path, name: str) -> dict[str, Any]:
    with _reading(source) as archive:
        found = json.loads(_member(archive, name).read())
        if not isinstance(found, dict):
            raise ValueError(f"{name} is not an object")
        return found


def _read_secrets(source: Path) -> dict[str, str]:
    found = _read_object(source, "secrets.json")
    for name in SECRETS:
        if not (isinstance(found.get(name), str) and found[name]):
            raise NotRestored(f"The backup has no {name}; it is damaged.")
    return {name: found[name] for name in SECRETS}


def _read_rows(source: Path, expected: int) -> Iterator[dict[str, Any]]:
    """Every row as it was serialized. Raises NotRestored after the last one if there are not ``expected``."""
    rows = 0
    with _reading(source) as archive:
        for line in io.TextIOWrapper(_member(archive, "data.jsonl"), encoding="utf-8"):
            entry = json.loads(line)
            if not (isinstance(entry, dict) and {"model", "pk", "fields"} <= entry.keys()):
                raise ValueError(f"line {rows + 1} of data.jsonl is not a row")
            yield entry
            rows += 1
        while archive.fileobj.read(65536):
            pass  # to its very end, where gzip's check sum is
    if rows != expected:
        raise NotRestored(f"The backup is cut short: {rows} of {expected} rows.")


def examine(source: Path) -> dict[str, Any]:
    """All that can be told from the file alone, before anything is touched. Returns its manifest.

    Raises NotRestored where it is damaged, cut short or of another schema than this version's.
    """
    manifest = _read_object(source, "manifest.json")
    if manifest.get("service") != "rigpanel" or manifest.get("format") != FORMAT:
        raise NotRestored(f"{source} was not made by a rigpanel that this one understands.")
    if manifest["schema"] != _known():
        raise NotRestored(
            f"The backup was made by rigpanel {manifest['version']} with another schema. "
            "Restore it with that version, then bring it up to date with this one."
        )
    _read_secrets(source)
    for _ in _read_rows(source, manifest["rows"]):
        pass
    return manifest


def has_accounts() -> bool:
    return User.objects.exists()


def is_empty() -> bool:
    """Whether nothing at all is here; a start that was prepared brings the shipped models and profiles."""
    return not any(model._base_manager.exists() for model in _models() if model is not Epoch)


def restore(source: Path, manifest: dict[str, Any]) -> Path | None:
    """Replace what is in the migrated database by the rows of an examined file, and put its secrets in place.

    Returns where the old database is, if it was kept. On any error what was there stays, and its secrets.
    """
    secrets = _read_secrets(source)
    with _room() as kept, transaction.atomic():
        Epoch.objects.all().delete()  # counters that migrations and others make anew
        for row in _read_rows(source, manifest["rows"]):
            try:
                for entry in serializers.deserialize("python", [row]):
                    entry.save()
            except DeserializationError as error:
                raise NotRestored(f"A row of {row['model']} does not fit: {error}") from None
        statements = connection.ops.sequence_reset_sql(no_style(), _models())
        with connection.cursor() as cursor:
            for statement in statements:
                cursor.execute(statement)
    _write_secrets(secrets)
    return kept


def _write_secrets(secrets: dict[str, str]) -> None:
    for name, value in secrets.items():
        path = Path(settings.DATA_DIR) / "secrets" / name
        draft = path.with_name(f".{name}.restored")
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(value)
        draft.replace(path)


@contextmanager
def _room() -> Iterator[Path | None]:
    """An empty, migrated database to insert into; the old one is replaced when the block ends well.

    Yields where the old one is kept then: on SQLite a file beside the new one, on PostgreSQL nowhere.
    """
    if is_empty():
        yield None
    elif connection.vendor == "sqlite":
        with _another_file() as kept:
            yield kept
    else:
        with transaction.atomic():
            # The triggers forbid deleting row by row, and rightly; emptying whole tables is another operation.
            quoted = ", ".join(connection.ops.quote_name(m._meta.db_table) for m in _models())
            with connection.cursor() as cursor:
                cursor.execute(f"TRUNCATE {quoted} RESTART IDENTITY CASCADE")
            yield None


@contextmanager
def _another_file() -> Iterator[Path]:
    """SQLite: a draft that takes the old file's name at the end, so that a kill too leaves one of the two whole."""
    path = Path(connection.settings_dict["NAME"])
    draft = path.with_name(f"{path.name}.restoring")
    kept = path.with_name(f"{path.name}.before-restore-{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%S}")
    _close_whole()
    _remove(draft)  # of a restore that was killed
    try:
        connection.settings_dict["NAME"] = draft
        call_command("migrate", interactive=False, verbosity=0)
        yield kept
        _close_whole()
        os.link(path, kept)
        draft.replace(path)
    finally:
        connection.close()
        connection.settings_dict["NAME"] = path
        _remove(draft)


def _close_whole() -> None:
    """Close the database with nothing left in its write-ahead log."""
    with connection.cursor() as cursor:
        cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    for suffix in ("-wal", "-shm"):
        Path(f"{connection.settings_dict['NAME']}{suffix}").unlink(missing_ok=True)


def _remove(database: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        Path(f"{database}{suffix}").unlink(missing_ok=True)
