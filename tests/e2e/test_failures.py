"""A profile that does not come up, and what people read of it."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import expect

from tests.e2e.conftest import Visitor
from tests.panel import Panel


@pytest.fixture
def _mended(panel: Panel) -> Iterator[None]:
    """Whatever a test wrote into the profile, the next one finds it in order."""
    yield
    answer = panel.api("/profiles/fragile", {"options": {"load_seconds": 0.5}}, method="PATCH")
    assert answer.status == 200, answer.text


@pytest.mark.usefixtures("_mended")
def test_a_broken_profile_fails_and_the_old_one_returns(
    visit: Visitor, panel: Panel, serve: Callable[[str], None]
) -> None:
    serve("quick")
    page = visit()
    page.goto("/profiles/fragile/edit/")
    page.get_by_label("Options").fill("load_seconds = 0.5\nfail_cause = kv_cache_too_small")
    page.get_by_label("Note").fill("breaking it on purpose")
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_role("main")).to_contain_text("breaking it on purpose")

    page.goto("/")
    page.get_by_role("button", name="Switch to Fragile one").click()
    serving = page.locator("#serving")
    failure = serving.locator(".failure")
    expect(failure).to_contain_text("Fragile one did not start")
    expect(failure).to_contain_text("Suggestion")
    expect(serving).to_contain_text("Quick one")
    expect(serving).to_contain_text("Serving now")
    failure.get_by_text("What the engine said").click()
    expect(failure.locator("pre")).to_contain_text("KV cache")

    failure.get_by_role("link", name="See the whole story").click()
    page.wait_for_url(re.compile(r"/jobs/\d+/$"))
    expect(page.get_by_role("heading", level=1)).to_contain_text("failed", ignore_case=True)
    story = page.get_by_role("main")
    expect(story).to_contain_text("Bring the old model back")
    expect(story).to_contain_text("kv_cache_too_small")
    expect(story).to_contain_text("Loading safetensors checkpoint shards")  # the engine's own log is there
    assert panel.serving() == ["quick"]
    assert panel.gateway("/completions", {"model": "quick", "prompt": "Hello", "max_tokens": 3}).status == 200


def test_a_context_that_cannot_fit_is_told_and_refused_before_anything_is_stopped(
    visit: Visitor, panel: Panel, serve: Callable[[str], None]
) -> None:
    """The model's longest context is more than the cards leave: the list says so; who insists is told what would."""
    serve("quick")
    page = visit()
    page.goto("/profiles/mixtral-8x22b-tp4/edit/")
    page.get_by_label("Options").fill("max_model_len = 65536\ngpu_memory_utilization = 0.9")
    page.get_by_role("button", name="Save").click()
    page.wait_for_url(re.compile("/profiles/mixtral-8x22b-tp4/$"))  # it is saved
    page.goto("/")
    row = page.locator("#switch-to tr", has_text="Mixtral 8x22B")
    expect(row).to_contain_text("does not fit")
    expect(row.get_by_role("button")).to_have_count(0)

    job = panel.finished(panel.switch("mixtral-8x22b-tp4"))
    assert job["state"] == "failed"
    assert "65" in job["result"]["summary"], job["result"]
    assert job["result"]["suggestion"]
    assert job["steps"][0]["state"] == "failed"
    assert panel.serving() == ["quick"]


def test_options_that_no_engine_takes_stay_in_the_form_with_a_sentence(visit: Visitor) -> None:
    page = visit()
    page.goto("/profiles/fragile/edit/")
    page.get_by_label("Options").fill("max_model_length = 4096")
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_label("Options")).to_have_value("max_model_length = 4096")
    expect(page.get_by_role("main")).to_contain_text("max_model_len")
    visit.forgive("^422 .*/profiles/fragile/edit/")


def test_what_people_write_is_never_run(visit: Visitor, panel: Panel, serve: Callable[[str], None]) -> None:
    """Console errors, dialogs and foreign hosts fail every test here: an image that loaded would show up."""
    hostile = '"><img src=https://evil.example/x onerror=alert(1)><script>alert(2)</script>'
    body = {
        "slug": "hostile",
        "name": f"Hostile {hostile}",
        "description": hostile,
        "model": "gpt-oss-20b",
        "engine": "simulated",
        "tensor_parallel_size": 4,
        "options": {"load_seconds": 0.2, "fail_cause": "crashed"},
    }
    assert panel.api("/profiles", body).status in (201, 409)
    serve("quick")
    page = visit()
    page.goto("/")
    job = panel.finished(panel.switch("hostile", reason=hostile))
    assert job["state"] == "failed"
    expect(page.locator("#serving .failure")).to_contain_text("<script>alert(2)</script>")
    own = (f"/jobs/{job['id']}/", f"/deployments/{job['deployment']}/")
    for path in ("/jobs/", "/profiles/", "/profiles/hostile/", *own):
        page.goto(path)
        expect(page.get_by_role("main")).to_contain_text("onerror=alert(1)")
    assert panel.api("/profiles/hostile", method="DELETE").status == 204


def test_an_engine_that_is_killed_shows_as_failed_with_its_signal(
    visit: Visitor, panel: Panel, serve: Callable[[str], None]
) -> None:
    assert panel.api("/profiles/quick/restarts", {"restarts": 0}, method="PUT").status == 200
    serve("quick")
    page = visit()
    page.goto("/")
    expect(page.locator("#serving")).to_contain_text("Quick one")
    deployment = panel.live()[0]["id"]
    (engine,) = panel.engines()
    os.kill(engine.pid, signal.SIGKILL)
    expect(page.locator("#serving")).to_contain_text("Nothing serves")
    expect(page.locator("#shell-empty")).to_contain_text("killed by signal 9")
    assert panel.api("/profiles/quick/restarts", {"restarts": 3}, method="PUT").status == 200
    page.goto(f"/deployments/{deployment}/")
    expect(page.get_by_role("main")).to_contain_text("killed by signal 9")
    # It is marked for members, so whoever asks for it has it loaded again.
    answer = panel.gateway("/completions", {"model": "quick", "prompt": "Hello", "max_tokens": 3})
    assert answer.status == 200
    assert panel.live()[0]["id"] != deployment
