"""The history: a job page that follows live, the list with its filters, and the audit chain."""

from __future__ import annotations

import re
from collections.abc import Callable

from playwright.sync_api import expect

from tests.e2e.conftest import Visitor
from tests.panel import Panel


def test_a_job_page_follows_from_the_first_step_to_the_end(
    visit: Visitor, panel: Panel, serve: Callable[[str], None]
) -> None:
    serve("quick")
    page = visit("bob")
    job = panel.switch("slow", reason="the evening run")
    page.goto(f"/jobs/{job}/")
    page.evaluate("window.stayed = true")
    expect(page.locator(f"#job-{job}-head progress")).to_be_visible()
    expect(page.locator(f"#job-{job}-log pre", has_text="Loading safetensors")).to_be_visible()
    expect(page.locator(f"#job-{job}-head .strip.ok")).to_contain_text("Slow one")
    steps = page.locator(f"#job-{job}-steps ol.steps li")
    took = [re.compile("s")] * len(panel.job(job)["steps"])
    expect(steps).to_have_count(len(took))
    expect(steps.locator("small.nowrap")).to_have_text(took)  # each says how long
    main = page.get_by_role("main")
    for text in ("the evening run", "alice", "version_id", "Send traffic to it"):
        expect(main).to_contain_text(text)
    assert page.evaluate("window.stayed === true")


def test_the_list_finds_a_job_by_kind_and_state(visit: Visitor, panel: Panel, serve: Callable[[str], None]) -> None:
    serve("quick")
    page = visit("charlie")
    page.goto("/jobs/")
    page.get_by_label("State").select_option("succeeded")
    page.get_by_label("Kind").select_option("switch")
    page.get_by_role("button", name="Filter").click()
    page.wait_for_url(re.compile("state=succeeded"))  # else the rows may be those of before
    rows = page.locator("table tbody tr")
    expect(rows.first).to_contain_text("Quick one")
    expected = panel.get("/jobs?kind=switch&state=succeeded&limit=1")["count"]
    assert expected >= 1
    expect(page.get_by_role("main")).to_contain_text(str(expected)) if expected > 25 else None
    expect(rows.filter(has_text=re.compile("failed"))).to_have_count(0)


def test_what_was_done_is_in_the_audit_chain_and_it_holds(
    visit: Visitor, panel: Panel, serve: Callable[[str], None]
) -> None:
    serve("quick")
    page = visit()
    page.goto("/audit/")
    expect(page.get_by_role("row", name="job.succeeded").first).to_contain_text("Quick one")
    expect(page.get_by_role("row", name="job.switch").first).to_contain_text("alice")
    whole = panel.manage("audit", "verify")
    assert whole.returncode == 0, whole.stderr
