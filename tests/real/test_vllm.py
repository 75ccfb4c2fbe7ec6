"""Real vLLM on the CPU, launched by a whole panel: what a member would do, and what goes wrong.

The tests marked ``nightly`` start several engines each and take minutes; ``make nightly`` runs them.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import psutil
import pytest
from anthropic.types import MessageParam

from tests.panel import Panel, wait_for

REPOSITORY = Path(__file__).resolve().parents[2]
VLLM = Path(os.environ.get("RIGPANEL_TEST_VLLM", REPOSITORY / ".engines" / "vllm" / "bin" / "vllm"))
MODEL = Path(os.environ.get("RIGPANEL_TEST_TINY", REPOSITORY / ".engines" / "models" / "tiny-llama"))
# Imports alone take half a minute on two cores that do other things besides.
START_SECONDS = 600.0
EAGER = {"max_model_len": 512, "enforce_eager": True}

pytestmark = [
    pytest.mark.skipif(not (VLLM.exists() and MODEL.exists()), reason=f"needs {VLLM} and {MODEL}: make engines"),
    pytest.mark.xdist_group("vllm-panel"),
]


@pytest.fixture(scope="module")
def vllm_panel() -> Iterator[Panel]:
    """A panel that found vLLM, asked it for its version and flags, and has the tiny model in its catalogue."""
    running = Panel(RIGPANEL_VLLM=str(VLLM)).start()
    try:
        model = {
            "slug": "tiny-llama",
            "name": "Tiny Llama",
            "checkpoint": str(MODEL.resolve()),
            "hf_repo": "lab/tiny-llama",
            "attention_heads": 4,
            "kv_heads": 2,
            "max_context_tokens": 1024,
        }
        made = running.api("/models", model)
        assert made.status == 201, made.text
        wait_for("vLLM is found", lambda: any(i["engine"] == "vllm" for i in ready(running)), seconds=START_SECONDS)
        yield running
    finally:
        running.stop()


def ready(panel: Panel) -> list[dict[str, Any]]:
    return [i for i in panel.get("/installs")["items"] if i["state"] == "ready"]


def add_profile(panel: Panel, slug: str, options: dict[str, Any], **more: Any) -> None:
    body = {
        "slug": slug,
        "name": slug,
        "model": "tiny-llama",
        "engine": "vllm",
        "device": "cpu",
        "served_name": "tiny",
        "options": {**EAGER, **options},
        **more,
    }
    answer = panel.api("/profiles", body)
    assert answer.status == 201, answer.text


def switched(panel: Panel, slug: str) -> dict[str, Any]:
    return panel.finished(panel.switch(slug), seconds=START_SECONDS)


def chat(panel: Panel) -> dict[str, Any]:
    # Random weights may well say nothing: five tokens come for certain only past the end.
    question = [{"role": "user", "content": "hello"}]
    body = {"model": "tiny", "messages": question, "max_tokens": 5, "ignore_eos": True}
    answer = panel.gateway("/chat/completions", body)
    assert answer.status == 200, answer.text
    found: dict[str, Any] = answer.json
    return found


def speaks_anthropic(panel: Panel) -> None:
    """The official client by the gateway: a stream whose figures vLLM tells at its end, and the count before it."""
    with anthropic.Anthropic(base_url=panel.gateway_url, api_key=panel.key(), max_retries=0) as claude:
        question: list[MessageParam] = [{"role": "user", "content": "hello"}]
        counted = claude.messages.count_tokens(model="tiny", messages=question).input_tokens
        with claude.messages.stream(model="tiny", messages=question, max_tokens=5) as stream:
            said = stream.get_final_message()
        assert said.usage.input_tokens == counted > 0
        assert 1 <= said.usage.output_tokens <= 5  # random weights may well end early


def stopped(panel: Panel) -> dict[str, Any]:
    (deployment,) = panel.live()
    answer = panel.api(f"/deployments/{deployment['id']}/stop", {})
    assert answer.status == 202, answer.text
    return panel.finished(answer.json["id"])


def steps(job: dict[str, Any]) -> dict[str, str]:
    return {s["name"]: s["detail"] for s in job["steps"]}


def test_a_wrong_profile_is_refused_before_anything_starts(vllm_panel: Panel) -> None:
    (install,) = [i for i in ready(vllm_panel) if i["engine"] == "vllm"]
    assert install["version"].startswith("0.32")
    for options, words in (
        ({"swap_space": 4}, "no longer has --swap-space"),
        ({"max_model_length": 512}, "Did you mean max_model_len"),
        ({"middleware": "os.system"}, "load code"),
        ({"dtype": "fp4"}, "bfloat16"),
    ):
        body = {"slug": "wrong", "name": "wrong", "model": "tiny-llama", "engine": "vllm", "options": options}
        answer = vllm_panel.api("/profiles", body)
        assert answer.status == 422, answer.text
        assert words in answer.text
    uneven = {"slug": "wrong", "name": "wrong", "model": "tiny-llama", "engine": "vllm", "tensor_parallel_size": 3}
    assert "attention heads" in vllm_panel.api("/profiles", uneven).text


def test_a_context_too_long_is_diagnosed_its_suggestion_applied_and_the_model_talks(vllm_panel: Panel) -> None:
    """The failure, the click and the serving engine in one, for each start of vLLM costs half a minute."""
    add_profile(vllm_panel, "tiny-tp1", {"max_model_len": 4096, "enable_sleep_mode": True})
    failed = switched(vllm_panel, "tiny-tp1")
    assert failed["state"] == "failed", failed
    assert failed["result"]["cause"] == "bad_flag", failed
    assert failed["result"]["suggested_options"] == {"max_model_len": 1024}
    applied = vllm_panel.api(f"/jobs/{failed['id']}/suggestion", {})
    assert applied.status == 201, applied.text
    assert applied.json["version"]["options"]["max_model_len"] == 1024

    job = switched(vllm_panel, "tiny-tp1")
    assert job["state"] == "succeeded", job
    (deployment,) = vllm_panel.live()
    assert (deployment["simulated"], deployment["status"]) == (False, "ready")
    assert chat(vllm_panel)["usage"]["completion_tokens"] == 5
    speaks_anthropic(vllm_panel)
    end = stopped(vllm_panel)
    assert end["state"] == "succeeded", end
    assert "exit code 0" in steps(end)["stop"]
    assert not vllm_panel.engines()


# -- nightly -------------------------------------------------------------------------------------


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("slug", "options", "layout", "servers"),
    [
        ("tiny-tp2", {}, {"tensor_parallel_size": 2}, 1),
        ("tiny-dp2", {"data_parallel": True}, {"replicas": 2}, 1),
        ("tiny-two", {}, {"replicas": 2}, 2),
    ],
)
def test_layouts_of_two_serve_and_end_clean(
    vllm_panel: Panel, slug: str, options: dict[str, Any], layout: dict[str, int], servers: int
) -> None:
    add_profile(vllm_panel, slug, options, **layout)
    job = switched(vllm_panel, slug)
    assert job["state"] == "succeeded", job
    (deployment,) = vllm_panel.live()
    assert len(deployment["replicas"]) == servers  # addresses; behind one of them vLLM has several processes
    for _ in range(6):
        assert chat(vllm_panel)["usage"]["completion_tokens"] == 5
    end = stopped(vllm_panel)
    assert "exit code 0" in steps(end)["stop"]
    assert not vllm_panel.engines()


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("slug", "options", "cause", "suggested"),
    [
        (
            "kv-small",
            {"max_model_len": 4_000_000, "hf_overrides": {"max_position_embeddings": 4_000_000}},
            "kv_cache_too_small",
            {"max_model_len": 1048448},
        ),
        ("ram-small", {"kv_cache_memory_bytes": 100 << 30}, "kv_cache_too_small", None),
        ("wrong-quantization", {"quantization": "awq"}, "wrong_quantization", {"quantization": None}),
        ("no-template", {"chat_template": "/nowhere/template.jinja"}, "bad_flag", {"chat_template": None}),
        ("no-parser", {"reasoning_parser": "deepthought"}, "bad_flag", {"reasoning_parser": "none"}),
    ],
)
def test_a_broken_profile_is_diagnosed_after_its_start(
    vllm_panel: Panel, slug: str, options: dict[str, Any], cause: str, suggested: dict[str, Any] | None
) -> None:
    add_profile(vllm_panel, slug, options)
    job = switched(vllm_panel, slug)
    assert job["state"] == "failed", job
    assert job["result"]["cause"] == cause, job["result"]
    if suggested is not None:
        assert job["result"]["suggested_options"] == suggested
    assert job["result"]["evidence"]
    assert not vllm_panel.live()


@pytest.mark.nightly
def test_a_model_without_its_weights_is_diagnosed(vllm_panel: Panel, tmp_path: Path) -> None:
    for file in MODEL.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    hollow = {"slug": "hollow", "name": "Hollow", "checkpoint": str(tmp_path), "max_context_tokens": 1024}
    assert vllm_panel.api("/models", hollow).status == 201
    add_profile(vllm_panel, "hollow", {}, model="hollow")
    job = switched(vllm_panel, "hollow")
    assert (job["state"], job["result"]["cause"]) == ("failed", "model_missing"), job


@pytest.mark.nightly
def test_one_that_lost_its_worker_is_never_taken_for_one_that_was_stopped(vllm_panel: Panel) -> None:
    """kill -9 of a worker: /health says 200 for seconds more, then the server leaves, once with exit code 0."""
    add_profile(vllm_panel, "tiny-killed", {})
    assert vllm_panel.api("/profiles/tiny-killed/restarts", {"restarts": 0}, method="PUT").status in (200, 204)
    job = switched(vllm_panel, "tiny-killed")
    assert job["state"] == "succeeded", job
    (server,) = vllm_panel.engines()
    # By descent: vLLM's processes overwrite their command lines, and environments with them.
    below = psutil.Process(server.pid).children(recursive=True)
    workers = [p.pid for p in below if "VLLM::Worker" in " ".join(p.cmdline())]
    assert workers, below
    (deployment,) = vllm_panel.live()
    for pid in workers:
        os.kill(pid, signal.SIGKILL)

    def ended() -> dict[str, Any] | None:
        seen: dict[str, Any] = vllm_panel.get(f"/deployments/{deployment['id']}")
        return seen if seen["status"] == "failed" else None

    seen = wait_for("the deployment is failed", ended, seconds=START_SECONDS)
    assert "asked to stop" not in seen["status_reason"]
    assert not vllm_panel.engines()


@pytest.mark.nightly
def test_a_sleeper_is_laid_down_and_woken_at_scheduler_level(vllm_panel: Panel) -> None:
    """The CPU build frees nothing, but pauses and goes on: two of them share the one CPU slot in turn."""
    for slug in ("tiny-day", "tiny-night"):
        add_profile(vllm_panel, slug, {"enable_sleep_mode": True}, served_name=slug)
        job = switched(vllm_panel, slug)
        assert job["state"] == "succeeded", job
    states = {d["profile"]: d["status"] for d in vllm_panel.live()}
    assert states == {"tiny-day": "sleeping", "tiny-night": "ready"}
    back = switched(vllm_panel, "tiny-day")
    assert "awake after" in steps(back)["start"], back
    body = {"model": "tiny-day", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}
    assert vllm_panel.gateway("/chat/completions", body).status == 200
    for deployment in vllm_panel.live():
        answer = vllm_panel.api(f"/deployments/{deployment['id']}/stop", {})
        assert vllm_panel.finished(answer.json["id"])["state"] == "succeeded"
