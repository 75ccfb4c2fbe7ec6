"""A panel under people and accidents, every one of them drawn from a seed.

A round is a handful of clicks by several people and one to three accidents at the same time, while clients ask for
answers all along. Then everything is allowed to recover, and within the published limit nothing may be under way and
every promise must hold (``invariants``). What was done is kept as a history; the seed makes the same again.
"""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import tempfile
import time
from pathlib import Path
from typing import Any

from apps.runners.processes import send_signal
from apps.runners.shim import ProcessStat
from tests.chaos import accidents, clicks, invariants
from tests.chaos.clicks import PEOPLE
from tests.chaos.clients import Clients, Streams
from tests.panel import Panel, ask, command_line, wait_for

# The sum of what docs/limits.md allows a rig to take until nothing is under way.
SETTLE_SECONDS = 150.0
GPU_PROFILES: dict[str, dict[str, Any]] = {
    "wide": {"tensor_parallel_size": 4},
    "other": {"tensor_parallel_size": 4},
    "left": {"tensor_parallel_size": 2},
    "right": {"tensor_parallel_size": 2},
    "twins": {"tensor_parallel_size": 2, "replicas": 2},
    "doomed": {"tensor_parallel_size": 4, "options": {"load_seconds": 0.2, "fail_cause": "out_of_memory"}},
    "doomed-half": {"tensor_parallel_size": 2, "options": {"load_seconds": 0.2, "fail_phase": "graphs"}},
    "sleeper": {"tensor_parallel_size": 4, "options": {"load_seconds": 0.5, "enable_sleep_mode": True}},
    "sleeper-half": {"tensor_parallel_size": 2, "options": {"load_seconds": 0.5, "enable_sleep_mode": True}},
    "groggy": {
        "tensor_parallel_size": 2,
        "options": {"load_seconds": 0.5, "enable_sleep_mode": True, "fail_wake": True},
    },
}
POLICY = {
    "restarts": 2,
    "window_seconds": 20,
    "backoff_seconds": 1,
    "probe_every_seconds": 2,
    "probe_limit_seconds": 4,
    "probe_failures": 2,
}
SITE = Path(__file__).parent / "site"


class History(list[str]):
    """What happened, with seconds since the beginning; printed when a round fails."""

    def __init__(self) -> None:
        super().__init__()
        self.began = time.monotonic()

    def note(self, text: str) -> None:
        self.append(f"{time.monotonic() - self.began:8.2f} {text}")


def stop_all(clients: list[Clients]) -> None:
    for one in clients:
        one.stopped.set()
    for one in clients:
        one.join(10)


class World:
    """``profiles`` are what people may switch to."""

    def __init__(
        self, seed: int, *, panel: Panel | None = None, served: dict[str, str] | None = None, **environment: str
    ) -> None:
        """``panel``: one that runs already, with ``served`` (profile to id in requests); its clock is left alone."""
        self.seed = seed
        self.history = History()
        self.served = served or {slug: slug for slug in GPU_PROFILES}
        self.profiles = list(self.served)
        self.owns_panel = panel is None
        descriptor, clock = tempfile.mkstemp(prefix="rp-clock-")
        os.close(descriptor)
        self.clock = Path(clock)
        self.clock.write_text("0")
        environment |= {"PYTHONPATH": str(SITE), "CHAOS_CLOCK": str(self.clock)}
        self.panel = panel or Panel(**environment)
        self.frozen: list[ProcessStat] = []
        self.limited: list[int] = []
        self.jobs: list[int] = []
        self.policies_set = self.owns_panel  # the rig has others at first than the world wants

    # -- life ---------------------------------------------------------------------------------------

    def start(self) -> World:
        if self.owns_panel:
            self.panel.start()
        self.panel.people(PEOPLE)
        self.key = self.panel.key()
        for slug, values in GPU_PROFILES.items() if self.owns_panel else ():
            body = {
                "slug": slug,
                "name": slug,
                "model": "gpt-oss-20b",  # its heads divide by 4
                "engine": "simulated",
                "served_name": slug,
                "members_may_switch": slug in ("wide", "left", "sleeper"),
                "options": {"load_seconds": 0.8},
                **values,
            }
            answer = self.panel.api("/profiles", body)
            assert answer.status == 201, answer.text
        for slug in self.profiles:
            answer = self.panel.api(f"/profiles/{slug}/restarts", POLICY, method="PUT")
            assert answer.status == 200, answer.text
        return self

    def stop(self) -> None:
        while self.frozen:
            send_signal(self.frozen.pop(), signal.SIGCONT)
        accidents.free_disk(self)
        try:
            if self.owns_panel:
                self.panel.stop()
        finally:
            self.clock.unlink(missing_ok=True)

    # -- a round ------------------------------------------------------------------------------------

    def round(self, number: int) -> None:
        """Raises AssertionError with the history of this round."""
        dice = random.Random(f"{self.seed}/{number}")
        self.history.clear()
        self.history.began = time.monotonic()
        clients = [Clients(self), Streams(self)]
        for one in clients:
            one.start()
        try:
            acts = [clicks.draw(self, dice) for _ in range(dice.randint(1, 4))]
            acts += [accidents.draw(self, dice) for _ in range(dice.randint(1, 4))]
            dice.shuffle(acts)
            for act in acts:
                try:
                    act()
                except AssertionError as error:  # a click on a panel that is just down
                    self.history.note(f"   not done: {str(error)[:100]}")
                time.sleep(dice.choice((0.0, 0.05, 0.2, 0.5, 1.0, 1.5)))
            time.sleep(dice.uniform(0, 1.0))
            self.recover()
            stop_all(clients)  # a request for what does not run may itself be a wish to switch
            took = self.settle()
            self.history.note(f"settled after {took:.1f} s")
        finally:
            self.recover()
            stop_all(clients)
        found = self.problems() + [f"the gateway: {wrong}" for one in clients for wrong in one.wrong]
        assert not found, self.told(number, found)

    def told(self, number: int, found: list[str]) -> str:
        return (
            f"round {number} of seed {self.seed}:\n{invariants.told(found)}\n"
            f"do it again: make chaos SEED={self.seed} ROUNDS={number + 1} FIRST={number}\nhistory:\n"
            + "\n".join([*self.history, *self.rows_told()])
        )

    # -- recovery -----------------------------------------------------------------------------------

    def recover(self) -> None:
        """The accidents are over: what was frozen goes on, the disk has room, the clock is right."""
        while self.frozen:
            send_signal(self.frozen.pop(), signal.SIGCONT)
        accidents.free_disk(self)
        if self.clock.read_text() != "0":
            self.clock.write_text("0")
            self.history.note("the clock is right again")
        if self.panel.process is not None and self.panel.process.poll() is not None:
            self.history.note("make up, again")
            self.panel.start()

    def settle(self) -> float:
        """Wait until nothing is under way; returns the seconds it took. AssertionError past the limit."""
        began = time.monotonic()
        if self.owns_panel:
            wait_for(
                "policies and pins are taken back", lambda: clicks.takes_policies_back(self), seconds=SETTLE_SECONDS
            )
        calm = 0
        while calm < 2:
            left = self.under_way()
            calm = 0 if left else calm + 1
            assert time.monotonic() - began < SETTLE_SECONDS, "\n".join(
                [f"still under way after {SETTLE_SECONDS:.0f} s:", *left, *self.rows_told(), *self.history]
            )
            time.sleep(0.3)
        return time.monotonic() - began

    def under_way(self) -> list[str]:
        if not self.panel.is_ready():
            return ["not ready: " + ask(f"{self.panel.url}/readyz", seconds=5).text[:600]]
        query = self.query
        return [
            *invariants.no_lost_job(query),
            *invariants.nothing_is_stuck(query),
            *[p for p in invariants.no_orphan(query, self.engines()) if "does not live" in p],
            *[
                f"deployment {r['id']} waits for its restart"
                for r in query("SELECT id FROM deployments_deployment WHERE status = 'failed' AND desired = 'serving'")
            ],
            *[
                f"deployment {r['id']} waits for a replica"
                for r in query("SELECT id FROM deployments_deployment WHERE status = 'degraded'")
            ],
            *[f"engine {s.pid} is frozen" for s in self.panel.engines() if s.state == "T"],
        ]

    def rows_told(self) -> list[str]:
        jobs = self.query("SELECT id, title, state, reason, result, created_at FROM jobs_job ORDER BY id DESC LIMIT 6")
        deployments = self.query(
            "SELECT id, status, desired, served_name, status_reason, ended_at FROM deployments_deployment"
            " ORDER BY id DESC LIMIT 8"
        )
        return [str(dict(r)) for r in jobs + deployments]

    # -- what is there ------------------------------------------------------------------------------

    def query(self, sql: str) -> list[invariants.Row]:
        path = self.panel.data / "rigpanel.sqlite3"
        connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=20)
        connection.row_factory = sqlite3.Row
        try:
            return [dict(row) for row in connection.execute(sql)]
        finally:
            connection.close()

    def engines(self) -> dict[int, list[str]]:
        return invariants.engine_processes(os.fsencode(str(self.panel.directory)))

    def shims(self) -> list[ProcessStat]:
        return [s for s in self.panel.members() if "shim.py" in " ".join(command_line(s.pid))]

    def serving_names(self) -> set[str]:
        rows = self.query("SELECT served_name FROM deployments_deployment WHERE status IN ('ready', 'degraded')")
        return {str(row["served_name"]) for row in rows}

    def problems(self) -> list[str]:
        found = invariants.problems(self.query, self.engines())
        known = {int(r["id"]) for r in self.query("SELECT id FROM jobs_job")}
        found += [f"job {j} was promised and is not there" for j in self.jobs if j not in known]
        chain = self.panel.api("/audit/verify")
        if chain.status != 200 or not chain.json.get("whole", chain.json.get("ok", True)):
            found.append(f"the audit chain: {chain.status} {chain.text[:200]}")
        shims = self.shims()
        if len(shims) > len(self.panel.engines()):
            found.append(f"{len(shims)} shims for {len(self.panel.engines())} engines")
        for row in self.query("SELECT served_name FROM deployments_deployment WHERE status = 'ready'"):
            answer = self.panel.gateway("/completions", {"model": row["served_name"], "prompt": "Hi", "max_tokens": 1})
            if answer.status != 200 or answer.json["model"] != row["served_name"]:
                found.append(f"{row['served_name']} is ready and answers {answer.status} {answer.text[:160]}")
        return found
