"""Real Open WebUI, started as ``docs/gateway.md`` says, beside a real panel: for the nightly run.

It is installed into a folder of its own (some 650 MB); ``RIGPANEL_TEST_OPEN_WEBUI`` names one that is there already.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect, sync_playwright

from tests.e2e.conftest import ARGUMENTS, ARTIFACTS, CHROMIUM
from tests.panel import OWNER, PASSWORD, REPOSITORY, Answer, Panel, ask, free_ports, wait_for
from tests.real.conftest import GEMMA

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(not (3, 11) <= sys.version_info < (3, 13), reason="Open WebUI runs on Python 3.11 and 3.12"),
]
VERSION = "0.12.4"
START_SECONDS = 300.0
ANSWER_SECONDS = 300.0
BOB, CAROL = "bob@lab.example", "carol@lab.example"
HELLO: list[dict[str, str]] = [{"role": "user", "content": "Name two colours."}]
# Beside what the documentation says: nothing from outside, an administrator without a form, and an end of answers.
QUIET = {
    "USE_SLIM_DOCKER": "true",
    "OFFLINE_MODE": "true",
    "HF_HUB_OFFLINE": "1",
    "ENABLE_VERSION_UPDATE_CHECK": "false",
    "ANONYMIZED_TELEMETRY": "false",
    "DO_NOT_TRACK": "true",
    "SCARF_NO_ANALYTICS": "true",
    "ENABLE_SIGNUP": "false",
    "DEFAULT_MODEL_PARAMS": '{"max_tokens": 8}',
    "WEBUI_SECRET_KEY": "a-secret-of-this-test-alone-0123456789",
    "WEBUI_ADMIN_EMAIL": OWNER,
    "WEBUI_ADMIN_PASSWORD": PASSWORD,
    "WEBUI_ADMIN_NAME": "Alice",
}


def documented() -> dict[str, str]:
    """The settings as they stand in the documentation, to be copied."""
    text = (REPOSITORY / "docs" / "gateway.md").read_text()
    block = re.search(r"^ENABLE_OLLAMA_API=.*?(?=^```)", text, re.DOTALL | re.MULTILINE)
    assert block is not None
    return dict(line.split("=", 1) for line in block[0].strip().splitlines())


class OpenWebUI:
    def __init__(self, program: Path, data: Path, settings: dict[str, str]) -> None:
        (port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{port}"
        self.log = data / "open-webui.log"
        self._tokens: dict[str, str] = {}
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("RIGPANEL_", "DJANGO_", "OPENAI_"))}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [program, "serve", "--host", "127.0.0.1", "--port", str(port)],
                cwd=data,
                env={**inherited, **QUIET, **settings, "DATA_DIR": str(data), "WEBUI_URL": self.url},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()[-4000:]
        return ask(f"{self.url}/ready").status == 200

    def api(self, path: str, body: Any = None, *, email: str = OWNER) -> Answer:
        return ask(f"{self.url}{path}", body, key=self._tokens[email], seconds=ANSWER_SECONDS)

    def people(self, *emails: str) -> None:
        """Its administrator signs in and makes accounts for the others."""
        signed_in = ask(f"{self.url}/api/v1/auths/signin", {"email": OWNER, "password": PASSWORD})
        self._tokens[OWNER] = signed_in.json["token"]
        for email in emails:
            who = {"name": email.partition("@")[0], "email": email, "password": PASSWORD, "role": "user"}
            added = self.api("/api/v1/auths/add", who)
            assert added.status == 200, added.text
            self._tokens[email] = added.json["token"]

    def loaded(self, email: str = OWNER) -> dict[str, bool]:
        """What the menu shows somebody: each model, and whether it is marked as loaded."""
        return {model["id"]: model["loaded"] for model in self.api("/api/models", email=email).json["data"]}

    def chat(self, email: str, model: str) -> dict[str, Any]:
        answer = self.api("/api/chat/completions", {"model": model, "messages": HELLO, "max_tokens": 8}, email=email)
        assert answer.status == 200, answer.text
        whole: dict[str, Any] = answer.json
        assert whole["choices"][0]["message"]["content"]
        return whole

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its wheel with what the wheel itself lists for the slim image: no torch, no local embedding models."""
    if given := os.environ.get("RIGPANEL_TEST_OPEN_WEBUI"):
        return Path(given) / "bin" / "open-webui"
    folder = tmp_path_factory.mktemp("open-webui")

    def run(*arguments: str | Path) -> None:
        subprocess.run(arguments, check=True, cwd=folder, stdin=subprocess.DEVNULL, timeout=900)

    pip = folder / "venv" / "bin" / "pip"
    run(sys.executable, "-m", "venv", folder / "venv")
    run(pip, "install", "--quiet", "uv")
    run(pip, "download", "--quiet", "--no-deps", "--dest", folder, f"open-webui=={VERSION}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (folder / "slim.txt").write_bytes(archive.read("requirements-slim.txt"))
    uv = (folder / "venv" / "bin" / "uv", "pip", "install", "--quiet", "--python", folder / "venv" / "bin" / "python")
    run(*uv, "--no-deps", wheel)
    run(*uv, "--requirement", folder / "slim.txt")
    return folder / "venv" / "bin" / "open-webui"


@pytest.fixture(scope="module")
def open_webui(panel: Panel, program: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenWebUI]:
    panel.people({BOB: "member"})
    made = panel.manage("createkey", OWNER, "--name", "Open WebUI", "--open-webui")
    assert made.returncode == 0, made.stderr
    key, secret = made.stdout.split()[-2:]
    settings = documented() | {
        "OPENAI_API_BASE_URLS": f"{panel.gateway_url}/v1",
        "OPENAI_API_KEYS": key,
        "FORWARD_USER_INFO_HEADER_JWT_SECRET": secret,
    }
    running = OpenWebUI(program, tmp_path_factory.mktemp("open-webui-data"), settings)
    try:
        wait_for("Open WebUI is ready", running.ready, seconds=START_SECONDS)
        running.people(BOB, CAROL)
        yield running
    finally:
        running.stop()


@pytest.fixture
def gemma(panel: Panel) -> str:
    job = panel.finished(panel.switch(GEMMA, exclusive=True))
    assert job["state"] == "succeeded", job
    return "gemma-3-270m"


def used(panel: Panel) -> dict[str, tuple[int, int, int]]:
    """By the ledger: each person's requests, tokens in and tokens out."""
    items = panel.get("/usage?by=user")["items"]
    return {item["name"]: (item["requests"], item["tokens_in"], item["tokens_out"]) for item in items}


def test_the_ledger_names_whoever_asks_behind_the_shared_key(panel: Panel, open_webui: OpenWebUI, gemma: str) -> None:
    """Carol has an account there and none here: hers is on the account of the key's owner."""
    before = used(panel)
    told = {email: open_webui.chat(email, gemma)["usage"] for email in (OWNER, BOB, CAROL)}

    def grown(name: str, *emails: str) -> tuple[bool, Any]:
        had, has = before.get(name, (0, 0, 0)), used(panel).get(name, (0, 0, 0))
        spent = (
            len(emails),
            sum(told[email]["prompt_tokens"] for email in emails),
            sum(told[email]["completion_tokens"] for email in emails),
        )
        return tuple(new - old for new, old in zip(has, had, strict=True)) == spent, (had, has, spent)

    wait_for("all three are in the ledger", lambda: sum(v[0] for v in used(panel).values()) >= 3 + sum_of(before))
    for name, emails in (("alice", (OWNER, CAROL)), ("bob", (BOB,))):
        same, figures = grown(name, *emails)
        assert same, (name, figures)
    assert "carol" not in used(panel)


def sum_of(counted: dict[str, tuple[int, int, int]]) -> int:
    return sum(requests for requests, _, _ in counted.values())


def test_an_administrator_loads_and_unloads_from_its_menu(panel: Panel, open_webui: OpenWebUI, gemma: str) -> None:
    assert open_webui.loaded()[gemma] is True
    assert open_webui.loaded()["steady"] is False
    assert open_webui.api("/openai/models/0/load", {"model": "steady"}, email=BOB).status in (401, 403)
    done = open_webui.api("/openai/models/0/load", {"model": "steady"})
    assert (done.status, done.json) == (200, {"success": True})
    wait_for("it is shown as loaded", lambda: open_webui.loaded().get("steady") is True)
    assert open_webui.loaded(BOB) == open_webui.loaded(CAROL)
    assert open_webui.chat(BOB, "steady")["model"] == "steady"
    (job,) = panel.get("/jobs?kind=switch")["items"][:1]
    assert (job["state"], job["user"]) == ("succeeded", "alice"), job
    assert open_webui.api("/openai/models/0/unload", {"model": "steady"}).status == 200
    wait_for("it is not shown as loaded any more", lambda: open_webui.loaded().get("steady") is False)


def test_a_message_sent_while_models_are_switched_waits_and_is_answered(
    panel: Panel, open_webui: OpenWebUI, gemma: str
) -> None:
    job = panel.switch("one", exclusive=True)
    wait_for("it is on the menu, not loaded yet", lambda: open_webui.loaded(BOB).get("one") is False)
    assert open_webui.chat(BOB, "one")["model"] == "one"
    assert panel.finished(job)["state"] == "succeeded"
    shown = wait_for("only the new one is loaded", lambda: (s := open_webui.loaded()).get("one") and s)
    assert [model for model, loaded in shown.items() if loaded] == ["one"]


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_bob_chats_in_a_browser(panel: Panel, open_webui: OpenWebUI, gemma: str) -> None:
    before = used(panel).get("bob", (0, 0, 0))[0]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        page = browser.new_page()
        try:
            say_hello(page, open_webui, gemma)
        finally:
            ARTIFACTS.mkdir(exist_ok=True)
            page.screenshot(path=ARTIFACTS / "open-webui.png")
            browser.close()
    wait_for("one message is one request", lambda: used(panel)["bob"][0] == before + 1)


def say_hello(page: Page, open_webui: OpenWebUI, model: str) -> None:
    page.set_default_timeout(60_000)
    page.goto(f"{open_webui.url}/auth")
    page.get_by_label("Email").fill(BOB)
    page.locator("input[type=password]").fill(PASSWORD)
    page.get_by_role("button", name="Sign in").click()
    page.locator("#chat-input").wait_for()
    page.goto(f"{open_webui.url}/?model={model}")
    page.locator("#chat-input").click()
    page.keyboard.type("Name two colours.")
    page.keyboard.press("Enter")
    expect(page.locator(".chat-assistant").last).to_contain_text(re.compile(r"\w"), timeout=ANSWER_SECONDS * 1000)
    page.locator("#model-selector-model-button").click()
    expect(page.get_by_placeholder("Search a model")).to_be_visible()
    page.wait_for_timeout(500)  # for the screenshot: the menu comes gently
