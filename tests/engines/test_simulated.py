"""The simulated engine as its users meet it: a process, a port, a log, and memory on cards."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from apps.engines.protocol import Cause, EngineKind, ExpectedMemory, HealthProbe, ModelSpec, ReadinessState
from apps.engines.simulated.adapter import SimulatedAdapter, simulated_install
from apps.engines.simulated.hardware import CardHold
from apps.engines.simulated.memory import BLOCK_TOKENS, GIB, CachePlan
from apps.engines.simulated.texts import cache_too_small
from apps.hardware.server import HardwareServer
from apps.hardware.simulated import SimulatedDriver
from tests.engines.contexts import CARD_BYTES, CODER, INSTALLS, MIXTRAL, context, free_port, slots

DEADLINE_SECONDS = 60.0
KEY = "engine-key"
QUICK = {"load_seconds": 0.2, "tokens_per_second": 2000}
SMALL = ModelSpec(served_name="small", source="/models/small", weights_bytes=4 * GIB, kv_bytes_per_token=65536)
adapter = SimulatedAdapter()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


class Running:
    """One simulated engine, started as the runner would start it."""

    def __init__(self, log: Path, model: ModelSpec, options: dict[str, Any], **changes: Any) -> None:
        self.port = free_port()
        slot = replace(changes.pop("slot", slots(0)[0]), port=self.port, api_key=KEY)
        given = context(model, simulated_install(), options, replicas=(slot,), **changes)
        (launch,) = adapter.launch_specs(given)
        self.log_path = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                launch.argv,
                env={"PATH": os.environ["PATH"], **launch.env, **launch.secret_env},
                cwd="/",
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def ask(self, path: str, body: Any = None, key: str | None = KEY) -> tuple[int, bytes]:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}")
        if key is not None:
            request.add_header("Authorization", f"Bearer {key}")
        if body is not None:
            request.data = json.dumps(body).encode()
        try:
            with urllib.request.urlopen(request, timeout=DEADLINE_SECONDS) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def health(self) -> HealthProbe:
        try:
            return HealthProbe(self.ask("/health")[0])
        except OSError:
            return HealthProbe(None)

    def wait_until_ready(self) -> None:
        wait_until(lambda: adapter.readiness(self.log, self.health()).state is ReadinessState.READY)

    def wait_for_end(self) -> int:
        return self.process.wait(DEADLINE_SECONDS)

    def clean_up(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    running: list[Running] = []

    def started(options: dict[str, Any] | None = None, model: ModelSpec = SMALL, **changes: Any) -> Running:
        log = tmp_path / f"engine-{len(running)}.log"
        running.append(Running(log, model, {**QUICK, **(options or {})}, **changes))
        return running[-1]

    yield started
    for engine in running:
        engine.clean_up()


def chat(**more: Any) -> dict[str, Any]:
    return {"model": "small", "messages": [{"role": "user", "content": "hello"}], **more}


def test_it_is_503_while_it_loads_and_200_when_it_serves(start: Callable[..., Running]) -> None:
    engine = start({"hang_phase": "graphs"})
    wait_until(lambda: "Capturing CUDA graphs" in engine.log)
    assert engine.health().status == 503
    verdict = adapter.readiness(engine.log, engine.health())
    assert (verdict.state, verdict.phase) == (ReadinessState.WAITING, "graphs")
    other = start()
    other.wait_until_ready()
    wait_until(lambda: "Application startup complete" in other.log)


def test_sigterm_ends_it_with_0_while_loading_and_while_serving(start: Callable[..., Running]) -> None:
    loading = start({"hang_phase": "weights"})
    serving = start()
    serving.wait_until_ready()
    wait_until(lambda: "checkpoint shards" in loading.log)
    for engine in (loading, serving):
        engine.process.terminate()
        assert engine.wait_for_end() == 0


def test_it_can_ignore_sigterm(start: Callable[..., Running]) -> None:
    engine = start({"ignore_sigterm": True})
    engine.wait_until_ready()
    engine.process.terminate()
    assert engine.health().status == 200
    engine.process.kill()
    assert engine.wait_for_end() == -signal.SIGKILL


def test_v1_wants_the_key_and_health_and_metrics_do_not(start: Callable[..., Running]) -> None:
    engine = start()
    engine.wait_until_ready()
    assert engine.ask("/v1/models", key=None)[0] == 401
    assert engine.ask("/v1/models", key="wrong")[0] == 401
    assert engine.ask("/v1/chat/completions", chat(), key="wrong")[0] == 401
    assert engine.ask("/v1/models")[0] == 200
    assert engine.ask("/metrics", key=None)[0] == 200


def test_a_chat_answers_whole_with_usage_and_always_the_same(start: Callable[..., Running]) -> None:
    engine = start()
    engine.wait_until_ready()
    answers = [json.loads(engine.ask("/v1/chat/completions", chat(max_tokens=7))[1]) for _ in range(2)]
    assert answers[0]["choices"] == answers[1]["choices"]
    assert answers[0]["usage"]["completion_tokens"] == 7
    assert answers[0]["choices"][0]["finish_reason"] == "length"
    assert len(answers[0]["choices"][0]["message"]["content"].split()) == 7


@pytest.mark.parametrize(
    ("path", "body", "read"),
    [
        ("/v1/chat/completions", chat(max_tokens=5), lambda c: c["delta"].get("content", "")),
        ("/v1/completions", {"prompt": "hello", "max_tokens": 5}, lambda c: c["text"]),
    ],
)
def test_a_stream_carries_the_same_words_then_usage_then_done(
    start: Callable[..., Running], path: str, body: dict[str, Any], read: Callable[[Any], str]
) -> None:
    engine = start()
    engine.wait_until_ready()
    raw = engine.ask(path, {**body, "stream": True, "stream_options": {"include_usage": True}})[1].decode()
    events = [line.removeprefix("data: ") for line in raw.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 5
    text = "".join(read(chunk["choices"][0]) for chunk in chunks[:-1])
    whole = json.loads(engine.ask(path, body)[1])["choices"][0]
    assert text == (whole["message"]["content"] if "message" in whole else whole["text"])
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"


def test_embeddings_come_as_numbers_or_base64(start: Callable[..., Running]) -> None:
    engine = start()
    engine.wait_until_ready()
    answer = json.loads(engine.ask("/v1/embeddings", {"input": ["a", "b"]})[1])
    assert [len(item["embedding"]) for item in answer["data"]] == [64, 64]
    packed = json.loads(engine.ask("/v1/embeddings", {"input": "a", "encoding_format": "base64"})[1])
    assert isinstance(packed["data"][0]["embedding"], str)


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/v1/chat/completions", {**chat(), "model": "nope"}, 404, "The model `nope` does not exist."),
        ("/v1/chat/completions", chat(max_tokens=10**7), 400, "cannot be greater than max_model_len"),
        ("/v1/chat/completions", {"messages": []}, 400, "messages"),
        ("/v1/completions", {}, 400, "prompt"),
        ("/v1/nothing", {}, 404, "Not Found"),
        ("/v1/models", {}, 405, "Method Not Allowed"),
    ],
)
def test_a_wrong_request_is_answered_as_vllm_does(
    start: Callable[..., Running], path: str, body: dict[str, Any], status: int, words: str
) -> None:
    engine = start()
    engine.wait_until_ready()
    got, answer = engine.ask(path, body)
    assert (got, words in answer.decode()) == (status, True)


def test_metrics_count_what_was_served(start: Callable[..., Running]) -> None:
    engine = start(slot=slots(1)[0])
    engine.wait_until_ready()
    before = adapter.parse_metrics(engine.ask("/metrics")[1].decode())
    engine.ask("/v1/chat/completions", chat(max_tokens=9))
    after = adapter.parse_metrics(engine.ask("/metrics")[1].decode())
    assert (before.generation_tokens_total, after.generation_tokens_total) == (0, 9)
    assert after.prompt_tokens_total is not None
    assert after.prompt_tokens_total > 0
    assert after.time_to_first_token_count == 1
    assert (after.requests_running, after.requests_waiting, after.kv_cache_usage_ratio) == (0, 0, 0)
    assert after.kv_cache_tokens is not None
    assert after.kv_cache_tokens > 100_000


def test_requests_beyond_max_num_seqs_wait_and_a_client_that_leaves_frees_its_place(
    start: Callable[..., Running],
) -> None:
    engine = start({"max_num_seqs": 1, "tokens_per_second": 20})
    engine.wait_until_ready()
    streams = []
    for _ in range(2):
        request = urllib.request.Request(
            f"http://127.0.0.1:{engine.port}/v1/chat/completions",
            data=json.dumps(chat(stream=True, max_tokens=5000, ignore_eos=True)).encode(),
            headers={"Authorization": f"Bearer {KEY}"},
        )
        streams.append(urllib.request.urlopen(request, timeout=DEADLINE_SECONDS))
        streams[-1].readline()

    def load() -> tuple[float | None, float | None]:
        found = adapter.parse_metrics(engine.ask("/metrics")[1].decode())
        return found.requests_running, found.requests_waiting

    wait_until(lambda: load() == (1, 1))
    streams[0].close()
    wait_until(lambda: load() == (1, 0))
    streams[1].close()
    wait_until(lambda: load() == (0, 0))


def test_it_can_answer_500_to_the_first_requests_or_to_all(start: Callable[..., Running]) -> None:
    some, always = start({"fail_requests": 2}), start({"error_500": True})
    some.wait_until_ready()
    always.wait_until_ready()
    assert [some.ask("/v1/chat/completions", chat())[0] for _ in range(3)] == [500, 500, 200]
    assert [always.ask("/v1/chat/completions", chat())[0] for _ in range(3)] == [500, 500, 500]


def test_it_can_crash_after_some_requests(start: Callable[..., Running]) -> None:
    engine = start({"crash_after_requests": 1})
    engine.wait_until_ready()
    assert engine.ask("/v1/chat/completions", chat())[0] == 200
    with contextlib.suppress(OSError):
        engine.ask("/v1/chat/completions", chat())
    assert engine.wait_for_end() == 1
    assert adapter.diagnose(engine.log, 1).cause is Cause.CRASHED


@pytest.mark.parametrize(
    ("cause", "exit_code", "recognised"),
    [
        ("kv_cache_too_small", 1, Cause.KV_CACHE_TOO_SMALL),
        ("out_of_memory", 1, Cause.OUT_OF_MEMORY),
        ("port_busy", 1, Cause.PORT_BUSY),
        ("model_missing", 1, Cause.MODEL_MISSING),
        ("unsupported_split", 1, Cause.UNSUPPORTED_SPLIT),
        ("nccl", 1, Cause.NCCL),
        ("disk_full", 1, Cause.DISK_FULL),
        ("killed", -9, Cause.KILLED),
        ("bad_flag", 2, Cause.BAD_FLAG),
        ("wrong_quantization", 1, Cause.WRONG_QUANTIZATION),
        ("crashed", 1, Cause.CRASHED),
    ],
)
def test_a_scripted_failure_ends_as_vllm_would_and_is_recognised(
    start: Callable[..., Running], cause: str, exit_code: int, recognised: Cause
) -> None:
    engine = start({"fail_cause": cause})
    assert engine.wait_for_end() == exit_code
    assert adapter.diagnose(engine.log, exit_code).cause is recognised


@pytest.mark.parametrize("phase", ["weights", "compile", "graphs", "server"])
def test_it_can_fail_in_any_phase(start: Callable[..., Running], phase: str) -> None:
    engine = start({"fail_phase": phase})
    assert engine.wait_for_end() == 1
    assert adapter.diagnose(engine.log, 1).cause is not Cause.UNKNOWN
    assert ("Graph capturing finished" in engine.log) == (phase == "server")


def test_a_taken_port_ends_it_at_once(start: Callable[..., Running], tmp_path: Path) -> None:
    first = start()
    first.wait_until_ready()
    (launch,) = adapter.launch_specs(
        context(SMALL, simulated_install(), QUICK, replicas=(replace(slots(0)[0], port=first.port),))
    )
    second = subprocess.run(launch.argv, env=launch.env, capture_output=True, text=True, check=False)
    assert second.returncode == 1
    assert adapter.diagnose(second.stdout, 1).cause is Cause.PORT_BUSY


# -- standing in for vLLM on a simulated rig ----------------------------------------------------


def stand_in(model: ModelSpec, cards: int, **options: Any) -> dict[str, Any]:
    return {
        "model": model,
        "options": {"gpu_memory_utilization": 0.9, "load_seconds": 0.2, **options},
        "slot": slots(cards)[0],
        "tensor_parallel_size": cards,
        "stand_in_for": EngineKind.VLLM,
    }


def test_a_context_that_does_not_fit_fails_with_vllms_own_words(tmp_path: Path) -> None:
    engine = Running(tmp_path / "log", **stand_in(MIXTRAL, 4, max_model_len=65536, enable_prefix_caching=True))
    try:
        assert engine.wait_for_end() == 1
    finally:
        engine.clean_up()
    assert "max seq len (65536), (3.5 GiB KV cache is needed" in engine.log
    found = adapter.diagnose(engine.log, 1)
    assert found.cause is Cause.KV_CACHE_TOO_SMALL
    # docs: 40,144 to 56,992 tokens on four 3090s
    assert 40_144 <= found.suggested_options["max_model_len"] <= 56_992


def test_what_the_failure_suggests_fits(tmp_path: Path, start: Callable[..., Running]) -> None:
    failed = Running(tmp_path / "log", **stand_in(MIXTRAL, 4, max_model_len=65536))
    try:
        assert failed.wait_for_end() == 1
    finally:
        failed.clean_up()
    suggested = dict(adapter.diagnose(failed.log, 1).suggested_options)
    again = Running(tmp_path / "log2", **stand_in(MIXTRAL, 4, **suggested))
    try:
        again.wait_until_ready()
        models = json.loads(again.ask("/v1/models")[1])
        assert models["data"][0]["max_model_len"] == suggested["max_model_len"]
    finally:
        again.clean_up()


def test_weights_that_fill_the_cards_leave_no_cache(tmp_path: Path) -> None:
    engine = Running(tmp_path / "log", **stand_in(MIXTRAL, 2, max_model_len=4096))
    try:
        assert engine.wait_for_end() == 1
    finally:
        engine.clean_up()
    assert "No available memory for the cache blocks" in engine.log
    assert adapter.diagnose(engine.log, 1).cause is Cause.KV_CACHE_TOO_SMALL


def test_more_than_the_models_own_context_is_refused(tmp_path: Path) -> None:
    engine = Running(tmp_path / "log", **stand_in(CODER, 4, max_model_len=131072))
    try:
        assert engine.wait_for_end() == 1
    finally:
        engine.clean_up()
    assert dict(adapter.diagnose(engine.log, 1).suggested_options) == {"max_model_len": 32768}


GOLDEN_PLANS = [  # what vLLM 0.33's own planner answered: GiB, bytes per token, length, blocks, tokens
    ("Mixtral 8x22B TP4", 3.04, 229_376 // 4, 65536, 3557, 56912, False, "56896"),
    ("Mixtral 8x22B TP4", 2.14, 229_376 // 4, 32768, 2504, 40064, True, ""),
    ("Llama-70B TP4", 10.94, 327_680 // 4, 131072, 8962, 143392, True, ""),
    ("Llama-70B TP2", 1.68, 327_680 // 2, 16384, 688, 11008, False, "10992"),
    ("Coder-32B TP4", 15.69, 262_144 // 4, 32768, 16066, 257056, True, ""),
    ("Coder-32B TP2", 10.29, 262_144 // 2, 32768, 5268, 84288, True, ""),
]


@pytest.mark.parametrize(("case", "gib", "per_token", "length", "blocks", "tokens", "fits", "estimate"), GOLDEN_PLANS)
def test_the_cache_arithmetic_is_vllms(
    case: str, gib: float, per_token: int, length: int, blocks: int, tokens: int, fits: bool, estimate: str
) -> None:
    plan = CachePlan(0, ExpectedMemory(0, 0, 0, 0, 0), int(gib * GIB), per_token * BLOCK_TOKENS)
    assert (plan.blocks, plan.tokens, plan.longest_request_tokens >= length) == (blocks, tokens, fits)
    if not fits:
        assert f"estimated maximum model length is {estimate}." in cache_too_small(length, plan)


# -- on the simulated cards ---------------------------------------------------------------------


@pytest.fixture
def socket_path() -> Iterator[Path]:
    folder = tempfile.mkdtemp(dir="/tmp")
    yield Path(folder) / "hw.sock"
    shutil.rmtree(folder)


def held(server: HardwareServer, pid: int) -> list[int]:
    reading = server.read()
    return [
        int(process.memory_used_bytes or 0)
        for gpu in reading.gpus
        for process in gpu.processes or ()
        if process.pid == pid
    ]


def on_cards(server: HardwareServer, socket_path: Path, options: dict[str, Any]) -> dict[str, Any]:
    cards = server.inventory().gpus[:2]
    slot = replace(
        slots(2)[0],
        gpu_uuids=tuple(card.uuid for card in cards),
        gpu_memory_total_bytes=tuple(int(card.memory_total_bytes or 0) for card in cards),
    )
    return {
        "options": {"gpu_memory_utilization": 0.9, **options},
        "slot": slot,
        "tensor_parallel_size": 2,
        "simulation_socket": str(socket_path),
    }


def test_it_holds_its_memory_on_its_cards_while_it_lives(start: Callable[..., Running], socket_path: Path) -> None:
    with HardwareServer(SimulatedDriver(), socket_path) as server:
        engine = start(**on_cards(server, socket_path, {}))
        engine.wait_until_ready()
        total = int(server.inventory().gpus[0].memory_total_bytes or 0)
        memory = held(server, engine.process.pid)
        assert len(memory) == 2
        assert all(0.9 * total <= used <= 0.95 * total for used in memory)
        engine.process.kill()
        engine.wait_for_end()
        wait_until(lambda: held(server, engine.process.pid) == [])


def test_it_declares_itself_again_when_the_sampler_comes_back(start: Callable[..., Running], socket_path: Path) -> None:
    server = HardwareServer(SimulatedDriver(), socket_path)
    server.start()
    engine = start(**on_cards(server, socket_path, {}))
    engine.wait_until_ready()
    before = held(server, engine.process.pid)
    server.close()
    assert engine.health().status == 200
    with HardwareServer(SimulatedDriver(), socket_path) as again:
        wait_until(lambda: held(again, engine.process.pid) == before)


def test_a_busy_engine_makes_its_cards_work(start: Callable[..., Running], socket_path: Path) -> None:
    with HardwareServer(SimulatedDriver(), socket_path) as server:
        engine = start(**on_cards(server, socket_path, {"tokens_per_second": 20}))
        engine.wait_until_ready()
        request = urllib.request.Request(
            f"http://127.0.0.1:{engine.port}/v1/chat/completions",
            data=json.dumps(chat(stream=True, max_tokens=5000, ignore_eos=True)).encode(),
            headers={"Authorization": f"Bearer {KEY}"},
        )
        with urllib.request.urlopen(request, timeout=DEADLINE_SECONDS) as stream:
            stream.readline()
            wait_until(lambda: (server.read().gpus[0].utilization_percent or 0) > 50)
        wait_until(lambda: (server.read().gpus[0].utilization_percent or 0) < 10)


def test_cards_that_another_engine_fills_are_a_start_that_fails_truthfully(
    start: Callable[..., Running], socket_path: Path
) -> None:
    with HardwareServer(SimulatedDriver(), socket_path) as server:
        first = start(**on_cards(server, socket_path, {}))
        first.wait_until_ready()
        second = start(**on_cards(server, socket_path, {}))
        assert second.wait_for_end() == 1
        assert "Free memory on device cuda:0" in second.log
        assert adapter.diagnose(second.log, 1).cause is Cause.OUT_OF_MEMORY
        assert first.health().status == 200


def test_the_stand_in_takes_only_what_it_understands() -> None:
    given = context(
        CODER,
        INSTALLS[EngineKind.VLLM],
        {"max_model_len": 8192, "kv_cache_dtype": "fp8", "enable_prefix_caching": False},
        replicas=slots(4),
        stand_in_for=EngineKind.VLLM,
    )
    (launch,) = adapter.launch_specs(given)
    assert "apps.engines.simulated.server" in launch.argv
    assert launch.argv[launch.argv.index("--max-model-len") + 1] == "8192"
    assert str(CARD_BYTES) in launch.argv[launch.argv.index("--gpu-memory-bytes") + 1]
    assert "fp8" not in launch.argv


async def test_a_hold_ends_when_told_to_in_the_moment_of_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine got its SIGTERM with its answer's end, and stayed for ever."""
    reader = asyncio.StreamReader()

    async def connected(hold: CardHold) -> None:
        hold._connection = (reader, cast("asyncio.StreamWriter", None))

    monkeypatch.setattr(CardHold, "_send_hold", connected)
    for turns in range(5):  # of the loop, between the change and the end
        hold = CardHold("sampler.sock", "model", ["GPU-1"])
        keeping = asyncio.create_task(hold.keep())
        while hold._connection is None:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        hold.set_utilization(0.5)
        for _ in range(turns):
            await asyncio.sleep(0)
        keeping.cancel()
        ended, _ = await asyncio.wait({keeping}, timeout=DEADLINE_SECONDS)
        assert ended, f"after {turns} turns"
