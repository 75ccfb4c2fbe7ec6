"""The application on the launcher's Ray: submitted by Serve's REST API, followed, deleted."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

import aiohttp

from apps.engines.ray_serve.cluster import Cluster, Failed, say
from apps.engines.ray_serve.network import wide_listeners, wide_words
from apps.engines.ray_serve.status import PLACE, ApplicationState, application_state

HEAD_SECONDS = 180.0  # 7 s measured; a cold disk under load took most of a minute
NODES_SECONDS = 120.0
BACK_SECONDS = 300.0  # with no replica left; at least, and at least three times what the first start took
POLL_SECONDS = 1.0
STALE_SECONDS = 30.0
DELETE_SECONDS = 15.0


class Serving:
    """The application: submitted, followed, deleted."""

    def __init__(self, cluster: Cluster, application: dict[str, Any]) -> None:
        self.cluster = cluster
        self.application = application
        self.base = f"http://127.0.0.1:{cluster.ports['dashboard']}"
        self.headers = {"Authorization": f"Bearer {cluster.workspace.token}"}
        self.nodes: dict[str, int] = {}
        self.seen: ApplicationState | None = None
        self.seen_at = 0.0
        self.was_ready = False

    def report(self) -> tuple[dict[str, Any], bool]:
        """What the door tells, and whether requests can be served."""
        seen = self.seen
        serving = self.was_ready and seen is not None and seen.running > 0
        if seen is None or time.monotonic() - self.seen_at > STALE_SECONDS:
            return {
                "ready": self.was_ready
            }, serving  # requests may still be answered; how the replicas are is not known
        return {**seen.to_dict(), "ready": self.was_ready}, serving

    async def ask(self, method: str, path: str, body: Any = None, seconds: float = 10.0) -> tuple[int, str]:
        """Status and text; ``(0, why)`` when nothing answered."""
        try:
            async with (
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=seconds)) as session,
                session.request(method, self.base + path, json=body, headers=self.headers) as answer,
            ):
                return answer.status, await answer.text()
        except (aiohttp.ClientError, TimeoutError) as error:
            return 0, str(error) or type(error).__name__

    async def wait_for_head(self) -> None:
        deadline = time.monotonic() + HEAD_SECONDS
        while True:
            status, text = await self.ask("GET", "/api/serve/applications/", seconds=30)
            if status == 200:
                return
            if status in (401, 403):
                raise Failed(f"Ray's head refused our token ({status}): {text[:300]}")
            if time.monotonic() > deadline:
                raise Failed(f"Ray's head did not answer: {status or ''} {text[:500]}\n{self.cluster.start_log(0)}")
            await asyncio.sleep(0.3)

    async def wait_for_nodes(self) -> None:
        deadline = time.monotonic() + NODES_SECONDS
        wanted = len(self.cluster.seats)
        while len(await self.read_nodes()) < wanted:
            if time.monotonic() > deadline:
                raise Failed(
                    f"Only {len(self.nodes)} of {wanted} raylets joined.\n{self.cluster.start_log(wanted - 1)}"
                )
            await asyncio.sleep(0.5)

    async def read_nodes(self) -> dict[str, int]:
        status, text = await self.ask("GET", "/api/v0/nodes?detail=1&limit=100", seconds=30)
        if status == 200:
            found = {}
            for node in json.loads(text)["data"]["result"]["result"]:
                for name in node.get("resources_total") or {}:
                    if name.startswith(f"{PLACE}_") and node.get("state") == "ALIVE":
                        found[str(node["node_id"])] = int(name.rpartition("_")[2])
            self.nodes = found
        return self.nodes

    async def submit(self) -> None:
        document = {
            "proxy_location": "HeadOnly",
            "http_options": {"host": "127.0.0.1", "port": self.cluster.ports["serve"]},
            "grpc_options": {"port": self.cluster.ports["grpc"]},
            "logging_config": {"enable_access_log": False},
            "applications": [self.application],
        }
        status, text = await self.ask("PUT", "/api/serve/applications/", document, seconds=120)
        if status != 200:
            raise Failed(f"Serve refused the application ({status}): {text[:3000]}")

    async def look(self) -> ApplicationState | None:
        """The application as Serve sees it now; None when it does not say."""
        status, text = await self.ask("GET", "/api/serve/applications/")
        if status != 200:
            return None
        answer = json.loads(text)
        count = len(self.cluster.seats)
        try:
            state = application_state(answer, self.application["name"], self.nodes, count)
        except KeyError:
            return None
        if any(place.replica for place in state.places) and len(self.nodes) < count:
            await self.read_nodes()
        return state

    async def follow(self) -> None:
        """Look every second for ever; raises Failed when it cannot come up."""
        told = ""
        began = last_served = time.monotonic()
        patience = BACK_SECONDS
        while True:
            state = await self.look()
            if state is None:
                await asyncio.sleep(POLL_SECONDS)
                continue
            self.seen, self.seen_at = state, time.monotonic()
            words = f"application {state.status}: " + ", ".join(f"replica {p.index} {p.state}" for p in state.places)
            if words != told:
                told = words
                say(words)
            if self.was_ready:
                if state.running:
                    last_served = time.monotonic()
                elif time.monotonic() - last_served > patience:
                    raise Failed(f"No replica came back within {patience:.0f} s.\n{state.message}")
            else:
                if state.status == "DEPLOY_FAILED":
                    raise Failed(f"Serve gave up on the application.\n{state.message}")
                if state.status == "RUNNING" and state.running == len(state.places):
                    self.find_wide_listeners()
                    self.was_ready = True
                    last_served = time.monotonic()
                    patience = max(BACK_SECONDS, 3 * (last_served - began))
                    say("ready")
                if "to be scheduled" in state.message and (bundles := await self.without_a_place()):
                    raise Failed(f"Ray found no place for a replica. It needs, on one raylet: {bundles}")
            await asyncio.sleep(POLL_SECONDS)

    async def without_a_place(self) -> str:
        """The bundles of a replica that no raylet could ever hold. Serve would wait for ever for a cluster that grows;
        its own words are the same while a worker is slow to start, so they decide nothing."""
        status, text = await self.ask("GET", "/api/v0/placement_groups?detail=1&limit=100", seconds=30)
        if status == 200:
            for group in json.loads(text)["data"]["result"]["result"]:
                if (group.get("stats") or {}).get("scheduling_state") == "INFEASIBLE":
                    return ", ".join(json.dumps(b.get("unit_resources") or b) for b in group.get("bundles") or ["?"])
        return ""

    def find_wide_listeners(self) -> None:
        if self.cluster.workspace.private:
            return
        warning = wide_words(wide_listeners(descendants(os.getpid())))
        if warning:
            say(f"warning: {warning}")

    async def delete(self) -> None:
        status, text = await self.ask("DELETE", "/api/serve/applications/", seconds=DELETE_SECONDS)
        say(
            "application deleted"
            if status == 200
            else f"the application was not deleted in order: {status or ''} {text[:200]}"
        )


def descendants(root: int) -> list[int]:
    """Every process below ``root``."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError, IndexError, ValueError):
                fields = Path(f"/proc/{entry}/stat").read_bytes().rpartition(b")")[2].split()
                children.setdefault(int(fields[1]), []).append(int(entry))
    found, waiting = [], [root]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found
