"""The ledger: every request once, whoever is killed; nothing of a prompt; unknown is not zero."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from django.utils import timezone

from apps.accounts.services import key_create
from apps.common.actors import actor_of
from apps.gateway import ledger, spool
from apps.gateway.ledger import import_folder, prune
from apps.gateway.models import UsageDay, UsageRecord, UsageRefusal, UsageSpool
from apps.gateway.observer import Exchange
from apps.gateway.services import quota_set
from apps.gateway.spool import Spool
from tests.gateway.conftest import GatewayProcess, House
from tests.gateway.helpers import chat, until


def exchange(user: int = 1, key: int = 2, at: float = 1_800_000_000.0, **more: Any) -> Exchange:
    known = {"model": "coder", "asked_model": "coder", "path": "/v1/chat/completions", "stream": True, "body_bytes": 9}
    return Exchange("req-1", key_id=key, key_owner_id=user, user_id=user, began_at=at, **{**known, **more})


def use(written: Spool, **more: Any) -> None:
    """A whole request."""
    asked = exchange(**{k: v for k, v in more.items() if k in ("user", "key", "at", "task")})
    mark = written.opened(asked, "coder")
    asked.tokens_in, asked.tokens_out, asked.tokens_cached = more.get("tokens", (10, 20, 4))
    asked.deployment_id, asked.duration_s, asked.status, asked.outcome = 7, 1.5, 200, more.get("outcome", "ok")
    assert mark is not None
    written.closed(mark, asked, "coder")


@pytest.fixture
def written(tmp_path: Path) -> Iterator[Spool]:
    made = Spool(tmp_path)
    yield made
    made.close()


def test_each_line_counts_once_however_often_a_file_is_read(db: None, written: Spool) -> None:
    for _ in range(3):
        use(written)
    assert import_folder(written.folder) == 6
    assert import_folder(written.folder) == 0
    use(written, task="title_generation")
    assert import_folder(written.folder) == 2
    assert UsageRecord.objects.count() == 4
    (day,) = UsageDay.objects.all()
    assert (day.requests, day.background, day.tokens_in, day.tokens_out, day.tokens_cached) == (4, 1, 40, 80, 16)
    assert day.seconds == 6.0
    assert (day.deployment_id, day.model, day.failed, day.unknown) == (7, "coder", 0, 0)


def test_a_request_that_runs_is_finished_by_a_later_reading(db: None, written: Spool) -> None:
    asked = exchange()
    mark = written.opened(asked, "coder")
    assert mark is not None
    import_folder(written.folder)
    assert UsageRecord.objects.get().outcome == "running"
    assert not UsageDay.objects.exists()
    asked.outcome, asked.tokens_out, asked.duration_s, asked.first_token_s = "ok", 5, 2.0, 0.25
    written.closed(mark, asked, "coder")
    import_folder(written.folder)
    record = UsageRecord.objects.get()
    assert (record.outcome, record.tokens_in, record.tokens_out, record.first_token_ms) == ("ok", None, 5, 250)
    assert UsageDay.objects.get().requests == 1


def test_a_line_that_is_being_written_waits_for_its_end(db: None, written: Spool) -> None:
    use(written)
    (path,) = written.folder.glob("*.spool")
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    assert import_folder(written.folder) == 1
    path.write_bytes(whole)
    assert import_folder(written.folder) == 1
    assert UsageRecord.objects.get().outcome == "ok"


def test_a_reader_killed_before_its_commit_has_counted_nothing(
    transactional_db: None, written: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(written)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ledger, "add_to_days", killed)
        with pytest.raises(KeyboardInterrupt):
            import_folder(written.folder)
    assert not UsageRecord.objects.exists()
    import_folder(written.folder)
    assert UsageDay.objects.get().requests == UsageRecord.objects.count() == 1


def test_of_two_readers_one_counts(db: None, written: Spool) -> None:
    use(written)
    (path,) = written.folder.glob("*.spool")
    stale = UsageSpool.objects.create(name=path.stem)
    import_folder(written.folder)
    assert ledger._take(stale, path.read_bytes()) is None
    assert UsageDay.objects.get().requests == 1


def test_a_dead_process_leaves_interrupted_requests_with_unknown_tokens(db: None, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from apps.gateway.spool import Spool;"
        "from tests.gateway.test_ledger import exchange, use;"
        "s = Spool(Path(sys.argv[1])); use(s); s.opened(exchange(), 'coder'); print('ready', flush=True);"
        "import time; time.sleep(600)"
    )
    environment = {**os.environ, "DJANGO_SETTINGS_MODULE": "tests.settings"}
    code = "import django; django.setup();" + code
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=root, env=environment, stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline().strip() == b"ready"
        import_folder(tmp_path)
        assert set(UsageRecord.objects.values_list("outcome", flat=True)) == {"ok", "running"}
        writer.send_signal(signal.SIGKILL)
    (path,) = tmp_path.glob("*.spool")
    with path.open("ab") as file:
        file.write(b'{"o":99,"at":1')  # the kill tore a line
    import_folder(tmp_path)
    lost = UsageRecord.objects.get(outcome="interrupted")
    assert lost.tokens_in is None
    assert lost.tokens_out is None
    day = UsageDay.objects.get(interrupted=1)
    assert (day.requests, day.unknown, day.tokens_out) == (1, 1, 0)
    assert not list(tmp_path.iterdir()), "a file that was read to its end is removed"
    assert UsageSpool.objects.get().finished_at is not None


def test_a_full_file_is_followed_by_another_and_its_requests_end_in_the_old_one(
    db: None, written: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool, "SEGMENT_BYTES_MAX", 600)
    asked = exchange()
    mark = written.opened(asked, "coder")
    assert mark is not None
    for _ in range(8):
        use(written)
    assert len(list(written.folder.glob("*.spool"))) > 2
    import_folder(written.folder)
    assert UsageRecord.objects.filter(outcome="running").count() == 1, "its file is still held"
    asked.outcome = "ok"
    written.closed(mark, asked, "coder")
    import_folder(written.folder)
    assert UsageRecord.objects.filter(outcome="ok").count() == 9
    assert len(list(written.folder.glob("*.spool"))) == 1


def test_a_full_disk_stops_no_request_and_loses_no_line_when_there_is_room_again(
    db: None, written: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(written)
    write = os.write
    room = [7]

    def full(fd: int, data: bytes) -> int:
        if room:
            return write(fd, data[: room.pop()])  # the last bytes of the disk: a torn line
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        use(written)
        assert "No space left" in written.trouble
        assert written.waiting_lines == 2
    assert written.flush()
    assert written.trouble == ""
    use(written)
    import_folder(written.folder)
    assert UsageDay.objects.get().requests == 3
    assert UsageRecord.objects.filter(outcome="ok").count() == 3


def test_a_folder_that_cannot_be_made_stops_no_request(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    written = Spool(tmp_path / "file" / "usage")
    assert written.opened(exchange(), "coder") is None
    assert written.trouble
    assert written.lost_lines == 1


def test_days_begin_at_midnight_of_the_panel(db: None, written: Spool, settings: Any) -> None:
    settings.PANEL_TIME_ZONE = ZoneInfo("Asia/Tokyo")
    at = datetime(2027, 3, 4, 15, 30, tzinfo=UTC)
    use(written, at=at.timestamp())
    import_folder(written.folder)
    assert UsageDay.objects.get().day.isoformat() == "2027-03-05"


def test_old_records_go_and_their_days_stay(db: None, written: Spool) -> None:
    old = timezone.now() - timedelta(days=100)
    use(written, at=old.timestamp())
    use(written, at=timezone.now().timestamp())
    import_folder(written.folder)
    assert prune() == 1
    assert UsageRecord.objects.count() == 1
    assert UsageDay.objects.count() == 2


# -- with a real gateway ---------------------------------------------------------------------------


@pytest.fixture
def ledger_process(own_process: Callable[..., GatewayProcess]) -> GatewayProcess:
    return own_process()


def folder_of(process: GatewayProcess) -> Path:
    return process.folder / "usage"


def test_a_request_over_the_gateway_is_in_the_ledger_without_a_word_of_it(
    house: House, bobs_key: str, bob: Any, ledger_process: GatewayProcess
) -> None:
    engine = house.engine("coder")
    deployment = house.serve(ledger_process, "coder", engine)
    secret = "the-word-nobody-may-find"
    body = chat("coder", messages=[{"role": "user", "content": secret}])
    assert ledger_process.ask("POST", "/v1/chat/completions", body, key=bobs_key).status == 200
    unknown = chat(f"model-{secret}")
    assert ledger_process.ask("POST", "/v1/chat/completions", unknown, key=bobs_key).status == 404
    (path,) = folder_of(ledger_process).glob("*.spool")
    assert secret.encode() not in path.read_bytes()
    assert ledger_process.metric("rigpanel_gateway_ledger_ok") == 1
    import_folder(folder_of(ledger_process))
    good, bad = UsageRecord.objects.order_by("number")
    assert (good.user_id, good.model, good.outcome, good.status) == (bob.pk, "coder", "ok", 200)
    assert (good.deployment_id, good.version_id) == (deployment.pk, deployment.version_id)
    assert good.duration_ms is not None
    assert (bad.model, bad.outcome) == ("", "model_not_found")


def test_a_flood_of_refusals_is_counted_by_minute_key_and_reason_and_not_a_line_each(
    house: House, bobs_key: str, bob: Any, alice: Any, own_process: Callable[..., GatewayProcess]
) -> None:
    process = own_process()
    house.serve(process, "coder", house.engine("coder"))
    _, narrow = key_create(bob, name="narrow", allowed_models=["other"], actor=actor_of(bob))
    _, elsewhere = key_create(bob, name="elsewhere", allowed_networks=["10.9.9.9"], actor=actor_of(bob))
    quota_set(bob, {"requests_per_minute": 0}, actor=actor_of(alice))
    house.applied(process)

    def asked(key: str, body: Any = None) -> int:
        return process.ask("POST", "/v1/chat/completions", body or chat("coder"), key=key).status

    until(lambda: asked(bobs_key) == 429, "the quota was not applied")
    assert {asked(bobs_key) for _ in range(50)} == {429}
    assert asked(narrow) == 403
    assert asked(elsewhere) == 403
    assert asked(bobs_key, b"{") == 400
    process.signal(signal.SIGTERM)
    until(lambda: process.process is not None and process.process.poll() is not None, "it did not end")
    lines = b"".join(path.read_bytes() for path in folder_of(process).glob("*.spool")).splitlines()
    assert len([line for line in lines if line.startswith(b'{"r":')]) <= 2 * 4 + 2, "a line for each minute and reason"
    import_folder(folder_of(process))
    import_folder(folder_of(process))
    told = {(row.key.name, row.code): row for row in UsageRefusal.objects.select_related("key") if row.key}
    assert sum(r.count for r in UsageRefusal.objects.filter(code="rate_limit_exceeded")) >= 51
    assert told["laptop", "rate_limit_exceeded"].model == "coder"
    assert told["narrow", "model_not_allowed"].user_id == bob.pk
    assert told["elsewhere", "network_not_allowed"].count == 1
    assert told["laptop", "invalid_json"].count == 1
    days = UsageDay.objects.filter(user=bob)
    assert sum(day.refused for day in days) == sum(row.count for row in UsageRefusal.objects.all())
    assert sum(day.tokens_in + day.tokens_out for day in days.filter(refused__gt=0, requests=0)) == 0


def test_refusals_are_read_once_and_go_with_their_records(db: None, written: Spool) -> None:
    for count in (3, 4):
        written.refused(1_800_000_000, 1, 2, "coder", "rate_limit_exceeded", count)
    written.refused(1_800_000_060, 1, 2, "", "insufficient_quota", 1)
    for _ in range(2):
        import_folder(written.folder)
    assert [(row.code, row.count) for row in UsageRefusal.objects.order_by("minute")] == [
        ("rate_limit_exceeded", 7), ("insufficient_quota", 1),
    ]  # fmt: skip
    assert {day.model: (day.refused, day.requests) for day in UsageDay.objects.all()} == {"coder": (7, 0), "": (1, 0)}
    prune(datetime.fromtimestamp(1_800_000_000, UTC) + timedelta(days=91))
    assert not UsageRefusal.objects.exists()
    assert UsageDay.objects.count() == 2


def test_what_was_answered_before_a_kill_is_ok_and_what_was_not_is_interrupted(
    house: House, bobs_key: str, ledger_process: GatewayProcess, loop_thread: Any
) -> None:
    engine = house.engine("coder")
    house.serve(ledger_process, "coder", engine)
    for _ in range(5):
        assert ledger_process.ask("POST", "/v1/chat/completions", chat("coder"), key=bobs_key).status == 200
    with subprocess.Popen(
        [
            sys.executable, "-c",
            "import sys, urllib.request as u; head = {'Authorization': 'Bearer ' + sys.argv[3]};"
            "u.urlopen(u.Request(sys.argv[1], sys.argv[2].encode(), head)).read()",
            f"http://127.0.0.1:{ledger_process.port}/v1/chat/completions",
            json.dumps(chat("coder", stream=True, gate=True)), bobs_key,
        ],
        stderr=subprocess.DEVNULL,
    ) as client:  # fmt: skip
        until(lambda: engine.running, "the stream did not begin")
        ledger_process.signal(signal.SIGKILL)
        client.wait(60)
    assert ledger_process.process is not None
    ledger_process.process.wait(60)
    import_folder(folder_of(ledger_process))
    outcomes = sorted(UsageRecord.objects.values_list("outcome", flat=True))
    assert outcomes == ["interrupted", *["ok"] * 5]
    assert sum(UsageDay.objects.values_list("requests", flat=True)) == 6


LOAD = """
import json, sys, threading, time, urllib.request
url, key, stop = sys.argv[1], sys.argv[2], threading.Event()
whole = {"plain": 0, "stream": 0}
lock = threading.Lock()
def one(kind):
    body = {"model": "coder", "messages": [{"role": "user", "content": "Hello"}]}
    if kind == "stream":
        body |= {"stream": True, "chunks": 3}
    head = {"Authorization": "Bearer " + key, "Content-Type": "application/json"}
    while not stop.is_set():
        try:
            asked = urllib.request.Request(url, json.dumps(body).encode(), head)
            with urllib.request.urlopen(asked, timeout=60) as answer:
                got = answer.read()
            if got.endswith(b"data: [DONE]\\n\\n" if kind == "stream" else b"}"):
                with lock:
                    whole[kind] += 1
        except OSError:
            time.sleep(0.05)
        except Exception:
            pass
threads = [threading.Thread(target=one, args=(kind,)) for kind in ["plain", "stream"] * 3]
[t.start() for t in threads]
sys.stdin.readline()
stop.set()
[t.join() for t in threads]
print(json.dumps(whole))
"""


def test_the_ledger_has_what_a_load_generator_counted_after_the_gateway_was_killed_again_and_again(
    house: House, bobs_key: str, ledger_process: GatewayProcess
) -> None:
    engine = house.engine("coder")
    house.serve(ledger_process, "coder", engine)
    kills, clients = 3, 6
    with subprocess.Popen(
        [sys.executable, "-c", LOAD, f"http://127.0.0.1:{ledger_process.port}/v1/chat/completions", bobs_key],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as load:
        assert load.stdin is not None
        assert load.stdout is not None
        for _ in range(kills):
            seen = len(engine.received)
            until(lambda s=seen: len(engine.received) > s + 60, "the load did not flow")  # type: ignore[misc]
            ledger_process.signal(signal.SIGKILL)
            assert ledger_process.process is not None
            ledger_process.process.wait(60)
            import_folder(folder_of(ledger_process))  # as the control worker would, whenever
            ledger_process.start()
        seen = len(engine.received)
        until(lambda: len(engine.received) > seen + 60, "the load did not flow after the last kill")
        load.stdin.write("stop\n")
        load.stdin.flush()
        counted = json.loads(load.stdout.readline())
    ledger_process.stop_only()
    import_folder(folder_of(ledger_process))
    records = UsageRecord.objects.all()
    assert not records.filter(outcome="running").exists()
    ok = records.filter(outcome="ok").count()
    total = counted["plain"] + counted["stream"]
    # Whoever has a whole answer is in the ledger. A kill between the ledger's line and the last bytes on the wire,
    # microseconds, leaves a line for an answer that did not arrive whole.
    assert total <= ok <= total + kills * clients
    assert ok - total <= 2, (ok, total)
    assert sum(UsageDay.objects.values_list("requests", flat=True)) == records.count()
    tokens = sum(r.tokens_out or 0 for r in records)
    assert sum(UsageDay.objects.values_list("tokens_out", flat=True)) == tokens > 0
    assert all(r.tokens_out is None for r in records if r.outcome == "interrupted")
    assert not list(folder_of(ledger_process).glob("*.spool"))
