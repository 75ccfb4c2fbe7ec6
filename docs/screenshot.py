"""Makes docs/rig.png, the picture in the README: the rig page of a real panel with a busy simulated rig.

    .venv/bin/python docs/screenshot.py [--theme light] [--output docs/rig.png]

Starts a panel of its own, serves the two replicas of Qwen2.5 Coder, lets a few clients talk to it for a minute, and
photographs what a browser shows. Nothing in the picture is drawn for it.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from playwright.sync_api import sync_playwright

from tests.panel import OWNER, PASSWORD, Panel, stream

PROFILE, MODEL = "qwen25-coder-32b-2xtp2", "qwen2-5-coder-32b-instruct-awq"
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
CLIENTS = 6
BUSY_SECONDS = 45.0
BYTES_MAX = 300_000


def talk(panel: Panel, until: threading.Event, number: int) -> None:
    """One client: answers of different lengths, with pauses, as people cause them."""
    body: dict[str, Any] = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Explain NVLink. " * 600 * number}],
    }
    body |= {"max_tokens": 150 * number, "ignore_eos": True}
    while not until.wait(0.7 * number):
        for _ in stream(f"{panel.gateway_url}/v1/chat/completions", panel.key(), body):
            if until.is_set():
                return


def photograph(panel: Panel, output: Path, theme: str) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        page = browser.new_page(
            base_url=panel.url, viewport={"width": 1360, "height": 940}, color_scheme=theme, reduced_motion="reduce"
        )
        page.goto("/accounts/login/")
        page.get_by_label("Email").fill(OWNER)
        page.get_by_label("Password").fill(PASSWORD)
        page.get_by_role("button", name="Sign in").click()
        page.locator("#serving").wait_for()
        page.goto("/")  # without the greeting
        page.locator("#live-state", has_text="live").wait_for()
        time.sleep(BUSY_SECONDS)
        page.screenshot(path=output)
        browser.close()


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--theme", choices=("dark", "light"), default="dark")
    arguments.add_argument("--output", type=Path, default=Path(__file__).parent / "rig.png")
    options = arguments.parse_args()
    panel = Panel().start()
    done = threading.Event()
    clients = [threading.Thread(target=talk, args=(panel, done, n + 1), daemon=True) for n in range(CLIENTS)]
    try:
        for command in (("install", "starter", "--wait"), ("verify", "--wait")):
            panel.manage(*command)  # so that the history has something to tell
        for profile in ("mixtral-8x22b-tp4", PROFILE):
            job = panel.finished(panel.switch(profile))
            if job["state"] != "succeeded":
                raise SystemExit(f"{profile} does not serve: {job['result']}")
        panel.key()
        for client in clients:
            client.start()
        photograph(panel, options.output, options.theme)
    finally:
        done.set()
        for client in clients:
            if client.is_alive():
                client.join(30)
        panel.stop()
    size = options.output.stat().st_size
    if size > BYTES_MAX:
        raise SystemExit(f"{options.output} has {size} bytes, more than a README should carry.")


if __name__ == "__main__":
    main()
