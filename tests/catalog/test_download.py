"""Downloads against a hub that speaks the real protocol, through the installed huggingface_hub."""

from __future__ import annotations

import json
import os
import signal
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from apps.audit.models import AuditEntry
from apps.catalog.models import Weights
from apps.catalog.services import model_create
from apps.catalog.weights import download, fetch
from apps.catalog.weights.services import download_request
from apps.catalog.weights.token import hub_token, token_store
from apps.common.actors import COMMAND_LINE
from apps.common.errors import Conflict, Invalid
from apps.jobs.models import Job, JobLogLine
from apps.jobs.runner import job_claim
from apps.jobs.services import job_cancel
from tests.factories.hub import COMMIT, Hub

pytestmark = pytest.mark.django_db(transaction=True)
MIB = 2**20
TOKEN = "hf_1234567890abcdefTOKEN"


def tensors(size: int) -> bytes:
    """A safetensors file with one tensor of ``size`` bytes that are not all the same."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return struct.pack("<Q", len(header)) + header + (bytes(range(256)) * (size // 256 + 1))[:size]


def gguf(size: int = MIB, seed: int = 1) -> bytes:
    return b"GGUF" + struct.pack("<I", 3) + bytes((i * seed) % 251 for i in range(1000)) * (size // 1000)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, settings: Any, tmp_path: Path) -> Iterator[Hub]:
    settings.MODELS_DIR = tmp_path / "models"
    settings.MODELS_DIR.mkdir()
    (Path(settings.DATA_DIR) / "secrets" / "hf_token").unlink(missing_ok=True)
    monkeypatch.setattr(download, "RESERVE_BYTES", 0)
    monkeypatch.setattr(download, "FLOOR_BYTES", 0)
    monkeypatch.setattr(download, "SAVE_SECONDS", 0.0)
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    with Hub() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running
    (Path(settings.DATA_DIR) / "secrets" / "hf_token").unlink(missing_ok=True)


@pytest.fixture
def model(db: None) -> Any:
    return model_create(actor=COMMAND_LINE, slug="tiny", name="Tiny", hf_repo="lab/tiny")


def add_sharded(hub: Hub, size: int = 2 * MIB) -> None:
    shards = {f"model-0000{i}-of-00002.safetensors": tensors(size + i) for i in (1, 2)}
    index = {"weight_map": {f"w{i}": name for i, name in enumerate(shards)}}
    hub.add(
        "lab/tiny",
        {
            **shards,
            "model.safetensors.index.json": json.dumps(index).encode(),
            "config.json": b'{"architectures": ["LlamaForCausalLM"]}',
            "tokenizer.json": b"{}",
            "merges.txt": b"a b\n",
            "modeling_tiny.py": b"raise SystemExit",
            "original/consolidated.00.pth": b"x" * 100,
            "onnx/model.json": b"{}",
            "README.md": b"# Tiny",
            "../outside.json": b"{}",
        },
    )


def start(model: Any, rig: Any, **more: Any) -> Job:
    return download_request(model, actor=COMMAND_LINE, rig=rig, **more)


def run(model: Any, rig: Any, **more: Any) -> Job:
    job = start(model, rig, **more)
    context = job_claim(job.pk)
    assert context is not None
    context.run()
    job.refresh_from_db()
    return job


def log_of(job: Job) -> str:
    return "\n".join(JobLogLine.objects.filter(job=job).order_by("pk").values_list("text", flat=True))


def wait_until(true: Callable[[], Any], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited long enough"
        time.sleep(0.02)


def test_only_what_an_engine_needs_is_fetched_pinned_and_registered(hub: Hub, model: Any, rig: Any) -> None:
    add_sharded(hub)
    job = run(model, rig, reason="to try it")
    assert job.state == "succeeded", job.summary + log_of(job)
    weights = Weights.objects.get()
    assert (weights.kind, weights.repo, weights.revision) == ("safetensors", "lab/tiny", COMMIT)
    folder = Path(weights.path)
    assert folder.name == COMMIT[:12]
    assert sorted(p.name for p in folder.rglob("*") if p.is_file() and p.name != ".lock") == [
        "config.json",
        "merges.txt",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    ]
    assert weights.size_bytes == sum(p.stat().st_size for p in folder.iterdir())
    assert "MB/s; every checksum is right" in job.steps.get(name="fetch").detail
    assert all(path.split("/")[-2] != "main" for _, path, _ in hub.requests if "/resolve/" in path)  # pinned
    before = len(hub.requests)
    again = run(model, rig)
    assert again.state == "succeeded"
    assert len(hub.requests) == before + 1  # the listing alone: nothing is fetched twice


def test_a_line_that_breaks_is_taken_up_again_with_ranges(hub: Hub, model: Any, rig: Any) -> None:
    content = gguf(6 * MIB)
    hub.add("lab/tiny", {"tiny-Q4_K_M.gguf": content})
    hub.cut_after = [2 * MIB, MIB]
    job = run(model, rig)
    assert job.state == "succeeded", job.summary + log_of(job)
    assert Path(Weights.objects.get().path).read_bytes() == content
    assert len(hub.ranges()) >= 2
    assert all(r != "bytes=0-" for r in hub.ranges())


def test_a_server_that_ignores_ranges_sends_it_all_and_the_file_is_still_right(hub: Hub, model: Any, rig: Any) -> None:
    content = gguf(3 * MIB)
    hub.add("lab/tiny", {"tiny.gguf": content})
    hub.cut_after, hub.ignore_ranges = [MIB], True
    assert run(model, rig).state == "succeeded"
    assert Path(Weights.objects.get().path).read_bytes() == content


def test_cancel_keeps_what_arrived_and_the_next_run_carries_on(hub: Hub, model: Any, rig: Any) -> None:
    content = gguf(8 * MIB)
    hub.add("lab/tiny", {"tiny.gguf": content})
    hub.bytes_per_second = 4 * MIB
    job = start(model, rig)
    context = job_claim(job.pk)
    assert context is not None
    worker = threading.Thread(target=context.run)
    worker.start()
    part = download.folder_of("tiny", COMMIT) / "tiny.gguf.part"
    wait_until(lambda: part.exists() and part.stat().st_size >= MIB)
    job_cancel(job, actor=COMMAND_LINE)
    worker.join(timeout=60)
    job.refresh_from_db()
    assert job.state == "cancelled"
    assert "are kept" in job.summary
    kept = part.stat().st_size
    assert 0 < kept < len(content)
    assert not Weights.objects.exists()

    hub.bytes_per_second = 0
    hub.requests.clear()
    again = run(model, rig)
    assert again.state == "succeeded", again.summary
    assert hub.ranges() == [f"bytes={kept}-"]
    assert "is carried on at" in log_of(again)
    assert Path(Weights.objects.get().path).read_bytes() == content


def test_a_wrong_checksum_is_thrown_away_and_fetched_once_more(hub: Hub, model: Any, rig: Any) -> None:
    hub.add("lab/tiny", {"tiny.gguf": gguf()})
    hub.damage = 1
    assert run(model, rig).state == "succeeded"
    assert Path(Weights.objects.get().path).read_bytes() == gguf()


def test_a_checksum_that_stays_wrong_registers_nothing(hub: Hub, model: Any, rig: Any) -> None:
    hub.add("lab/tiny", {"tiny.gguf": gguf()})
    hub.damage = 9
    job = run(model, rig)
    assert (job.state, (job.result or {})["cause"]) == ("failed", "checksum")
    assert "tiny.gguf arrived twice with a wrong checksum" in job.summary
    assert not Weights.objects.exists()
    assert not list(download.folder_of("tiny", COMMIT).glob("tiny.gguf*"))


def test_a_quantization_has_to_be_chosen_where_there_are_several(hub: Hub, model: Any, rig: Any) -> None:
    hub.add(
        "lab/tiny",
        {
            "tiny-Q4_K_M.gguf": gguf(seed=3),
            "tiny-Q8_0-00001-of-00002.gguf": gguf(seed=5),
            "tiny-Q8_0-00002-of-00002.gguf": gguf(seed=7),
            "mmproj-tiny-F16.gguf": gguf(),
        },
    )
    job = run(model, rig)
    assert job.state == "failed"
    assert "Choose one of the quantizations" in job.summary
    assert "Q4_K_M (0.0 GiB), Q8_0 (0.0 GiB)" in job.summary
    job = run(model, rig, quantization="q8_0")
    assert job.state == "succeeded", job.summary
    weights = Weights.objects.get()
    assert weights.path.endswith("/tiny-Q8_0-00001-of-00002.gguf")
    assert (weights.quantization, weights.size_bytes) == ("Q8_0", len(gguf(seed=5)) + len(gguf(seed=7)))
    assert "no quantization 'Q2_K'" in run(model, rig, quantization="Q2_K").summary


@pytest.mark.parametrize(
    ("order", "cause", "words"),
    [
        ({"status": 500}, "hub_error", "answered with an error (500)"),
        ({"status": 429}, "rate_limited", "asking too often"),
        ({"status": 403}, "forbidden", "may not read lab/tiny"),
        ({"tokens": {"other"}}, "no_repository", "that this panel may see"),
        ({"tokens": {"other"}, "gated": True}, "gated", "Ask there"),
        ({"repositories": {}}, "no_repository", "has no lab/tiny"),
    ],
)
def test_what_the_hub_refuses_is_a_sentence(
    hub: Hub, model: Any, rig: Any, order: dict[str, Any], cause: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_sharded(hub)
    for name, value in order.items():
        setattr(hub, name, value)
    if order.get("status") == 429:
        hub.status, hub.busy_answers = 0, 99
    job = run(model, rig)
    assert (job.state, (job.result or {}).get("cause")) == ("failed", cause), job.summary + log_of(job)
    assert words in job.summary
    assert "Traceback" not in job.summary


def test_a_busy_hub_is_waited_for(hub: Hub, model: Any, rig: Any) -> None:
    hub.add("lab/tiny", {"tiny.gguf": gguf()})
    hub.busy_answers = 1
    assert run(model, rig).state == "succeeded"


def test_no_network_and_no_such_revision_are_said(
    hub: Hub, model: Any, rig: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_sharded(hub)
    assert "no branch, tag or commit v9" in run(model, rig, revision="v9").summary
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody listens
    job = run(model, rig)
    assert "cannot be reached" in job.summary
    assert job.steps.get(name="ask").state == "failed"


def test_a_full_disk_is_said_before_and_noticed_while_it_runs(
    hub: Hub, model: Any, rig: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_sharded(hub)
    monkeypatch.setattr(download, "RESERVE_BYTES", 10**18)
    job = run(model, rig)
    assert job.state == "failed"
    assert "4.0 MiB are needed" in job.summary
    assert "are free at" in job.summary
    assert not [r for r in hub.requests if "/content/" in r[1]]
    monkeypatch.setattr(download, "RESERVE_BYTES", 0)
    monkeypatch.setattr(download, "FLOOR_BYTES", 10**18)
    job = run(model, rig)
    assert (job.result or {})["cause"] == "disk_full", job.summary
    assert "The disk is full" in job.summary
    assert "carries on from there" in job.summary


def test_the_token_reaches_the_hub_and_nothing_else(hub: Hub, model: Any, rig: Any, settings: Any) -> None:
    add_sharded(hub)
    hub.tokens = {TOKEN}
    with pytest.raises(Invalid):
        token_store("two words", actor=COMMAND_LINE)
    token_store(TOKEN, actor=COMMAND_LINE)
    kept = Path(settings.DATA_DIR) / "secrets" / "hf_token"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    seen: list[str] = []

    def watch() -> None:
        while not done.wait(0.02):
            for child in psutil.Process().children():
                try:
                    seen.append(" ".join(child.cmdline()) + str(child.environ()))
                except psutil.Error:
                    continue

    done = threading.Event()
    watcher = threading.Thread(target=watch)
    watcher.start()
    job = run(model, rig)
    done.set()
    watcher.join()
    assert job.state == "succeeded", job.summary  # the hub's content host asserts that it gets none
    assert any("fetch.py" in line for line in seen)
    everything = json.dumps([job.params, job.data, job.result]) + log_of(job) + "".join(seen)
    everything += "".join(json.dumps(e.detail) for e in AuditEntry.objects.all())
    assert TOKEN not in everything
    assert "Signature=secret" not in everything
    token_store("", actor=COMMAND_LINE)
    assert hub_token() == ""
    settings.HF_TOKEN = "hf_from_the_environment"
    assert hub_token() == "hf_from_the_environment"
    with pytest.raises(Conflict, match="RIGPANEL_HF_TOKEN"):
        token_store(TOKEN, actor=COMMAND_LINE)


def test_a_wrong_token_is_told_from_a_missing_repository(hub: Hub, model: Any, rig: Any) -> None:
    add_sharded(hub)
    hub.tokens = {"another-token"}
    token_store(TOKEN, actor=COMMAND_LINE)
    assert "does not accept the stored token" in run(model, rig).summary


def test_two_clicks_are_one_job_and_another_request_has_to_wait(hub: Hub, model: Any, rig: Any) -> None:
    first = start(model, rig)
    assert start(model, rig) == first
    with pytest.raises(Conflict, match="Cancel that first"):
        start(model, rig, revision="v2")
    with pytest.raises(Invalid):
        start(model, rig, repo="--flag")
    nameless = model_create(actor=COMMAND_LINE, slug="nameless", name="Nameless")
    with pytest.raises(Invalid, match="owner/name"):
        start(nameless, rig)


def test_a_killed_worker_leaves_no_second_writer_and_its_successor_carries_on(
    hub: Hub, model: Any, rig: Any, tmp_path: Path
) -> None:
    """The program that fetches dies with the worker that reads it, and its part file is used by the next one."""
    content = gguf(8 * MIB)
    hub.add("lab/tiny", {"tiny.gguf": content})
    hub.bytes_per_second = 3 * MIB
    folder = tmp_path / "models" / "tiny" / COMMIT[:12]
    request = {
        "do": "fetch",
        "repo": "lab/tiny",
        "revision": COMMIT,
        "folder": str(folder),
        "files": [{"name": "tiny.gguf", "size_bytes": len(content), "sha256": "", "blob_id": ""}],
    }
    # A worker in small: starts the program as jobs do, tells its pid, waits.
    worker = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import subprocess, sys\n"
            "p = subprocess.Popen([sys.executable, '-I', sys.argv[1]], stdin=subprocess.PIPE, start_new_session=True)\n"
            "p.stdin.write(sys.argv[2].encode()); p.stdin.close()\n"
            "sys.stderr.write(f'{p.pid}\\n'); sys.stderr.flush()\n"
            "p.wait()\n",
            fetch.__file__,
            json.dumps(request),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ},
    )
    assert worker.stderr is not None
    fetcher = psutil.Process(int(worker.stderr.readline()))
    part = folder / "tiny.gguf.part"
    wait_until(lambda: part.exists() and part.stat().st_size >= MIB)
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    worker.stderr.close()
    wait_until(lambda: not fetcher.is_running() or fetcher.status() == psutil.STATUS_ZOMBIE)
    kept = part.stat().st_size
    assert kept < len(content)
    hub.bytes_per_second = 0
    hub.requests.clear()
    job = run(model, rig)
    assert job.state == "succeeded", job.summary
    assert hub.ranges() == [f"bytes={kept}-"]
    assert Path(Weights.objects.get().path).read_bytes() == content
