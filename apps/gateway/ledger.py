"""From spool files into the database: each line once, whoever reads and whenever they are killed.

A chunk's rows, its days and the new offset are one transaction, and the offset's conditional UPDATE decides between two
readers. So a chunk is either counted and passed, or neither. The control worker reads on the clock's tick; a gateway
reads its own folder when nobody else does (in a container of its own, on another machine).
"""

from __future__ import annotations

import fcntl
import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import IO, Any

import structlog
from django.conf import settings
from django.db import transaction
from django.db.models import F
from django.utils import timezone

from apps.gateway.models import INTERRUPTED, OK, RUNNING, UsageDay, UsageRecord, UsageRefusal, UsageSpool
from apps.gateway.spool import DRAFT_SUFFIX, SUFFIX

log = structlog.get_logger(__name__)
CHUNK_BYTES = 256 * 1024  # about a thousand requests
PASS_SECONDS = 1.5  # a pass of the tick leaves the rest to the next one
DRAFT_OLD_SECONDS = 60.0
KEEP_RECORDS = timedelta(days=90)
PRUNE_ROWS = 2000
RefusalKey = tuple[datetime, int | None, int | None, str, str]  # minute, person, key, model, the error's code
SUMS = (
    "requests", "background", "failed", "interrupted", "unknown", "tokens_in", "tokens_out", "tokens_cached", "seconds",
)  # fmt: skip


def import_folder(folder: Path, *, limit_s: float = PASS_SECONDS) -> int:
    """Read what is new in a folder's spool files. Returns how many lines."""
    deadline = time.monotonic() + limit_s
    lines = 0
    for path in sorted(folder.glob(f"*{SUFFIX}"), key=lambda p: p.name):
        try:
            lines += import_file(path, deadline=deadline)
        except FileNotFoundError:
            continue  # another reader has finished it
        if time.monotonic() > deadline:
            break
    for draft in folder.glob(f"*{DRAFT_SUFFIX}"):  # of a process that was killed while it made the file
        try:
            if time.time() - draft.stat().st_mtime > DRAFT_OLD_SECONDS:
                draft.unlink()
        except FileNotFoundError:
            continue
    return lines


def import_file(path: Path, *, deadline: float = float("inf")) -> int:
    """Read one file on; when its process is gone and nothing is left, finish it and remove it."""
    name = path.name.removesuffix(SUFFIX)
    with path.open("rb") as file:
        ended = _writer_is_gone(file)  # before reading: then nothing can follow what is read
        spool, _ = UsageSpool.objects.get_or_create(name=name)
        lines = 0
        while True:
            file.seek(spool.offset)
            data = file.read(CHUNK_BYTES)
            data = data[: data.rfind(b"\n") + 1]  # a line that is being written, or torn by a kill, is not one yet
            if not data:
                break
            taken = _take(spool, data)
            if taken is None:
                return lines  # another reader is at it
            lines += taken
            if time.monotonic() > deadline:
                return lines
        if ended:
            _finish(spool)
            path.unlink(missing_ok=True)
        return lines


def _writer_is_gone(file: IO[bytes]) -> bool:
    """The writer's lock on its file ends with it. A file system without such locks counts as alive."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _take(spool: UsageSpool, data: bytes) -> int | None:
    """One chunk of whole lines in one transaction. Returns how many lines; None: another reader was faster."""
    lines, broken = _parsed(data)
    now = timezone.now()
    with transaction.atomic():
        claimed = UsageSpool.objects.filter(pk=spool.pk, offset=spool.offset).update(
            offset=F("offset") + len(data),
            lines=F("lines") + len(lines),
            broken_lines=F("broken_lines") + broken,
            read_at=now,
        )
        if claimed != 1:
            return None
        _apply(spool, lines)
    spool.offset += len(data)
    if broken:
        log.warning("broken lines in the usage ledger were passed over", spool=spool.name, count=broken)
    return len(lines)


def _parsed(data: bytes) -> tuple[list[dict[str, Any]], int]:
    lines, broken = [], 0
    for raw in data.splitlines():
        if not raw:
            continue
        try:
            line = json.loads(raw)
            known = isinstance(line, dict) and isinstance(line.get("o", line.get("c", line.get("r"))), int)
        except ValueError:
            known = False
        if known:
            lines.append(line)
        else:  # torn by a full disk
            broken += 1
    return lines, broken


def _apply(spool: UsageSpool, lines: Iterable[Mapping[str, Any]]) -> None:
    begun: dict[int, UsageRecord] = {}
    ended: dict[int, Mapping[str, Any]] = {}
    refused: Counter[RefusalKey] = Counter()
    for line in lines:
        if "o" in line:
            begun[line["o"]] = _record(spool, line)
        elif "r" in line:
            minute = datetime.fromtimestamp(line["at"], UTC)
            refused[minute, line["user"], line["key"], line["model"], line["code"][:40]] += line["r"]
        else:
            ended[line["c"]] = line
    earlier = {number: line for number, line in ended.items() if number not in begun}
    finished: list[UsageRecord] = []
    for number in begun.keys() & ended.keys():
        finished.append(_end(begun[number], ended[number]))
    UsageRecord.objects.bulk_create(begun.values(), batch_size=200)
    if earlier:
        rows = UsageRecord.objects.filter(spool=spool, outcome=RUNNING, number__in=earlier)
        found = [_end(row, earlier[row.number]) for row in rows]
        UsageRecord.objects.bulk_update(found, ENDING, batch_size=50)
        finished += found
    add_to_days(finished)
    _add_refusals(refused)


def _add_refusals(refused: Mapping[RefusalKey, int]) -> None:
    days: Counter[DayKey] = Counter()
    for refusal in sorted(refused, key=str):
        count = refused[refusal]
        minute, user_id, key_id, model, code = refusal
        _grow(
            UsageRefusal,
            {"minute": minute, "user_id": user_id, "key_id": key_id, "model": model, "code": code},
            {"count": F("count") + count},
        )
        days[local_day(minute), user_id, key_id, model, 0] += count
    for day in sorted(days, key=str):
        day_add(day, {"refused": days[day]})


ENDING = (
    "model", "deployment_id", "version_id", "tokens_in", "tokens_out", "tokens_cached", "first_token_ms", "waited_ms",
    "duration_ms", "status", "outcome",
)  # fmt: skip


def _record(spool: UsageSpool, line: Mapping[str, Any]) -> UsageRecord:
    return UsageRecord(
        spool=spool,
        number=line["o"],
        at=datetime.fromtimestamp(line["at"], UTC),
        user_id=line["user"],
        key_id=line["key"],
        model=line["model"],
        path=line["path"][:64],
        task=line.get("task", "")[:40],
    )


def _end(record: UsageRecord, line: Mapping[str, Any]) -> UsageRecord:
    record.model = line["model"]
    record.deployment_id, record.version_id = line["dep"], line["ver"]
    record.tokens_in, record.tokens_out, record.tokens_cached = line["in"], line["out"], line["cached"]
    record.first_token_ms, record.waited_ms, record.duration_ms = line["ttft"], line["wait"], line["ms"]
    record.status, record.outcome = line["status"], line["outcome"][:32]
    return record


def _finish(spool: UsageSpool) -> None:
    """The process is gone: what it had begun and not ended was interrupted. Its tokens are unknown, not zero."""
    with transaction.atomic():
        if not UsageSpool.objects.filter(pk=spool.pk, finished_at=None).update(finished_at=timezone.now()):
            return
        rows = list(UsageRecord.objects.filter(spool=spool, outcome=RUNNING))
        for row in rows:
            row.outcome = INTERRUPTED
        UsageRecord.objects.filter(spool=spool, outcome=RUNNING).update(outcome=INTERRUPTED)
        add_to_days(rows)


# -- days ----------------------------------------------------------------------------------------


def local_day(at: datetime) -> date:
    """The day in the panel's time zone, where quotas and pages count."""
    return at.astimezone(settings.PANEL_TIME_ZONE).date()


@dataclass(slots=True)
class _Sums:
    requests: int = 0
    background: int = 0
    failed: int = 0
    interrupted: int = 0
    unknown: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    tokens_cached: int = 0
    seconds: float = 0.0

    def add(self, record: UsageRecord) -> None:
        self.requests += 1
        self.background += bool(record.task)
        self.interrupted += record.outcome == INTERRUPTED
        self.failed += record.outcome not in (OK, INTERRUPTED)
        self.unknown += record.tokens_in is None and record.tokens_out is None
        self.tokens_in += record.tokens_in or 0
        self.tokens_out += record.tokens_out or 0
        self.tokens_cached += record.tokens_cached or 0
        self.seconds += (record.duration_ms or 0) / 1000


DayKey = tuple[date, int | None, int | None, str, int]


def day_key(record: UsageRecord) -> DayKey:
    return local_day(record.at), record.user_id, record.key_id, record.model, record.deployment_id or 0


def add_to_days(records: Iterable[UsageRecord]) -> None:
    """Add finished records to their days; call it in the transaction that finishes them."""
    groups: dict[DayKey, _Sums] = {}
    for record in records:
        groups.setdefault(day_key(record), _Sums()).add(record)
    for key in sorted(groups, key=str):  # one order for everybody, against deadlocks
        sums = groups[key]
        day_add(key, {name: getattr(sums, name) for name in SUMS})


def day_add(key: DayKey, amounts: Mapping[str, float]) -> None:
    day, user_id, key_id, model, deployment_id = key
    identity: dict[str, Any] = {
        "day": day,
        "user_id": user_id,
        "key_id": key_id,
        "model": model,
        "deployment_id": deployment_id,
    }
    changes = {name: F(name) + amount for name, amount in amounts.items() if amount}
    _grow(UsageDay, identity, changes)


def _grow(model: type[UsageDay] | type[UsageRefusal], identity: Mapping[str, Any], changes: Mapping[str, Any]) -> None:
    """Add to the row of that identity, which may not be there yet."""
    if not model.objects.filter(**identity).update(**changes):
        model.objects.get_or_create(**identity)
        model.objects.filter(**identity).update(**changes)


# -- the clock -----------------------------------------------------------------------------------


def on_tick(sender: object, **_: Any) -> None:
    import_folder(settings.USAGE_DIR)


def on_hourly(sender: object, **_: Any) -> None:
    prune()


def prune(now: datetime | None = None) -> int:
    """Remove single records that are older than they are kept; their days stay. Returns how many."""
    old = (now or timezone.now()) - KEEP_RECORDS
    removed = 0
    while True:
        ids = list(
            UsageRecord.objects.filter(at__lt=old)
            .exclude(outcome=RUNNING)
            .order_by("at")
            .values_list("pk", flat=True)[:PRUNE_ROWS]
        )
        if not ids:
            break
        removed += UsageRecord.objects.filter(pk__in=ids).delete()[0]
    UsageRefusal.objects.filter(minute__lt=old).delete()
    empty = UsageSpool.objects.filter(finished_at__lt=old, records=None)
    empty.delete()
    return removed
