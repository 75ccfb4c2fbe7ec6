"""The ledger of a whole panel is what its clients counted, whichever of its processes is killed under load."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from tests.panel import Panel, ask, wait_for

pytestmark = pytest.mark.processes
PROFILE, CLIENTS = "qwen25-coder-32b-tp4", 4


class Load:
    """Clients that ask one request after the other and count whole answers with the tokens these tell."""

    def __init__(self, panel: Panel, model: str) -> None:
        self.answered = 0
        self.tokens_out = 0
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._url, self._key = f"{panel.gateway_url}/v1/chat/completions", panel.key()
        self._body = {"model": model, "max_tokens": 4, "messages": [{"role": "user", "content": "Hello"}]}
        self._threads = [threading.Thread(target=self._run) for _ in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            answer = ask(self._url, self._body, key=self._key)
            if answer.status == 200:
                with self._lock:
                    self.answered += 1
                    self.tokens_out += answer.json["usage"]["completion_tokens"]
            else:
                self._stop.wait(0.1)

    def flows(self, more: int = 20) -> None:
        wanted = self.answered + more
        wait_for("answers go on", lambda: self.answered >= wanted)

    def end(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(150)


def total(panel: Panel) -> dict[str, int]:
    items: list[dict[str, Any]] = panel.get("/usage?by=day")["items"]
    return {name: sum(item[name] for item in items) for name in ("requests", "interrupted", "failed", "tokens_out")}


def whole_of(found: dict[str, int]) -> int:
    """Requests that were answered to their end; those that a kill cut are rows too."""
    return found["requests"] - found["interrupted"] - found["failed"]


def test_the_ledger_is_what_clients_counted_after_web_store_worker_and_gateway_were_killed() -> None:
    panel = Panel().start()
    try:
        job = panel.finished(panel.switch(PROFILE))
        assert job["state"] == "succeeded", job
        model = panel.live()[0]["served_name"]
        load = Load(panel, model)
        for name in ("web", "store", "control", "web", "store"):
            load.flows()
            panel.kill(name)
        load.flows()
        load.end()
        panel.wait_ready()
        wait_for("every answer is in the ledger", lambda: total(panel)["requests"] >= load.answered)
        assert total(panel) == {
            "requests": load.answered, "interrupted": 0, "failed": 0, "tokens_out": load.tokens_out,
        }  # fmt: skip
        before = load.answered
        load = Load(panel, model)
        for _ in range(2):
            load.flows()
            panel.kill("gateway")
        load.flows()
        load.end()
        answered = before + load.answered
        wait_for("every answer is in the ledger", lambda: whole_of(total(panel)) >= answered)
        # The dead processes' files are finished within some ticks.
        folder = panel.data / "usage"
        wait_for("only the living gateway's file is left", lambda: len(list(folder.glob("*.spool"))) == 1)
        found = total(panel)
        whole = whole_of(found)
        assert answered <= whole <= answered + 2 * CLIENTS, (answered, found)
        assert found["interrupted"] <= 2 * CLIENTS
    finally:
        panel.stop()
