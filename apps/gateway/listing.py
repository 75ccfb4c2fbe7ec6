"""The lists of models: OpenAI's with the llama.cpp router's ``status``, Anthropic's, and the router's own with its
stream of changes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from apps.gateway.client import Client
from apps.gateway.keys import Key
from apps.gateway.menu import LOADED, LOADING, SLEEPING, UNLOADED
from apps.gateway.routes import RouteCache

OWNER = "rigpanel"
LOOK_EVERY_S = 0.25
ALIVE_EVERY_S = 15.0
RUNNING = frozenset({LOADED, LOADING, SLEEPING})


def usable(routes: RouteCache, key: Key, role: str) -> list[str]:
    """The served names that this key may use, those that run first: what serves or comes up, and what the person may
    have loaded."""
    menu = routes.menu
    names = dict.fromkeys([*routes.names(), *menu.names(role)])
    ordered = sorted(names, key=lambda name: (routes.state(name) == UNLOADED, name))
    return [name for name in ordered if allows(key, name, *menu.aliases_of(name))]


def allows(key: Key, *names: str) -> bool:
    return not key.models or not key.models.isdisjoint(names)


def aliases(routes: RouteCache, key: Key, role: str) -> Iterator[tuple[str, str]]:
    """(alias, served name) of those that lead to something that this key may use."""
    names = set(usable(routes, key, role))
    for alias in routes.menu.aliases:
        served_name = routes.menu.resolve(alias)
        if served_name in names and allows(key, alias, served_name):
            yield alias, served_name


def model_row(routes: RouteCache, name: str, served_name: str) -> dict[str, Any]:
    row = {
        "id": name,
        "object": "model",
        "created": routes.loaded_at,
        "owned_by": OWNER,
        "status": {"value": routes.state(served_name)},
    }
    return row if name == served_name else {**row, "alias_of": served_name}


def openai_list(routes: RouteCache, key: Key, role: str) -> list[dict[str, Any]]:
    rows = [model_row(routes, name, name) for name in usable(routes, key, role)]
    return rows + [model_row(routes, alias, served_name) for alias, served_name in aliases(routes, key, role)]


def anthropic_list(routes: RouteCache, key: Key, role: str) -> dict[str, Any]:
    created = datetime.fromtimestamp(routes.loaded_at, UTC).isoformat().replace("+00:00", "Z")
    rows = [
        {"type": "model", "id": row["id"], "display_name": row["id"], "created_at": created}
        for row in openai_list(routes, key, role)
    ]
    ends = {"first_id": rows[0]["id"], "last_id": rows[-1]["id"]} if rows else {"first_id": None, "last_id": None}
    return {"data": rows, "has_more": False, **ends}


def router_list(routes: RouteCache, key: Key, role: str) -> dict[str, Any]:
    """As llama.cpp's router lists its models. ``args`` and ``source`` are the panel's affair, so they tell nothing."""
    rows = [
        {
            **model_row(routes, name, name),
            "aliases": [alias for alias in routes.menu.aliases_of(name) if allows(key, alias, name)],
            "tags": [],
            "status": {"value": routes.state(name), "args": []},
            "can_remove": False,
        }
        for name in usable(routes, key, role)
    ]
    return {"object": "list", "data": rows}


def changes(before: dict[str, str], now: dict[str, str]) -> Iterator[bytes]:
    """The router's events for what is different: ``model_status`` when one begins to load, else ``status_change``."""
    for name in sorted({*before, *now}):
        old, new = before.get(name, UNLOADED), now.get(name, UNLOADED)
        if old == new:
            continue
        data: dict[str, Any] = {"status": new}
        if new == UNLOADED:
            data["exit_code"] = 0
        event = "model_status" if new == LOADING else "status_change"
        yield b"data: " + json.dumps({"model": name, "event": event, "data": data}).encode() + b"\n\n"


async def stream_changes(client: Client, routes: RouteCache, key: Key, role: str) -> None:
    """Server-sent events until the client leaves."""

    def states() -> dict[str, str]:
        return {name: routes.state(name) for name in usable(routes, key, role)}

    known = states()
    await client.start_events()
    await client.write(b": changes of models\n\n")
    quiet_s = 0.0
    seen: tuple[object, object] = (None, None)
    while True:
        await asyncio.sleep(LOOK_EVERY_S)
        quiet_s += LOOK_EVERY_S
        if seen != (routes.table, routes.menu):
            seen = (routes.table, routes.menu)
            now = states()
            events = b"".join(changes(known, now))
            known = now
            if events:
                quiet_s = 0.0
                await client.write(events)
        if quiet_s >= ALIVE_EVERY_S:
            quiet_s = 0.0
            await client.write(b": alive\n\n")
