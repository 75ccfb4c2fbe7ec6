"""What the gateway costs, beside others: the same requests direct, through rigpanel, vllm-router and LiteLLM.

    .venv/bin/python benchmarks/gateway.py [--requests N] [--seconds S] [--steady S] [--peers FOLDER] [--only NAME ...]

One fake engine of ours answers all of them. The others are measured where their environments are found, and skipped
where not:

    python3 -m venv .engines-bench/litellm     && .engines-bench/litellm/bin/pip install 'litellm[proxy]'
    python3 -m venv .engines-bench/vllm-router && .engines-bench/vllm-router/bin/pip install vllm-router
    python3 -m venv .engines-bench/granian     && .engines-bench/granian/bin/pip install granian uvloop

Each is one process (LiteLLM: one worker), with its key checked where it has keys; rigpanel writes its ledger and
checks a quota. Printed: what each adds to one request at a time (in turns, so that other load on the machine meets
all), plain requests per second at most, streams of an engine with 30 tokens/s that all begin in one moment (share of
direct, time to first token), the same streams once all have begun (tokens per second, what is between two of them), CPU
seconds per 1 000 requests, resident memory; and whether rigpanel's ledger has exactly the requests that were made.
Compare ratios, not absolute times: they depend on the machine and on what else runs there.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import secrets
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODEL = "bench"
TOKENS_PER_SECOND = 30
BEGINNING_S = 4.0  # within this all streams have begun
EVENT = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": MODEL,
         "choices": [{"index": 0, "delta": {"content": "token "}, "finish_reason": None}]}  # fmt: skip
DONE = b"data: [DONE]\n\n"
USAGE = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}
ANSWER = json.dumps(
    {"id": "c", "object": "chat.completion", "created": 1, "model": MODEL, "usage": USAGE,
     "choices": [{"index": 0, "message": {"role": "assistant", "content": "x" * 500}, "finish_reason": "stop"}]}
).encode()  # fmt: skip
WISH = re.compile(r"tokens=(\d+) pause=([\d.]+)")
MODELS = json.dumps(
    {"object": "list", "data": [{"id": MODEL, "object": "model", "created": 1, "owned_by": "x"}]}
).encode()


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


# -- the fake engine, a process of its own --------------------------------------------------------


async def engine(port: int) -> None:
    """Just enough HTTP. The prompt says how many tokens a stream has and how long it pauses between them, because
    proxies pass on or drop other members as they like."""
    event = chunk(b"data: " + json.dumps(EVENT).encode() + b"\n\n")
    usage_event = chunk(b"data: " + json.dumps({**EVENT, "choices": [], "usage": USAGE}).encode() + b"\n\n")

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        def answer(body: bytes) -> None:
            start = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
            writer.write(start % len(body) + body)

        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = int(head.partition(b"content-length:")[2].split(b"\r\n", 1)[0] or 0)
                raw = await reader.readexactly(length)
                if head.startswith(b"get "):
                    answer(MODELS)
                    continue
                body = json.loads(raw)
                if not body.get("stream"):
                    answer(ANSWER)
                    continue
                content = body["messages"][0]["content"]
                wish = WISH.search(content if isinstance(content, str) else json.dumps(content))
                assert wish is not None
                writer.write(
                    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
                )
                pause_s = float(wish[2])
                for _ in range(int(wish[1])):
                    writer.write(event)
                    await writer.drain()
                    await asyncio.sleep(pause_s)
                if (body.get("stream_options") or {}).get("include_usage"):
                    writer.write(usage_event)
                writer.write(chunk(DONE) + b"0\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", port, backlog=2048)
    await server.serve_forever()


# -- the load -------------------------------------------------------------------------------------


def request_bytes(key: str, prompt: str = "Hello", **body: object) -> bytes:
    raw = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": prompt}], **body}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    return f"{head}authorization: Bearer {key}\r\ncontent-length: {len(raw)}\r\n\r\n".encode() + raw


def stream_bytes(key: str, tokens: int, pause_s: float) -> bytes:
    return request_bytes(key, f"tokens={tokens} pause={pause_s:.5f}", stream=True)


def answer_length(got: bytes) -> int | None:
    """How long the whole answer is; None while its head is not there."""
    head, ended, _ = got.partition(b"\r\n\r\n")
    if not ended:
        return None
    assert b" 200 " in head.split(b"\r\n", 1)[0], got[:600]
    lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    return len(head) + 4 + int(lengths[0].partition(b":")[2])


def one_at_a_time(port: int, request: bytes, count: int) -> list[float]:
    """Milliseconds per request on one connection. Blocking sockets: no event loop of ours in the figure."""
    times = []
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(count):
            began = time.perf_counter()
            connection.sendall(request)
            got = b""
            while (length := answer_length(got)) is None or len(got) < length:
                part = connection.recv(65536)
                assert part, got
                got += part
            times.append((time.perf_counter() - began) * 1000)
    return times


async def plain(port: int, request: bytes, clients: int, count: int) -> float:
    """Plain requests per second with so many clients, each on a connection of its own."""

    async def one() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(count // clients):
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly((answer_length(head) or 0) - len(head))
        writer.close()

    began = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(clients)))
    return count // clients * clients / (time.perf_counter() - began)


async def streams(port: int, request: bytes, count: int, rounds: int) -> tuple[float, float, float]:
    """Streams per second with ``count`` at once; median and 99th percentile of the time to the first token in ms."""
    first_ms: list[float] = []

    async def one() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(rounds):
            began = time.perf_counter()
            writer.write(request)
            got = await reader.readuntil(b"token ")
            assert b"200 OK" in got, got
            first_ms.append((time.perf_counter() - began) * 1000)
            await reader.readuntil(b"0\r\n\r\n")
        writer.close()

    began = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(count)))
    rate = count * rounds / (time.perf_counter() - began)
    return rate, statistics.median(first_ms), percentile(first_ms, 0.99)


async def steady(port: int, request: bytes, count: int, seconds: float) -> tuple[float, float, float]:
    """Tokens per second of ``count`` streams for so long, once all have begun; median and 99th percentile of the time
    between two tokens of a stream in ms. Streams are read to their end."""
    begun, all_begun, over = 0, asyncio.Event(), False
    tokens = 0
    gaps_ms: list[float] = []

    async def one() -> None:
        nonlocal begun, tokens
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request)
        got = await reader.readuntil(b"token ")
        assert b"200 OK" in got, got
        begun += 1
        if begun == count:
            all_begun.set()
        last: float | None = None
        tail = b""
        while not tail.endswith(b"0\r\n\r\n"):
            data = await reader.read(65536)
            assert data, "a stream was cut off"
            tail = (tail + data)[-16:]
            if all_begun.is_set() and not over:
                now = time.perf_counter()
                tokens += data.count(b'"token ')
                if last is not None:
                    gaps_ms.append((now - last) * 1000)
                last = now
        writer.close()

    reading = asyncio.gather(*(one() for _ in range(count)))
    await asyncio.wait({asyncio.ensure_future(all_begun.wait()), reading}, return_when=asyncio.FIRST_COMPLETED)
    began = time.perf_counter()
    await asyncio.sleep(seconds)
    over = True
    rate = tokens / (time.perf_counter() - began)
    await reading
    return rate, statistics.median(gaps_ms), percentile(gaps_ms, 0.99)


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


# -- who is measured ------------------------------------------------------------------------------


@dataclass
class Subject:
    name: str
    port: int
    key: str
    process: subprocess.Popen[bytes] | None = None
    requests: int = 0
    figures: dict[str, str] = field(default_factory=dict)

    def tree(self) -> list[object]:
        import psutil

        if self.process is None:
            return []
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]

    def cpu_s(self) -> float:
        return sum(sum(p.cpu_times()[:2]) for p in self.tree())  # type: ignore[attr-defined]

    def rss_mib(self) -> float:
        return sum(p.memory_info().rss for p in self.tree()) / 2**20  # type: ignore[attr-defined]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def prepare(folder: Path, engine_port: int, gateway_port: int) -> str:
    """A fresh database with one key, one open route and a quota that is never reached. Returns the key."""
    os.environ.update(
        RIGPANEL_DATA_DIR=str(folder),
        RIGPANEL_GATEWAY_PORT=str(gateway_port),
        RIGPANEL_PORT=str(free_port()),
        RIGPANEL_RIG="bench",
        RIGPANEL_USAGE_UNREAD_S="3600",  # the control worker's work in a panel
    )
    os.environ["DJANGO_SETTINGS_MODULE"] = "rigpanel.settings"
    sys.path.insert(0, str(ROOT))
    import django

    django.setup()
    from django.core.management import call_command

    from apps.accounts.models import User
    from apps.accounts.services import key_create
    from apps.catalog.models import Model
    from apps.common.actors import PANEL
    from apps.common.roles import Role
    from apps.deployments import routes
    from apps.deployments.models import Deployment, Replica, Status
    from apps.gateway.services import quota_set
    from apps.profiles.models import Profile, ProfileVersion
    from apps.rigs.models import Rig

    call_command("migrate", verbosity=0)
    user = User.objects.create_user("bench@lab.example", None, role="member")
    key = key_create(user, name="bench", actor=PANEL)[1]
    quota_set(Role.MEMBER, {"requests_per_minute": 10**6, "tokens_per_day": 10**12, "concurrent": 10**4}, actor=PANEL)
    version = ProfileVersion.objects.create(
        profile=Profile.objects.create(slug=MODEL, name=MODEL),
        number=1,
        model=Model.objects.create(slug=MODEL, name=MODEL),
        engine="simulated",
        served_name=MODEL,
        options={"max_num_seqs": 1024},
    )
    deployment = Deployment.objects.create(
        rig=Rig.objects.create(slug="bench"), version=version, served_name=MODEL, status=Status.READY
    )
    Replica.objects.create(
        deployment=deployment,
        index=0,
        launch_id="bench",
        host="127.0.0.1",
        port=engine_port,
        base_url=f"http://127.0.0.1:{engine_port}",
        engine_key=secrets.token_hex(8),
        healthy=True,
    )
    routes.open_to(deployment)
    return key


def rigpanel(folder: Path, engine_port: int) -> Subject:
    port = free_port()
    key = prepare(folder, engine_port, port)
    argv = [sys.executable, "-OO", "-m", "apps.gateway"]
    return Subject("rigpanel", port, key, started(argv, folder / "rigpanel.log"))


def on_granian(folder: Path, peers: Path) -> Subject | None:
    """The same application on another server; after ``rigpanel``, whose database it shares."""
    program = peers / "granian" / "bin" / "granian"
    if not program.exists() or "RIGPANEL_DATA_DIR" not in os.environ:
        return None
    import uvloop

    port = free_port()
    argv = [str(program), "--interface", "asgi", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
            "--loop", "uvloop", "--no-ws", "--log-level", "error", "apps.gateway.asgi:application"]  # fmt: skip
    path = f"{ROOT}:{Path(uvloop.__file__).parents[1]}"
    return Subject("on granian", port, "", started(argv, folder / "on granian.log", PYTHONPATH=path))


def vllm_router(folder: Path, engine_port: int, peers: Path) -> Subject | None:
    program = peers / "vllm-router" / "bin" / "vllm-router"
    if not program.exists():
        return None
    port = free_port()
    argv = [str(program), "--host", "127.0.0.1", "--port", str(port), "--worker-urls", f"http://127.0.0.1:{engine_port}",
            "--policy", "round_robin", "--prometheus-port", str(free_port()), "--log-level", "error"]  # fmt: skip
    return Subject("vllm-router", port, "none", started(argv, folder / "vllm-router.log"))


def litellm(folder: Path, engine_port: int, peers: Path) -> Subject | None:
    program = peers / "litellm" / "bin" / "litellm"
    if not program.exists():
        return None
    port, key = free_port(), "sk-" + secrets.token_hex(8)
    config = folder / "litellm.json"  # JSON is YAML
    parameters = {"model": f"openai/{MODEL}", "api_base": f"http://127.0.0.1:{engine_port}/v1", "api_key": "x"}
    config.write_text(
        json.dumps(
            {
                "model_list": [{"model_name": MODEL, "litellm_params": parameters}],
                "general_settings": {"master_key": key},
                "litellm_settings": {"telemetry": False},
            }
        )
    )
    argv = [str(program), "--config", str(config), "--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"]
    more = {"LITELLM_LOG": "ERROR", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    return Subject("litellm", port, key, started(argv, folder / "litellm.log", **more))


def started(argv: list[str], log: Path, **environment: str) -> subprocess.Popen[bytes]:
    with log.open("wb") as out:
        return subprocess.Popen(argv, cwd=ROOT, stdout=out, stderr=out, env={**os.environ, **environment})


def wait_for(subject: Subject, seconds: float = 240.0) -> bool:
    """Until it answers a whole request."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if subject.process is not None and subject.process.poll() is not None:
            return False
        try:
            one_at_a_time(subject.port, request_bytes(subject.key), 1)
            subject.requests += 1
            return True
        except (OSError, AssertionError):
            time.sleep(0.3)
    return False


# -- measuring ------------------------------------------------------------------------------------


class Table:
    """Rows are printed as they come: whoever stops a long run has what was measured by then."""

    def __init__(self, title: str, columns: list[str]) -> None:
        self._first = max(36, len(title))
        self._widths = [max(9, len(column)) + 3 for column in columns]
        print()
        self.row(title, *columns)

    def row(self, name: str, *cells: str) -> None:
        ends = "".join(cell.rjust(width) for cell, width in zip(cells, self._widths, strict=True))
        print(name.ljust(self._first) + ends, flush=True)


def latency(subjects: list[Subject], count: int) -> None:
    times: dict[str, list[float]] = {s.name: [] for s in subjects}
    used: dict[str, float] = {}
    for s in subjects:
        one_at_a_time(s.port, request_bytes(s.key), 50)  # warm
        s.requests += 50
        used[s.name] = 0.0
    turns = 20
    for _ in range(turns):
        for s in subjects:
            each = max(1, count // turns // (10 if s.name == "litellm" else 1))
            before = s.cpu_s()
            times[s.name] += one_at_a_time(s.port, request_bytes(s.key), each)
            used[s.name] += s.cpu_s() - before
            s.requests += each
    base = times["direct"]
    table = Table("one at a time", ["p50 ms", "p99 ms", "added p50", "added p99", "CPU s / 1000"])
    for s in subjects:
        mine = times[s.name]
        p50, p99 = percentile(mine, 0.5), percentile(mine, 0.99)
        added = (
            ["", ""] if s.name == "direct" else [f"{p - percentile(base, q):.2f}" for p, q in ((p50, 0.5), (p99, 0.99))]
        )
        cpu = "" if s.name == "direct" else f"{used[s.name] / len(mine) * 1000:.2f}"
        table.row(s.name, f"{p50:.2f}", f"{p99:.2f}", *added, cpu)


def capacity(subjects: list[Subject], count: int, run: Callable[..., float]) -> None:
    rates: dict[str, float] = {}
    table = Table("plain requests, 32 clients", ["per second", "of direct", "CPU s / 1000"])
    for s in subjects:
        mine = max(64, count // (20 if s.name == "litellm" else 1))
        before = s.cpu_s()
        rates[s.name] = run(plain(s.port, request_bytes(s.key), 32, mine))
        done = mine // 32 * 32
        s.requests += done
        cpu = "" if s.name == "direct" else f"{(s.cpu_s() - before) / done * 1000:.2f}"
        table.row(s.name, f"{rates[s.name]:.0f}", f"{rates[s.name] / rates['direct']:.1%}", cpu)
    if "litellm" in rates and "rigpanel" in rates:
        print(f"rigpanel carries {rates['rigpanel'] / rates['litellm']:.1f} times what litellm does")


def paced(subjects: list[Subject], seconds: float, run: Callable[..., tuple[float, float, float]]) -> None:
    tokens = max(1, int(seconds * TOKENS_PER_SECOND))
    columns = ["per second", "of direct", "first token p50 ms", "p99 ms", "CPU s / 1000 tokens"]
    for count in (1, 32, 256):
        rate = 0.0
        table = Table(f"{count} stream{'s' * (count > 1)} of {tokens} tokens at {TOKENS_PER_SECOND}/s", columns)
        for s in subjects:
            request = stream_bytes(s.key, tokens, 1 / TOKENS_PER_SECOND)
            before, rounds = s.cpu_s(), 1 if count == 1 or s.name == "litellm" else 2
            mine, p50, p99 = run(streams(s.port, request, count, rounds))
            rate = rate or mine  # direct is the first
            s.requests += count * rounds
            cpu = "" if s.name == "direct" else f"{(s.cpu_s() - before) / (count * rounds * tokens) * 1000:.3f}"
            table.row(s.name, f"{mine:.2f}", f"{mine / rate:.1%}", f"{p50:.1f}", f"{p99:.1f}", cpu)


def steadily(subjects: list[Subject], seconds: float, run: Callable[..., tuple[float, float, float]]) -> None:
    count, rate = 256, 0.0
    tokens = int((seconds + BEGINNING_S) * TOKENS_PER_SECOND)
    columns = ["tokens / s", "of direct", "between two p50 ms", "p99 ms", "CPU s / 1000 tokens"]
    table = Table(f"{count} streams at {TOKENS_PER_SECOND}/s for {seconds:g} s, all begun", columns)
    for s in subjects:
        if s.name == "litellm":
            continue  # the first streams end before the last ones begin
        before = s.cpu_s()
        mine, p50, p99 = run(steady(s.port, stream_bytes(s.key, tokens, 1 / TOKENS_PER_SECOND), count, seconds))
        rate = rate or mine  # direct is the first
        s.requests += count
        cpu = "" if s.name == "direct" else f"{(s.cpu_s() - before) / (count * tokens) * 1000:.3f}"
        table.row(s.name, f"{mine:.0f}", f"{mine / rate:.1%}", f"{p50:.1f}", f"{p99:.1f}", cpu)


def ledger_matches(wanted: int) -> bool:
    """Read the spool as the control worker would, and compare with what this program counted."""
    from django.conf import settings

    from apps.gateway.ledger import import_folder
    from apps.gateway.models import UsageDay, UsageRecord

    while import_folder(settings.USAGE_DIR, limit_s=60):
        pass
    rows = UsageRecord.objects.filter(outcome="ok").count()
    days = sum(UsageDay.objects.values_list("requests", flat=True))
    print(f"rigpanel's ledger: {rows} rows and {days} in its days, {wanted} requests were made")
    return rows == days == wanted


def main() -> int:
    parser = argparse.ArgumentParser(description="What gateways add to a request.")
    parser.add_argument("--requests", type=int, default=4000, help="requests one at a time, each (LiteLLM: a tenth)")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of one paced stream")
    parser.add_argument("--steady", type=float, default=10.0, help="how long streams that have begun are watched")
    parser.add_argument(
        "--peers", type=Path, default=ROOT / ".engines-bench", help="where the others' environments lie"
    )
    parser.add_argument("--only", nargs="+", default=["rigpanel", "on granian", "vllm-router", "litellm"])
    parser.add_argument("--engine", type=int, help=argparse.SUPPRESS)  # this process is the fake engine, on that port
    options = parser.parse_args()
    import uvloop

    if options.engine:
        uvloop.run(engine(options.engine))
        return 0
    folder = Path(tempfile.mkdtemp(prefix="rp-bench-", dir="/tmp"))
    engine_port = free_port()
    subjects = [Subject("direct", engine_port, "none")]
    processes = [subprocess.Popen([sys.executable, __file__, "--engine", str(engine_port)])]
    try:
        wait_for(subjects[0])
        makers: dict[str, Callable[[], Subject | None]] = {
            "rigpanel": lambda: rigpanel(folder, engine_port),
            "on granian": lambda: on_granian(folder, options.peers),
            "vllm-router": lambda: vllm_router(folder, engine_port, options.peers),
            "litellm": lambda: litellm(folder, engine_port, options.peers),
        }
        for name in makers:
            subject = makers[name]() if name in options.only else None
            if subject is None:
                print(f"{name}: not measured")
                continue
            assert subject.process is not None
            if name == "on granian":
                subject.key = subjects[-1].key  # rigpanel's: they share a database
            processes.append(subject.process)
            if wait_for(subject):
                subjects.append(subject)
            else:
                print(f"{name}: did not come up\n{(folder / f'{name}.log').read_text()[-1500:]}")
        print("$ python", *sys.argv, f"   (load before: {os.getloadavg()[0]:.1f})", flush=True)
        idle = {s.name: s.rss_mib() for s in subjects}
        latency(subjects, options.requests)
        capacity(subjects, options.requests * 2, uvloop.run)
        paced(subjects, options.seconds, uvloop.run)
        steadily(subjects, options.steady, uvloop.run)
        table = Table("resident memory, MiB", ["idle", "after"])
        for s in subjects[1:]:
            table.row(s.name, f"{idle[s.name]:.0f}", f"{s.rss_mib():.0f}")
        mine = [s.requests for s in subjects if s.name in ("rigpanel", "on granian")]
        return 0 if not mine or ledger_matches(sum(mine)) else 1
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    raise SystemExit(main())
