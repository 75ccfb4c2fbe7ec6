"""What people click, drawn from a seed before anything happens: who, what, and on which profile."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from tests.panel import OWNER, Answer, ask

if TYPE_CHECKING:
    from tests.chaos.world import World

OLIVIA, BOB = "olivia@lab.example", "bob@lab.example"
PEOPLE = {OWNER: "owner", OLIVIA: "operator", BOB: "member"}
CLICKS = {
    "switch": 8.0,
    "exclusive": 1.0,
    "stop": 2.0,
    "cancel": 3.0,
    "twice": 1.0,
    "pin": 1.0,
    "release": 0.5,
    "request": 1.5,
    "answer": 1.5,
    "router": 0.7,
    "policy": 0.8,
}
# The rig's own acts: what idles goes or sleeps, home is returned to, the calendar has its day. A clock that is set by
# hours makes them due.
POLICIES: tuple[dict[str, Any], ...] = (
    {"home_after_idle_seconds": 60},
    {"home_at": "00:00"},
    {"idle_action": "sleep", "idle_after_seconds": 60},
    {"idle_action": "unload", "idle_after_seconds": 60},
    {},  # the calendar instead
)
NO_POLICY = {
    "minimum_residency_seconds": 5,
    "home_profile": None,
    "home_after_idle_seconds": None,
    "home_at": None,
    "idle_action": "nothing",
}
PIN_DAYS = 20  # longer than any step of the clock, so that none is over in between


def draw(world: World, dice: random.Random) -> Callable[[], None]:
    who = dice.choice(list(PEOPLE))
    what = dice.choices(list(CLICKS), list(CLICKS.values()))[0]
    slug, pick = dice.choice(world.profiles), dice.random()
    policy, yes = dice.choice(POLICIES), dice.random() < 0.7

    def act() -> None:
        person = Person(world, who)
        if what in ("switch", "exclusive", "twice"):
            for _ in range(2 if what == "twice" else 1):
                person.clicks("/switch", {"profile": slug, "exclusive": what == "exclusive"})
        elif what == "stop":
            if found := person.one_of("/deployments?live=true", pick):
                person.clicks(f"/deployments/{found['id']}/stop", {})
        elif what == "cancel":
            if world.jobs:
                person.clicks(f"/jobs/{world.jobs[-1]}/cancel", {})
        elif what == "pin":
            if found := person.one_of("/deployments?live=true", pick):
                hours = 24 * PIN_DAYS if who != BOB else 23
                until = (datetime.now(UTC) + timedelta(hours=hours)).isoformat()
                person.clicks("/pins", {"profile": found["profile"], "until": until, "reason": "exam"})
        elif what == "release":
            if found := person.one_of("/pins", pick):
                person.clicks(f"/pins/{found['id']}", method="DELETE")
        elif what == "request":
            Person(world, BOB).clicks("/requests", {"profile": slug})
        elif what == "answer":
            if found := person.one_of("/requests?state=waiting", pick):
                person.clicks(f"/requests/{found['id']}/{'approve' if yes else 'decline'}", {})
        elif what == "router":
            body = {"model": world.served[slug]}
            url = f"{world.panel.gateway_url}/models/{'load' if yes else 'unload'}"
            person.told(url[-12:], body, ask(url, body, key=world.panel.key(who), seconds=5))
        elif what == "policy" and world.owns_panel:
            sets_policy(Person(world, OLIVIA), slug, policy)

    return act


def sets_policy(person: Person, slug: str, policy: dict[str, Any]) -> None:
    person.world.policies_set = True
    if policy:
        home = {"home_profile": slug} if "idle_action" not in policy else {}
        person.clicks("/rigs/bench-01/policy", {**policy, **home}, method="PUT")
    else:
        slot = {"profile": slug, "days": list(range(7)), "begin": "00:00", "end": "00:00"}
        person.clicks("/rigs/bench-01/calendar", slot)


def takes_policies_back(world: World) -> bool:
    """Whether nothing is left that the rig would do by itself, and nobody's pin: the next round begins free."""
    alice = Person(world, OWNER)
    if world.policies_set:
        done = alice.clicks("/rigs/bench-01/policy", NO_POLICY, method="PUT").status == 200
        slots = alice.list("/rigs/bench-01/calendar")
        for slot in slots or ():
            done &= alice.clicks(f"/calendar/{slot['id']}", method="DELETE").status == 204
        if not done or slots is None:
            return False
        world.policies_set = False
    pins = alice.list("/pins")
    return pins is not None and all(alice.clicks(f"/pins/{p['id']}", method="DELETE").status == 204 for p in pins)


class Person:
    """Somebody with a key of the API."""

    def __init__(self, world: World, email: str) -> None:
        self.world, self.email = world, email

    def asks(self, path: str, body: Any = None, method: str | None = None) -> Answer:
        url = f"{self.world.panel.url}/api/v1{path}"
        return ask(url, body, key=self.world.panel.key(self.email), method=method, seconds=5)

    def clicks(self, path: str, body: Any = None, *, method: str | None = None) -> Answer:
        return self.told(path, body if method is None else f"{method} {body or ''}", self.asks(path, body, method))

    def told(self, path: str, body: Any, answer: Answer) -> Answer:
        """Kept in the history, and a job that was promised is remembered."""
        said = str(answer.text[:110]).replace("\n", " ")
        if answer.status == 202:
            with contextlib.suppress(ValueError, KeyError):
                self.world.jobs.append(int(answer.json["id"]))
                said = f"job {answer.json['id']}"
        self.world.history.note(f"{self.email.partition('@')[0]} {path} {body} → {answer.status} {said}")
        return answer

    def list(self, path: str) -> list[dict[str, Any]] | None:
        """None when nobody answered."""
        answer = self.asks(path)
        if answer.status != 200:
            return None
        found = answer.json
        items: list[dict[str, Any]] = found["items"] if isinstance(found, dict) else found
        return items

    def one_of(self, path: str, pick: float) -> dict[str, Any] | None:
        items = self.list(path)
        return items[int(pick * len(items))] if items else None
