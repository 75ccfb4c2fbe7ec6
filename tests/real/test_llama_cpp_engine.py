"""The real llama.cpp server of the starter install, started and stopped as the panel does it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from apps.engines.llama_cpp import xllama_server
from apps.engines.llama_cpp.adapter import LlamaCppAdapter
from apps.engines.protocol import (
    Cause,
    EngineKind,
    HealthProbe,
    Install,
    InvalidOptions,
    LaunchContext,
    ModelSpec,
    ReadinessState,
    ReplicaSlot,
)
from apps.runners.process import ProcessRunner
from apps.runners.protocol import Handle, LaunchSpec, ProcessState

REPOSITORY = Path(__file__).resolve().parents[2]
STARTER = Path(os.environ.get("RIGPANEL_TEST_STARTER", REPOSITORY / ".engines" / "starter"))
PYTHON = STARTER / "bin" / "python"
MODEL = Path(os.environ.get("RIGPANEL_TEST_GGUF", REPOSITORY / ".engines" / "models" / "gemma-3-270m-q4_k_m.gguf"))
KEY = "real-engine-key"
DEADLINE_SECONDS = 120.0
adapter = LlamaCppAdapter()

pytestmark = pytest.mark.skipif(
    not (PYTHON.exists() and MODEL.exists()),
    reason=f"needs the starter engine ({STARTER}) and its model ({MODEL}): make engines",
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


class Engine:
    """One launch of the starter engine through the process runner."""

    def __init__(self, runner: ProcessRunner, launch_id: str, model: Path, port: int, options: dict[str, Any]) -> None:
        self.runner, self.port = runner, port
        slot = ReplicaSlot(launch_id=launch_id, host="127.0.0.1", port=port, api_key=KEY)
        context = LaunchContext(
            model=ModelSpec("gemma-3-270m", str(model), chat_template="gemma"),
            options={"context_tokens": 1024, "parallel": 1, "threads": 2, **options},
            replicas=(slot,),
            install=Install(EngineKind.LLAMA_CPP, "starter", (str(PYTHON), xllama_server.__file__)),
        )
        (launch,) = adapter.launch_specs(context)
        self.handle: Handle = runner.launch(
            LaunchSpec(
                launch_id, launch.argv, launch.env, launch.secret_env, str(STARTER), stop_signals=launch.stop_signals
            )
        )

    @property
    def log(self) -> str:
        return self.runner.logs(self.handle, 0, 1_000_000).text

    def ask(self, path: str, body: Any = None, key: str | None = KEY) -> tuple[int, str]:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}")
        request.add_header("Content-Type", "application/json")
        if key:
            request.add_header("Authorization", f"Bearer {key}")
        if body is not None:
            request.data = json.dumps(body).encode()
        try:
            with urllib.request.urlopen(request, timeout=DEADLINE_SECONDS) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def probe(self) -> HealthProbe:
        try:
            return HealthProbe(self.ask(adapter.health_path, key=None)[0])
        except OSError:
            return HealthProbe(None)

    def wait_until_ready(self) -> None:
        def settled() -> bool:
            verdict = adapter.readiness(self.log, self.probe())
            assert verdict.state is not ReadinessState.FAILED, self.log
            return verdict.state is ReadinessState.READY

        wait_until(settled)

    def wait_for_exit(self) -> int | None:
        wait_until(lambda: self.runner.observe(self.handle).state is not ProcessState.RUNNING)
        return self.runner.observe(self.handle).exit_code


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessRunner]:
    made = ProcessRunner(tmp_path_factory.mktemp("launches"))
    yield made
    for directory in made.root.glob("*"):
        handle = made.recover(directory.name)
        if handle is not None:
            made.stop(handle)


@pytest.fixture(scope="module")
def serving(runner: ProcessRunner) -> Engine:
    engine = Engine(runner, "serving", MODEL, free_port(), {"extra_args": ["--no-warmup"]})
    engine.wait_until_ready()
    return engine


def chat(**more: Any) -> dict[str, Any]:
    question = {"role": "user", "content": "What is the capital of France?"}
    return {"model": "gemma-3-270m", "messages": [question], "max_tokens": 16, "temperature": 0, **more}


def test_a_chat_streams_real_tokens_with_usage(serving: Engine) -> None:
    status, text = serving.ask("/v1/chat/completions", chat(stream=True, stream_options={"include_usage": True}))
    assert status == 200
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    words = "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"])
    assert words.strip()
    assert chunks[-1]["usage"]["completion_tokens"] == 16


def test_the_chat_template_wraps_the_question(serving: Engine) -> None:
    """With Jinja on, the template's name alone became the prompt: three tokens for any question."""
    answer = json.loads(serving.ask("/v1/chat/completions", chat())[1])
    assert answer["usage"]["prompt_tokens"] > 10


def test_it_serves_under_the_profiles_name(serving: Engine) -> None:
    models = json.loads(serving.ask("/v1/models")[1])
    assert [model["id"] for model in models["data"]] == ["gemma-3-270m"]


def test_without_the_key_only_health_answers(serving: Engine) -> None:
    assert serving.ask("/health", key=None)[0] == 200
    assert serving.ask("/v1/chat/completions", chat(), key="wrong")[0] == 401
    assert serving.ask("/v1/chat/completions", chat(), key=None)[0] == 401
    assert serving.ask("/metrics", key=None)[0] == 401


def test_it_is_seen_at_work_while_no_answer_has_ended(serving: Engine) -> None:
    """Its count of tokens stands still until then."""
    before = adapter.parse_metrics(serving.ask("/metrics")[1])
    asking = threading.Thread(target=serving.ask, args=("/v1/chat/completions", chat(max_tokens=150, ignore_eos=True)))
    asking.start()

    def at_work() -> bool:
        seen = adapter.parse_metrics(serving.ask("/metrics")[1])
        assert asking.is_alive(), "the answer ended before it was seen"
        assert seen.steps_total is not None
        assert before.steps_total is not None
        return seen.generation_tokens_total == before.generation_tokens_total and seen.steps_total > before.steps_total

    wait_until(at_work)
    asking.join(DEADLINE_SECONDS)


def test_its_metrics_are_understood(serving: Engine) -> None:
    before = adapter.parse_metrics(serving.ask("/metrics")[1])
    serving.ask("/v1/chat/completions", chat(max_tokens=5))
    after = adapter.parse_metrics(serving.ask("/metrics")[1])
    assert before.generation_tokens_total is not None
    assert after.generation_tokens_total == before.generation_tokens_total + 5
    assert after.requests_running == 0


def test_the_key_is_not_on_the_command_line(serving: Engine) -> None:
    assert KEY.encode() not in Path(f"/proc/{serving.handle.engine_pid}/cmdline").read_bytes()


def test_a_taken_port_is_diagnosed(runner: ProcessRunner, serving: Engine) -> None:
    second = Engine(runner, "second", MODEL, serving.port, {})
    assert second.wait_for_exit() == 1
    assert adapter.diagnose(second.log, 1).cause is Cause.PORT_BUSY
    assert serving.probe().status == 200


def test_sigterm_ends_it_with_0_even_while_it_streams(runner: ProcessRunner) -> None:
    engine = Engine(runner, "stopped", MODEL, free_port(), {})
    engine.wait_until_ready()
    request = urllib.request.Request(
        f"http://127.0.0.1:{engine.port}/v1/chat/completions",
        data=json.dumps(chat(stream=True, max_tokens=900, ignore_eos=True)).encode(),
        headers={"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"},
    )
    with urllib.request.urlopen(request, timeout=DEADLINE_SECONDS) as stream:
        stream.readline()
        seen = runner.stop(engine.handle)
    assert (seen.state, seen.exit_code, seen.pids) == (ProcessState.EXITED, 0, ())


def test_a_missing_model_is_diagnosed(runner: ProcessRunner, tmp_path: Path) -> None:
    engine = Engine(runner, "missing", tmp_path / "nothing.gguf", free_port(), {})
    assert engine.wait_for_exit() == 1
    found = adapter.diagnose(engine.log, 1)
    assert found.cause is Cause.MODEL_MISSING
    assert str(tmp_path / "nothing.gguf") in found.summary


def test_a_damaged_model_is_diagnosed(runner: ProcessRunner, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"GGUF" + b"\0" * 100_000)
    engine = Engine(runner, "damaged", damaged, free_port(), {})
    assert engine.wait_for_exit() == 1
    assert adapter.diagnose(engine.log, 1).cause is Cause.WRONG_QUANTIZATION


def test_a_flag_it_does_not_know_is_refused_before_it_starts(runner: ProcessRunner) -> None:
    with pytest.raises(InvalidOptions, match="does not know --numa"):
        Engine(runner, "bad-flag", MODEL, free_port(), {"extra_args": ["--numa", "isolate"]})


def test_a_flag_that_got_through_is_diagnosed() -> None:
    done = subprocess.run(
        [str(PYTHON), xllama_server.__file__, "--nonsense"], capture_output=True, text=True, check=False, timeout=60
    )
    assert adapter.diagnose(done.stdout + done.stderr, done.returncode).cause is Cause.BAD_FLAG


def test_every_option_of_the_adapter_is_taken(runner: ProcessRunner) -> None:
    options = {
        "batch_tokens": 256,
        "micro_batch_tokens": 128,
        "threads_batch": 2,
        "flash_attention": "on",
        "cache_type_k": "q8_0",
        "cache_type_v": "q8_0",
        "reasoning_format": "none",
        "extra_args": [
            "--temp",
            "0.5",
            "--top-k",
            "5",
            "--seed",
            "7",
            "--cache-ram",
            "64",
            "--swa-full",
            "--fit",
            "off",
        ],
    }
    engine = Engine(runner, "options", MODEL, free_port(), options)
    engine.wait_until_ready()
    assert engine.ask("/v1/chat/completions", chat())[0] == 200
    assert runner.stop(engine.handle).exit_code == 0


def test_embeddings_are_served_when_asked_for(runner: ProcessRunner) -> None:
    engine = Engine(runner, "embeddings", MODEL, free_port(), {"embeddings": True, "pooling": "mean"})
    engine.wait_until_ready()
    status, text = engine.ask("/v1/embeddings", {"model": "gemma-3-270m", "input": "hello"})
    assert status == 200
    assert len(json.loads(text)["data"][0]["embedding"]) > 100
    runner.stop(engine.handle)


def test_its_version_is_told() -> None:
    done = subprocess.run(
        [str(PYTHON), xllama_server.__file__, "--version"], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.startswith("version: xllamacpp 20")
