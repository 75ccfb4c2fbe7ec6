"""``kill -9`` of everything there is, while a switch runs and answers stream: one right state each time."""

from __future__ import annotations

import itertools
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.panel import NAMES, Panel, command_line, stream, wait_for

TOKENS = 4000  # more than any test waits for, at twenty a second


class Listener(threading.Thread):
    """Reads one long streamed answer; ``heard`` is how many pieces came."""

    def __init__(self, base_url: str, key: str) -> None:
        super().__init__(daemon=True)
        self.base_url, self.key = base_url, key
        self.heard = 0
        self.ended: str | None = None
        self.given_up = False
        self.start()

    def run(self) -> None:
        body: dict[str, Any] = {"model": "steady", "messages": [{"role": "user", "content": "Go on."}]}
        body |= {"max_tokens": TOKENS, "ignore_eos": True}
        try:
            for _ in stream(f"{self.base_url}/v1/chat/completions", self.key, body):
                self.heard += 1
                if self.given_up:
                    break
            self.ended = "it came to its end"
        except Exception as error:
            self.ended = repr(error)

    def goes_on(self) -> None:
        """Asserts that pieces still come."""
        before = self.heard
        wait_for("another piece of the stream", lambda: self.ended or self.heard > before + 3)
        assert self.ended is None, self.ended

    def stop(self) -> None:
        self.given_up = True
        self.join(30)


def engine_door(panel: Panel, served_name: str) -> tuple[str, str]:
    """Address and key of a running engine, as only the machine's own user can read them."""
    (engine,) = [e for e in panel.engines() if served_name in command_line(e.pid)]
    words = command_line(engine.pid)
    environment = Path(f"/proc/{engine.pid}/environ").read_bytes().decode().split("\0")
    (secret,) = [w for w in environment if w.startswith("VLLM_API_KEY=")]
    return f"http://127.0.0.1:{words[words.index('--port') + 1]}", secret.partition("=")[2]


@pytest.fixture(scope="module")
def turn() -> Iterator[str]:
    """Switches go back and forth between two profiles, so each test has one to make."""
    return itertools.cycle(("one", "two"))


@pytest.fixture
def target(turn: Iterator[str]) -> str:
    return next(turn)


@pytest.fixture
def listeners(panel: Panel) -> Iterator[tuple[Listener, Listener]]:
    """Two answers under way: one through the gateway, one straight from the engine."""
    job = panel.finished(panel.switch("steady"))
    assert job["state"] == "succeeded", job
    through, direct = Listener(panel.gateway_url, panel.key()), Listener(*engine_door(panel, "steady"))
    through.goes_on()
    direct.goes_on()
    yield through, direct
    through.stop()
    direct.stop()


def all_is_well(panel: Panel, target: str) -> None:
    """The target serves, the steady one still does, and nothing else runs."""
    panel.wait_ready()
    assert panel.serving() == sorted((target, "steady"))
    assert len(panel.engines()) == 2
    shims = [s for s in panel.members() if "shim.py" in " ".join(command_line(s.pid))]
    assert len(shims) == 2
    for name in NAMES:
        assert panel.pid(name), f"{name} does not run"
    answer = panel.gateway("/completions", {"model": target, "prompt": "Hello", "max_tokens": 3})
    assert answer.status == 200, answer.text


@pytest.mark.parametrize("name", ["web", "control", "store", "sampler", "gateway"])
def test_killed_in_the_middle_of_a_switch(
    panel: Panel, listeners: tuple[Listener, Listener], target: str, name: str
) -> None:
    through, direct = listeners
    job = panel.switch(target)
    panel.step_running(job, "ready")
    panel.kill(name)
    panel.wait_ready()
    done = panel.finished(job)
    assert done["state"] == "succeeded", done
    all_is_well(panel, target)
    direct.goes_on()
    if name == "gateway":  # its own connections end with it; the next request finds another one
        wait_for("the stream through the killed gateway has ended", lambda: through.ended)
    else:
        through.goes_on()


@pytest.mark.parametrize("name", ["control", "store"])
def test_killed_while_the_old_model_is_brought_back(
    panel: Panel, listeners: tuple[Listener, Listener], target: str, name: str
) -> None:
    through, _ = listeners
    done = panel.finished(panel.switch(target))
    assert done["state"] == "succeeded", done
    job = panel.switch("doomed")
    panel.step_running(job, "bring_back")
    panel.kill(name)
    panel.wait_ready()
    done = panel.finished(job)
    assert done["state"] == "failed", done
    assert done["result"]["cause"] == "out_of_memory"
    assert "Brought back" in done["result"]["summary"]
    all_is_well(panel, target)
    through.goes_on()


def test_everything_at_once_while_nothing_is_under_way(
    panel: Panel, listeners: tuple[Listener, Listener], target: str
) -> None:
    _, direct = listeners
    done = panel.finished(panel.switch(target))
    assert done["state"] == "succeeded", done
    engines = {e.pid for e in panel.engines()}
    before = {name: panel.signal(name, signal.SIGKILL) for name in NAMES if name != "supervisor"}
    for name, pid in before.items():
        wait_for(f"another {name}", lambda name=name, pid=pid: panel.pid(name) not in (None, pid))
    all_is_well(panel, target)
    assert {e.pid for e in panel.engines()} == engines
    direct.goes_on()


def test_ctrl_c_and_a_new_start_find_the_engines_where_they_were(
    panel: Panel, listeners: tuple[Listener, Listener], target: str
) -> None:
    _, direct = listeners
    done = panel.finished(panel.switch(target))
    assert done["state"] == "succeeded", done
    engines = {e.pid for e in panel.engines()}
    panel.interrupt()
    direct.goes_on()
    panel.start()
    all_is_well(panel, target)
    assert {e.pid for e in panel.engines()} == engines
    direct.goes_on()


def test_kill_of_everything_but_the_engines_and_a_new_start_find_them_where_they_were(
    panel: Panel, listeners: tuple[Listener, Listener], target: str
) -> None:
    _, direct = listeners
    done = panel.finished(panel.switch(target))
    assert done["state"] == "succeeded", done
    engines = {e.pid for e in panel.engines()}
    for name in reversed(NAMES):  # the supervisor last: it would start the others again
        panel.signal(name, signal.SIGKILL)
    assert panel.process is not None
    panel.process.wait(60)
    direct.goes_on()
    panel.start()
    all_is_well(panel, target)
    assert {e.pid for e in panel.engines()} == engines
    direct.goes_on()


def test_the_audit_chain_is_whole_after_all_that(panel: Panel) -> None:
    checked = panel.manage("audit", "verify")
    assert checked.returncode == 0, checked.stderr
    assert panel.get("/audit/verify")
