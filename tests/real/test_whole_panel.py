"""As a new user: install the starter, switch to Gemma, talk to it, switch away and back, break it, lose it."""

from __future__ import annotations

import json
import os
import signal
import threading
from typing import Any

import openai
import pytest

from tests.panel import Panel, wait_for
from tests.real.conftest import GEMMA

QUESTION: Any = [{"role": "user", "content": "Name three colours."}]


def succeeded(job: dict[str, Any]) -> dict[str, Any]:
    assert job["state"] == "succeeded", job
    return job


@pytest.fixture
def client(panel: Panel) -> Any:
    with openai.OpenAI(base_url=f"{panel.gateway_url}/v1", api_key=panel.key(), max_retries=0) as made:
        yield made


def test_the_starter_is_installed_and_a_second_install_finds_it_done(panel: Panel) -> None:
    (install,) = [i for i in panel.get("/installs")["items"] if i["name"] == "starter"]
    assert install["state"] == "ready"
    again = panel.manage("install", "starter", "--wait")
    assert again.returncode == 0, again.stderr
    assert "installed" in again.stdout


def test_gemma_answers_through_the_gateway_with_real_tokens(panel: Panel, client: openai.OpenAI) -> None:
    succeeded(panel.finished(panel.switch(GEMMA, reason="hello", exclusive=True)))
    (deployment,) = [d for d in panel.live() if d["profile"] == GEMMA]
    assert deployment["simulated"] is False
    loaded = [model.id for model in client.models.list() if model.model_extra["status"]["value"] == "loaded"]
    assert loaded == ["gemma-3-270m"]
    stream = client.chat.completions.create(
        model="gemma-3-270m",
        messages=QUESTION,
        max_tokens=24,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert len(text) > 10
    assert len([c for c in chunks if c.choices and c.choices[0].delta.content]) > 3  # piece by piece
    usage = chunks[-1].usage
    assert usage is not None
    assert 0 < usage.completion_tokens <= 24
    # Another prompt, another number of tokens: somebody counted what was really sent.
    short, long = (
        client.chat.completions.create(
            model="gemma-3-270m", messages=[{"role": "user", "content": "word " * times}], max_tokens=1
        ).usage
        for times in (5, 200)
    )
    assert short is not None
    assert long is not None
    assert 195 <= long.prompt_tokens - short.prompt_tokens <= 205


def test_the_command_line_switches_to_the_simulated_coder_and_back(panel: Panel, client: openai.OpenAI) -> None:
    succeeded(panel.finished(panel.switch(GEMMA)))
    there = panel.manage("switch", "qwen25-coder-32b-2xtp2", "--exclusive", "--wait", "--json")
    assert there.returncode == 0, there.stderr
    assert json.loads(there.stdout)["state"] == "succeeded"
    assert panel.serving() == ["qwen25-coder-32b-2xtp2"]
    assert len(panel.engines()) == 2  # two replicas, and Gemma is gone
    with pytest.raises(openai.NotFoundError, match="qwen2-5-coder-32b-instruct-awq"):  # it names what serves
        client.chat.completions.create(model="no-such-model", messages=QUESTION, max_tokens=4)
    answer = client.chat.completions.create(model="qwen2-5-coder-32b-instruct-awq", messages=QUESTION, max_tokens=8)
    assert answer.choices[0].message.content

    back = panel.manage("switch", GEMMA, "--exclusive", "--wait")
    assert back.returncode == 0, back.stderr
    assert panel.serving() == [GEMMA]
    assert len(panel.engines()) == 1
    assert client.completions.create(model="gemma-3-270m", prompt="The capital of France is", max_tokens=4)


def test_a_broken_gemma_fails_with_the_engines_own_words_and_the_old_one_returns(
    panel: Panel, client: openai.OpenAI
) -> None:
    succeeded(panel.finished(panel.switch(GEMMA)))
    gemma = panel.get(f"/profiles/{GEMMA}")["version"]
    body = {name: gemma[name] for name in ("model", "engine", "device", "served_name", "options")}
    body["options"] = {**body["options"], "extra_args": ["--mmproj", "/nowhere/projector.gguf"]}
    assert panel.api("/profiles", {"slug": "gemma-broken", "name": "Gemma, broken", **body}).status == 201

    job = panel.finished(panel.switch("gemma-broken"))
    assert job["state"] == "failed"
    result = job["result"]
    assert result["exit_code"] == 1
    assert result["cause"] == "model_missing"
    assert "/nowhere/projector.gguf" in " ".join(result["evidence"]), result
    assert "Brought back" in result["summary"]
    assert panel.serving() == [GEMMA]
    assert client.completions.create(model="gemma-3-270m", prompt="Hello", max_tokens=4).choices[0].text
    steps = {s["name"]: s["state"] for s in job["steps"]}
    assert steps["bring_back"] == "done", steps
    told = panel.manage("switch", "gemma-broken", "--wait")
    assert told.returncode == 1
    assert "did not start" in told.stderr
    assert "Traceback" not in told.stderr


def test_two_switches_at_the_same_moment_end_with_one_winner(panel: Panel) -> None:
    succeeded(panel.finished(panel.switch("one", exclusive=True)))
    jobs: dict[str, int] = {}
    gate = threading.Barrier(2)

    def wish(slug: str) -> None:
        gate.wait()
        jobs[slug] = panel.switch(slug)

    threads = [threading.Thread(target=wish, args=(slug,)) for slug in ("two", "qwen25-coder-32b-tp4")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first, last = sorted(jobs, key=lambda slug: jobs[slug])
    succeeded(panel.finished(jobs[last]))
    loser = panel.finished(jobs[first])
    assert (loser["state"], loser["superseded_by"]) == ("cancelled", jobs[last])
    assert panel.serving() == [last]


def test_an_engine_that_is_killed_is_started_again_and_the_next_request_waits_for_it(
    panel: Panel, client: openai.OpenAI
) -> None:
    succeeded(panel.finished(panel.switch(GEMMA, exclusive=True)))
    (deployment,) = panel.live()
    (engine,) = panel.engines()
    os.kill(engine.pid, signal.SIGKILL)

    def ended() -> dict[str, Any] | None:
        seen: dict[str, Any] = panel.get(f"/deployments/{deployment['id']}")
        return seen if seen["status"] == "failed" else None

    seen = wait_for("the deployment is failed", ended)
    assert "signal 9" in seen["status_reason"]

    def restarts() -> dict[str, Any] | None:  # a moment after it was found dead
        newest: dict[str, Any] = panel.get("/jobs?kind=switch")["items"][0]
        return newest if "restart 1 of 3" in newest["reason"] else None

    restart = wait_for("it is started again", restarts)
    succeeded(panel.finished(restart["id"]))
    assert client.completions.create(model="gemma-3-270m", prompt="Hello", max_tokens=4).choices[0].text
