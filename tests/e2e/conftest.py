"""One real panel and one real Chromium; every page that a test opens must be free of errors and foreign hosts."""

from __future__ import annotations

import re
import shutil
import urllib.parse
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Playwright, Request, expect, sync_playwright

from tests.panel import OWNER, PASSWORD, Panel, wait_for

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
ARTIFACTS = Path(__file__).resolve().parents[2] / "test-artifacts"
LOOK_SECONDS = 60.0
ROLES = {"olivia": "operator", "bob": "member", "charlie": "viewer"}
FAILED = pytest.StashKey[bool]()

expect.set_options(timeout=LOOK_SECONDS * 1000)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        item.stash[FAILED] = True
    return report


def profile(slug: str, name: str, **options: Any) -> dict[str, Any]:
    """A profile over all four cards whose engine does what ``options`` say."""
    return {
        "slug": slug,
        "name": name,
        "model": "gpt-oss-20b",
        "engine": "simulated",
        "tensor_parallel_size": 4,
        "served_name": slug,
        "options": options,
    }


@pytest.fixture(scope="session")
def panel() -> Iterator[Panel]:
    """Ready, with three profiles that load in no time, in a while, and not at all."""
    running = Panel().start()
    try:
        for body in (
            profile("quick", "Quick one", load_seconds=0.5) | {"members_may_switch": True},
            profile("slow", "Slow one", load_seconds=8),
            profile("fragile", "Fragile one", load_seconds=0.5),
        ):
            answer = running.api("/profiles", body)
            assert answer.status == 201, answer.text
        yield running
    finally:
        running.stop()


@pytest.fixture(autouse=True)
def _calm(panel: Panel) -> None:
    """A test begins when the jobs of the one before it have ended."""
    for job in panel.get("/jobs?limit=50")["items"]:
        if job["finished_at"] is None:
            panel.finished(job["id"])


# The sync driver keeps an event loop in this thread while it runs, so it must not outlive this package's tests.
@pytest.fixture(scope="package")
def playwright() -> Iterator[Playwright]:
    if CHROMIUM is None:
        pytest.skip("needs Chromium on the PATH (Debian: apt install chromium)")
    with sync_playwright() as driver:
        yield driver


@pytest.fixture(scope="package")
def chromium(playwright: Playwright) -> Iterator[Browser]:
    browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
    yield browser
    browser.close()


class Visitor:
    """Opens browsers of one test, each with its own cookies, and notes what must not happen in them."""

    def __init__(self, chromium: Browser, panel: Panel, cookies: dict[str, Any]) -> None:
        self.chromium, self.panel, self.cookies = chromium, panel, cookies
        self.pages: list[Page] = []
        self.problems: list[str] = []

    def __call__(self, name: str | None = "alice", *, url: str = "", **options: Any) -> Page:
        """A page in a browser where ``name`` is signed in (None: nobody)."""
        if name is not None:
            options["storage_state"] = self._signed_in(name)
        return self._open(url or self.panel.url, options)

    def forgive(self, pattern: str) -> None:
        """For what a test provokes itself; that it happened is then demanded."""
        rest = [p for p in self.problems if not re.search(pattern, p)]
        assert len(rest) < len(self.problems), f"nothing to forgive that matches {pattern!r}"
        self.problems = rest

    def _open(self, url: str, options: dict[str, Any]) -> Page:
        context = self.chromium.new_context(
            **{"base_url": url, "viewport": {"width": 1280, "height": 900}, "reduced_motion": "reduce", **options}
        )
        context.set_default_timeout(LOOK_SECONDS * 1000)
        page = context.new_page()
        page.on("console", self._note_console)
        page.on("response", lambda r: self.problems.append(f"{r.status} {r.url}") if r.status >= 400 else None)
        page.on("pageerror", lambda error: self.problems.append(f"script: {error}"))
        page.on("dialog", lambda dialog: (self.problems.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: self._check_host(request, url))
        page.on("websocket", lambda socket: self._check_url(socket.url, url))
        self.pages.append(page)
        return page

    def _note_console(self, message: ConsoleMessage) -> None:
        # A refused request is noted with its address by its response; this line has none.
        if message.type == "error" and "Failed to load resource" not in message.text:
            self.problems.append(f"console: {message.text}")

    def _check_host(self, request: Request, home: str) -> None:
        self._check_url(request.url, home)

    def _check_url(self, url: str, home: str) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme in ("http", "https", "ws", "wss") and parts.netloc != urllib.parse.urlsplit(home).netloc:
            self.problems.append(f"foreign host: {url}")

    def _signed_in(self, name: str) -> Any:
        if name not in self.cookies:
            page = self._open(self.panel.url, {})
            if name == "alice":
                sign_in(page, OWNER)
            else:
                answer = self.panel.api("/members", {"email": f"{name}@lab.example", "role": ROLES[name]})
                assert answer.status == 201, answer.text
                join(page, answer.json["link"], name.title())
            self.cookies[name] = page.context.storage_state()
        return self.cookies[name]


def sign_in(page: Page, email: str, password: str = PASSWORD) -> None:
    page.goto("/accounts/login/")
    page.get_by_label("Email").fill(email)
    page.get_by_label("Password").fill(password)
    page.get_by_role("button", name="Sign in").click()
    expect(page.locator("#serving")).to_be_visible()


def join(page: Page, link: str, name: str, email: str = "") -> None:
    """Follow an invitation or set-up link; ends signed in."""
    page.goto(link)
    if email:
        page.get_by_label("Email").fill(email)
    page.get_by_label("Name").fill(name)
    page.get_by_label("Password", exact=True).fill(PASSWORD)
    page.get_by_label("The same password again").fill(PASSWORD)
    page.locator("main button[type=submit]").click()
    page.wait_for_url(re.compile("^https?://[^/]+/$"))  # the link itself ends with a slash, too


@pytest.fixture(scope="package")
def _cookies() -> dict[str, Any]:
    return {}


@pytest.fixture
def visit(
    chromium: Browser, panel: Panel, _cookies: dict[str, Any], request: pytest.FixtureRequest
) -> Iterator[Visitor]:
    visitor = Visitor(chromium, panel, _cookies)
    yield visitor
    if request.node.stash.get(FAILED, False):
        ARTIFACTS.mkdir(exist_ok=True)
        for number, page in enumerate(visitor.pages):
            page.screenshot(path=ARTIFACTS / f"{request.node.name}-{number}.png", full_page=True)
    for page in visitor.pages:
        page.context.close()
    assert not visitor.problems, "\n".join(visitor.problems)


@pytest.fixture
def serve(panel: Panel) -> Callable[[str], None]:
    """``serve("quick")``: it serves when this returns."""

    def switched(slug: str) -> None:
        job = panel.finished(panel.switch(slug))
        assert job["state"] == "succeeded", job
        wait_for(f"{slug} serves", lambda: slug in panel.serving())

    return switched
