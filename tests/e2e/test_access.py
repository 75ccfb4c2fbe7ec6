"""Pages for everybody: without JavaScript, on a phone, by keyboard, in both themes, with a screen reader."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import axe_core_python
import pytest
from playwright.sync_api import Page, expect

from tests.e2e.conftest import Visitor, sign_in
from tests.panel import OWNER, Panel, wait_for

AXE = Path(axe_core_python.__file__).parent / "axe.min.js"
PAGES = (
    "/",
    "/models/",
    "/models/new/",
    "/models/phi-4/",
    "/models/phi-4/edit/",
    "/profiles/",
    "/profiles/new/",
    "/profiles/recipe/",
    "/profiles/quick/",
    "/profiles/quick/edit/",
    "/deployments/",
    "/deployments/{deployment}/",
    "/policies/",
    "/jobs/",
    "/jobs/{job}/",
    "/jobs/{failed}/",
    "/verify/",
    "/verify/{verification}/",
    "/telemetry/",
    "/installs/",
    "/team/",
    "/me/",
    "/settings/",
    "/audit/",
    "/accounts/2fa/",
    "/accounts/password/change/",
    "/api/v1/docs",
)
SIGNED_OUT = ("/accounts/login/", "/accounts/password/reset/", "/join/no-such-link/")


@pytest.fixture(scope="module")
def story(panel: Panel) -> dict[str, Any]:
    """Something of everything to look at: a deployment that serves, jobs that went well and not, a verification."""
    broken = {"fail_cause": "out_of_memory", "load_seconds": 0.2}
    body = {"name": "Broken", "model": "phi-4", "engine": "simulated", "tensor_parallel_size": 2, "options": broken}
    made = panel.api("/profiles", {"slug": "broken", **body})
    assert made.status == 201, made.text
    job = panel.finished(panel.switch("quick"))
    failed = panel.finished(panel.switch("broken"))
    assert (job["state"], failed["state"]) == ("succeeded", "failed")
    checked = panel.manage("verify", "--wait")
    assert checked.returncode in (0, 1), checked.stderr
    return {"job": job["id"], "failed": failed["id"], "deployment": panel.live()[0]["id"], "verification": 1}


def overflow(page: Page) -> list[str]:
    """What is wider than the window and makes the page scroll sideways."""
    found: list[str] = page.evaluate(
        """() => {
          const root = document.documentElement;
          if (root.scrollWidth <= root.clientWidth) return [];
          return [...document.querySelectorAll("body *")]
            .filter((node) => node.getBoundingClientRect().right > root.clientWidth + 1)
            .map((node) => `${node.tagName}.${node.className} ${node.textContent.trim().slice(0, 40)}`).slice(0, 8)
            .concat([`${root.scrollWidth} of ${root.clientWidth}`]);
        }"""
    )
    return found


def violations(page: Page, rules: str = "") -> list[str]:
    """Serious and critical findings of axe, in words."""
    options = '{resultTypes: ["violations"]' + (f", runOnly: {rules}" if rules else "") + "}"
    found = page.evaluate(f"axe.run(document, {options})")
    return [
        f"{v['impact']} {v['id']}: {v['help']} at {[n['target'] for n in v['nodes']][:4]}"
        for v in found["violations"]
        if v["impact"] in ("serious", "critical")
    ]


def check_both_themes(page: Page) -> list[str]:
    """Everything in the light theme, and in the dark one what depends on colours."""
    page.evaluate("document.documentElement.dataset.theme = 'light'")
    found = [f"light: {v}" for v in violations(page)]
    page.evaluate("document.documentElement.dataset.theme = 'dark'")
    return found + [f"dark: {v}" for v in violations(page, '["color-contrast", "link-in-text-block"]')]


def test_axe_finds_nothing_serious_on_any_page_in_either_theme(visit: Visitor, story: dict[str, Any]) -> None:
    found: list[str] = []
    for name, paths in (("alice", PAGES), (None, SIGNED_OUT)):
        page = visit(name)
        page.add_init_script(path=AXE)
        for path in paths:
            page.goto(path.format(**story))
            found += [f"{path} {violation}" for violation in check_both_themes(page)]
    assert not found, "\n".join(found)
    visit.forgive("^(404|410) .*/join/")


def test_no_page_scrolls_sideways_on_a_phone(visit: Visitor, story: dict[str, Any]) -> None:
    page = visit(viewport={"width": 360, "height": 740})
    wide = {}
    for path in PAGES:
        page.goto(path.format(**story))
        if found := overflow(page):
            wide[path] = found
    assert not wide, "\n".join(f"{path}: {found}" for path, found in wide.items())


def test_a_page_has_one_heading_one_title_and_a_way_past_the_menu(visit: Visitor, story: dict[str, Any]) -> None:
    page = visit()
    titles: dict[str, list[str]] = {}
    for path in PAGES:
        page.goto(path.format(**story))
        expect(page.locator("main"), path).to_have_count(1)
        expect(page.get_by_role("heading", level=1).first, f"{path} has no heading").to_be_visible()
        titles.setdefault(page.title(), []).append(path)
    assert not {title: paths for title, paths in titles.items() if len(paths) > 1}
    page.goto("/")
    page.keyboard.press("Tab")
    expect(page.locator(":focus")).to_have_text("Skip to the content")
    page.keyboard.press("Enter")
    expect(page.locator("main")).to_be_focused()


def test_a_switch_by_keyboard_alone(visit: Visitor, panel: Panel, serve: Callable[[str], None]) -> None:
    serve("quick")
    page = visit()
    page.goto("/")
    target = page.get_by_role("button", name="Switch to Fragile one")
    wanted = target.get_attribute("id")
    for _ in range(120):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == wanted:
            break
    expect(target).to_be_focused()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none", "focus cannot be seen"
    page.keyboard.press("Enter")
    expect(page.locator("#serving")).to_contain_text("Fragile one")
    wait_for("fragile serves", lambda: panel.serving() == ["fragile"])
    # The page was redrawn around it: the keyboard must not have been thrown back to the top.
    expect(page.locator(f"#{wanted}")).to_have_text("serves now")
    expect(page.locator(":focus"), "the focus was lost when the page was redrawn").to_have_count(1)


def test_keys_are_listed_and_lead_somewhere(visit: Visitor) -> None:
    page = visit()
    page.goto("/")
    page.keyboard.press("?")
    expect(page.locator("#keys")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#keys")).to_be_hidden()
    page.keyboard.press("g")
    page.keyboard.press("j")
    page.wait_for_url(re.compile("/jobs/$"))  # and until the page listens to keys
    page.keyboard.press("/")
    expect(page.locator("form :focus")).to_have_count(1)


def test_without_javascript_one_signs_in_switches_and_reads_the_job(
    visit: Visitor, panel: Panel, serve: Callable[[str], None]
) -> None:
    serve("quick")
    page = visit(None, java_script_enabled=False)
    sign_in(page, OWNER)
    expect(page.locator("article.gpu [data-f=memory]").first).to_contain_text("GiB")
    page.get_by_role("button", name="Switch to Slow one").click()
    expect(page.locator("#serving")).to_contain_text("Slow one")
    page.locator("#serving").get_by_role("link", name="Follow").click()
    page.wait_for_url(re.compile(r"/jobs/\d+/$"))
    expect(page.get_by_role("heading", level=1)).to_contain_text("Switch to Slow one")

    def succeeded() -> bool:
        page.reload()
        return "succeeded" in page.get_by_role("heading", level=1).inner_text().lower()

    wait_for("the job page says succeeded", succeeded)
    page.goto("/")
    expect(page.locator("#serving")).to_contain_text("Slow one")
    for path in ("/jobs/", "/profiles/quick/edit/", "/me/", "/telemetry/", "/verify/"):
        assert page.goto(path).status == 200
        assert len(page.get_by_role("main").inner_text()) > 100


def test_the_theme_is_kept_and_does_not_flash(visit: Visitor) -> None:
    page = visit()
    page.goto("/")
    page.locator("#theme").get_by_role("button", name="dark").click()
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    page.goto("/jobs/")
    assert 'data-theme="dark"' in page.content()
    page.locator("#theme").get_by_role("button", name="auto").click()
    expect(page.locator("html")).not_to_have_attribute("data-theme", "dark")


def test_a_wrong_address_is_a_page_of_ours(visit: Visitor) -> None:
    page = visit()
    assert page.goto("/no/such/page/").status == 404
    expect(page.get_by_role("main")).not_to_be_empty()
    expect(page.locator("nav").first).to_be_visible()
    visit.forgive("^404 .*/no/such/page/")
