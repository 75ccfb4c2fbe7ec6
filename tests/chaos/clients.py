"""People's programs at the gateway, all along: short questions, and answers that stream through whatever happens."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import urllib.request
from typing import TYPE_CHECKING

from tests.panel import ask

if TYPE_CHECKING:
    from tests.chaos.world import World

STREAM_TOKENS = 60  # a second and a half at the simulated engine's pace: a drain has something to wait for


class Clients(threading.Thread):
    """Ask for answers from every profile in turn, all along; ``wrong`` are answers that another model gave."""

    def __init__(self, world: World) -> None:
        super().__init__(daemon=True)
        self.world = world
        self.stopped = threading.Event()
        self.answered = 0
        self.wrong: list[str] = []
        self.names = [name for slug, name in world.served.items() if not slug.startswith("doomed")]

    def run(self) -> None:
        turn = 0
        while not self.stopped.wait(0.05):
            self.once(self.names[turn % len(self.names)])
            turn += 1

    def once(self, name: str) -> None:
        body = {"model": name, "prompt": "Hello", "max_tokens": 2}
        answer = ask(f"{self.world.panel.gateway_url}/v1/completions", body, key=self.world.key, seconds=3)
        if answer.status == 200:
            self.answered += 1
            with contextlib.suppress(ValueError, KeyError):
                self.judge(name, answer.json["model"])
        elif answer.status == 401 or (
            answer.status == 404 and "does not exist" in answer.text and "NotFoundError" in answer.text
        ):
            self.wrong.append(f"asked {name}: {answer.status} {answer.text[:120]}")

    def judge(self, asked: str, answered: str) -> None:
        if answered != asked:
            self.wrong.append(f"asked {asked}, answered {answered}")


class Streams(Clients):
    """The same with answers that take a while: whatever comes of one, all of it comes from the model that was asked.

    Asks only for what serves: a held request would outlive the round."""

    def once(self, name: str) -> None:
        if name not in self.world.serving_names():
            return
        body = {"model": name, "prompt": "Hello", "max_tokens": STREAM_TOKENS, "stream": True}
        request = urllib.request.Request(f"{self.world.panel.gateway_url}/v1/completions", json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        request.add_header("Authorization", f"Bearer {self.world.key}")
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
            self.read(name, urllib.request.urlopen(request, timeout=5))

    def read(self, name: str, answer: http.client.HTTPResponse) -> None:
        with answer:
            for line in answer:
                if line.startswith(b"data: {"):
                    self.judge_chunk(name, line)
                elif line.strip() == b"data: [DONE]":
                    self.answered += 1
                if self.stopped.is_set():
                    return

    def judge_chunk(self, name: str, line: bytes) -> None:
        chunk = json.loads(line[len(b"data: ") :])
        if "model" in chunk:
            self.judge(name, chunk["model"])
