"""The rig page: cards that live, one click, two people at once, and data that says when it is old."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable

from playwright.sync_api import Locator, Page, expect

from tests.e2e.conftest import Visitor
from tests.panel import Panel, stream, wait_for


def jobs_of(panel: Panel, slug: str) -> list[int]:
    return [j["id"] for j in panel.get("/jobs?kind=switch&limit=200")["items"] if j["profile"] == slug]


def stay(page: Page) -> None:
    """Leave a mark that a reload would wipe away."""
    page.evaluate("window.stayed = true")


def has_stayed(page: Page) -> bool:
    return bool(page.evaluate("window.stayed === true"))


def test_four_cards_are_live_and_follow_the_load(visit: Visitor, panel: Panel, serve: Callable[[str], None]) -> None:
    serve("quick")
    page = visit()
    page.goto("/")
    stay(page)
    expect(page.locator("#live-state")).to_have_text("live")
    cards = page.locator("article.gpu")
    expect(cards).to_have_count(4)
    expect(page.locator(".bridge")).to_have_count(2)
    power = cards.locator("[data-f=power]")
    expect(power).to_have_text([re.compile(r"^\d+ / \d+ W$")] * 4)
    before = power.all_inner_texts()
    body = {"model": "quick", "messages": [{"role": "user", "content": "Tell a story."}]}
    body |= {"max_tokens": 160, "ignore_eos": True}
    assert panel.gateway("/chat/completions", body).status == 200
    # Ten seconds of work in one call: the cards must have been busy in the line that is drawn of the last minute.
    for index in range(4):
        card = cards.nth(index)
        expect(card.locator("[data-f=memory]")).to_contain_text("GiB")
        expect(power.nth(index)).not_to_have_text(before[index])
        wait_for(f"GPU {index} was busy", lambda card=card: len(heights(card)) > 1)  # type: ignore[misc]
    assert has_stayed(page)


def heights(card: Locator) -> set[float]:
    """Of the points of its line."""
    path = card.locator("svg.spark path").get_attribute("d") or ""
    return {float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", path)}


def test_one_click_switches_and_the_page_follows_without_a_reload(
    visit: Visitor, panel: Panel, serve: Callable[[str], None]
) -> None:
    serve("quick")
    page = visit()
    page.goto("/")
    stay(page)
    serving = page.locator("#serving")
    # An answer of a moment ago is forgotten: nobody would be cut, so nothing is asked.
    expect(serving.locator(".facts > div", has_text="streams").locator("dd")).to_have_text("0")
    page.get_by_role("button", name="Switch to Qwen2.5 Coder 32B, two replicas").click()
    expect(serving.locator("progress")).to_be_visible()
    expect(serving).to_contain_text("Load the model")
    expect(serving).to_contain_text("Qwen2.5 Coder 32B, two replicas")
    expect(serving).to_contain_text("2×TP2")
    expect(serving).to_contain_text("Serving now")
    expect(serving).to_contain_text("simulated engine")
    expect(serving).not_to_contain_text("Quick one")
    for index in range(4):
        expect(page.locator("article.gpu").nth(index)).to_contain_text("Qwen2.5 Coder 32B, two replicas")
    expect(page.locator("#last-jobs li").first).to_contain_text("succeeded")
    assert has_stayed(page)
    assert panel.serving() == ["qwen25-coder-32b-2xtp2"]


def test_a_double_click_is_one_job(visit: Visitor, panel: Panel, serve: Callable[[str], None]) -> None:
    serve("quick")
    before = jobs_of(panel, "slow")
    page = visit()
    page.goto("/")
    page.get_by_role("button", name="Switch to Slow one").dblclick()
    expect(page.locator("#serving")).to_contain_text("Slow one")
    wait_for("slow serves", lambda: panel.serving() == ["slow"])
    assert len(jobs_of(panel, "slow")) == len(before) + 1


def test_two_people_see_the_same_and_the_later_wish_wins(
    visit: Visitor, panel: Panel, serve: Callable[[str], None]
) -> None:
    serve("quick")
    alice, olivia = visit("alice"), visit("olivia")
    for page in (alice, olivia):
        page.goto("/")
        stay(page)
    alice.get_by_role("button", name="Switch to Slow one").click()
    expect(olivia.locator("#serving")).to_contain_text("Slow one")
    slow = jobs_of(panel, "slow")[0]
    panel.step_running(slow, "ready")
    olivia.get_by_role("button", name="Switch to Fragile one").click()
    for page in (alice, olivia):
        expect(page.locator("#serving")).to_contain_text("Fragile one")
        expect(page.locator("#serving")).to_contain_text("Serving now")
        expect(page.locator("#serving h1")).to_have_count(1)
        assert has_stayed(page)
    job = panel.finished(slow)
    assert job["state"] == "cancelled"
    assert job["superseded_by"] == jobs_of(panel, "fragile")[0]
    assert panel.serving() == ["fragile"]
    assert len(panel.engines()) == 1


def test_a_running_switch_is_cancelled_from_its_page(
    visit: Visitor, panel: Panel, serve: Callable[[str], None]
) -> None:
    serve("quick")
    page = visit()
    page.goto("/")
    page.get_by_role("button", name="Switch to Slow one").click()
    page.locator("#serving").get_by_role("link", name="Follow").click()
    page.wait_for_url(re.compile(r"/jobs/\d+/$"))
    stay(page)
    expect(page.locator("ol.steps")).to_contain_text("Load the model")
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("cancelled", ignore_case=True)
    assert has_stayed(page)
    wait_for("quick serves again", lambda: panel.serving() == ["quick"])


def test_a_switch_that_would_cut_an_answer_asks_first_and_no_means_no(
    visit: Visitor, panel: Panel, serve: Callable[[str], None]
) -> None:
    serve("quick")
    before = jobs_of(panel, "fragile")
    page = visit()
    page.goto("/")
    body = {"model": "quick", "messages": [{"role": "user", "content": "Tell a story."}]}
    answer = stream(
        f"{panel.gateway_url}/v1/chat/completions", panel.key(), body | {"max_tokens": 900, "ignore_eos": True}
    )
    next(answer)
    serving = page.locator("#serving")
    expect(serving.locator(".facts > div", has_text="streams").locator("dd")).to_have_text("1")
    switch = page.get_by_role("button", name="Switch to Fragile one")
    switch.click()
    dialog = page.get_by_role("dialog", name="Switch to Fragile one?")
    expect(dialog).to_contain_text("This stops 1 running answer of Quick one")
    dialog.get_by_role("button", name="Keep as it is").click()
    expect(dialog).to_have_count(0)
    assert jobs_of(panel, "fragile") == before
    switch.click()
    dialog.get_by_role("button", name="Switch", exact=True).click()
    expect(dialog).to_have_count(0)
    expect(serving).to_contain_text("Fragile one")
    answer.close()
    wait_for("fragile serves", lambda: panel.serving() == ["fragile"])


def test_stop_asks_nothing_when_nobody_is_cut(visit: Visitor, panel: Panel, serve: Callable[[str], None]) -> None:
    serve("fragile")
    page = visit()
    page.goto("/")
    page.locator("#serving").get_by_role("button", name="Stop").click()
    expect(page.locator("#serving")).to_contain_text("Nothing serves")
    answer = panel.gateway(
        "/chat/completions", {"model": "fragile", "messages": [{"role": "user", "content": "Hello"}]}
    )
    assert answer.status == 403  # it is not marked for members, so no request brings it back
    assert "not marked" in answer.json["error"]["message"]
    assert panel.engines() == []


def test_readings_that_stop_say_how_old_they_are_and_recover(visit: Visitor, panel: Panel) -> None:
    page = visit()
    page.goto("/")
    stay(page)
    state = page.locator("#live-state")
    expect(state).to_have_text("live")
    panel.signal("sampler", signal.SIGSTOP)
    try:
        expect(state).to_contain_text(re.compile(r"last seen \d+ s ago"))
        expect(page.locator("#cards")).to_have_class(re.compile("stale"))
        late = visit("bob")
        late.goto("/")
        expect(late.locator("#live-state")).to_contain_text("last seen")
    finally:
        panel.signal("sampler", signal.SIGCONT)
    for each in (page, late):
        expect(each.locator("#live-state")).to_have_text("live")
    assert has_stayed(page)
