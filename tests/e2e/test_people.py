"""Signing in, the set-up link, invitations, what each role sees, and a key that works."""

from __future__ import annotations

import re
from collections.abc import Callable

import openai
from playwright.sync_api import Browser, expect

from tests.e2e.conftest import Visitor, join, sign_in
from tests.panel import OWNER, PASSWORD, Panel


def test_the_owner_signs_in_and_a_wrong_password_gets_a_sentence(visit: Visitor) -> None:
    page = visit(None)
    page.goto("/jobs/")
    expect(page).to_have_url(re.compile("/accounts/login/"))
    page.get_by_label("Email").fill(OWNER)
    page.get_by_label("Password").fill("not-the-password")
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("alert")).to_contain_text("password")
    expect(page.get_by_label("Email")).to_have_value(OWNER)
    visit.forgive("^422 .*/accounts/login/")
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_role("button", name="Sign in").click()
    expect(page).to_have_url(re.compile("/jobs/$"))


def test_signing_out_ends_the_session_everywhere_it_shows(visit: Visitor) -> None:
    page = visit(None)
    sign_in(page, OWNER)
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_role("button", name="Sign in")).to_be_visible()
    page.goto("/team/")
    expect(page).to_have_url(re.compile("/accounts/login/"))


def test_without_an_owner_the_printed_link_makes_one_once(chromium: Browser, visit: Visitor) -> None:
    fresh = Panel(owner=False).start()
    try:
        link = fresh.setup_link()
        first = visit(None, url=fresh.url)
        join(first, link, "Alice", "alice@new.example")
        expect(first.locator("#serving")).to_contain_text("Nothing serves")
        expect(first.locator(".side .foot")).to_contain_text("owner")
        second = visit(None, url=fresh.url)
        second.goto(link)
        expect(second.get_by_role("heading", level=1)).to_contain_text("no longer works")
        visit.forgive("^(404|410) .*/join/")
        for page in (first, second):
            page.context.close()
            visit.pages.remove(page)
    finally:
        fresh.stop()


def test_a_member_joins_by_link_and_sees_what_a_member_may(visit: Visitor, serve: Callable[[str], None]) -> None:
    serve("fragile")
    owner = visit()
    owner.goto("/team/")
    owner.get_by_label("Email").fill("dora@lab.example")
    owner.get_by_role("combobox", name="Role", exact=True).select_option("member")
    owner.get_by_role("button", name="Make a link").click()
    link = owner.get_by_role("button", name="Copy link").get_attribute("data-copy")
    assert link

    dora = visit(None)
    join(dora, link, "Dora")
    expect(dora.locator(".side .foot")).to_contain_text("dora@lab.example")
    # Marked for members, and not marked.
    expect(dora.get_by_role("button", name="Switch to Quick one")).to_be_visible()
    expect(dora.get_by_role("button", name="Switch to Slow one")).to_have_count(0)
    expect(dora.locator("#serving button", has_text="Stop")).to_have_count(0)
    assert dora.goto("/settings/").status == 403
    expect(dora.get_by_role("main")).to_contain_text("owner")
    visit.forgive("^403 .*/settings/")

    owner.goto("/team/")
    expect(owner.get_by_role("region", name="People").get_by_role("table")).to_contain_text("dora@lab.example")
    spent = visit(None)
    spent.goto(link)
    expect(spent.get_by_role("heading", level=1)).to_contain_text("no longer works")
    visit.forgive("^(404|410) .*/join/")


def test_a_viewer_sees_everything_and_can_press_nothing(visit: Visitor, serve: Callable[[str], None]) -> None:
    serve("quick")
    page = visit("charlie")
    for path in ("/", "/jobs/", "/profiles/", "/profiles/quick/", "/deployments/", "/models/", "/verify/"):
        assert page.goto(path).status == 200
        for form in page.locator("main form[method=post]").all():
            raise AssertionError(f"{path} offers a viewer {form.inner_text()!r}")
    page.goto("/")
    expect(page.locator("#serving")).to_contain_text("Quick one")
    expect(page.locator("article.gpu")).to_have_count(4)
    page.goto("/me/")
    expect(page.get_by_role("button", name="Make a key")).to_have_count(0)


def test_a_key_made_on_the_page_streams_through_the_gateway(
    visit: Visitor, panel: Panel, serve: Callable[[str], None]
) -> None:
    serve("quick")
    page = visit("bob", permissions=["clipboard-read", "clipboard-write"])
    page.goto("/me/")
    page.get_by_label("Name of the new key").fill("laptop")
    page.get_by_role("button", name="Make a key").click()
    page.get_by_role("region", name="Your new key").get_by_role("button", name="Copy key").click()
    expect(page.locator("#announcer")).to_have_text("Copied.")
    key = page.evaluate("navigator.clipboard.readText()")
    assert key.startswith("rp-")
    expect(page.locator("pre", has_text="curl")).to_contain_text(key)

    with openai.OpenAI(base_url=f"{panel.gateway_url}/v1", api_key=key) as client:
        assert "quick" in [model.id for model in client.models.list()]
        answer = client.chat.completions.create(
            model="quick", messages=[{"role": "user", "content": "Hello"}], max_tokens=12, stream=True
        )
        text = "".join(c.choices[0].delta.content or "" for c in answer if c.choices)
        assert len(text.split()) > 3

        page.goto("/me/")
        expect(page.get_by_role("main")).not_to_contain_text(key)  # shown once
        page.get_by_role("button", name="Revoke laptop").click()
        page.locator("#confirm-yes").click()
        keys = page.get_by_role("region", name="API keys")  # its use is a row of the page too, as soon as it is counted
        expect(keys.get_by_role("row", name="laptop")).to_contain_text("revoked")
        visit_refused(client)


def visit_refused(client: openai.OpenAI) -> None:
    from tests.panel import wait_for

    def refused() -> bool:
        try:
            client.models.list()
        except openai.AuthenticationError:
            return True
        return False

    wait_for("the revoked key is refused", refused)
