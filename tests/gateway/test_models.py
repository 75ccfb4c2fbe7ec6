"""Lists of models with their state, aliases, and the llama.cpp router's dialect as Open WebUI speaks it."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest
from django.db import transaction

from apps.accounts.services import key_create
from apps.audit.models import AuditEntry
from apps.common.actors import PANEL, actor_of
from apps.common.errors import Conflict, Invalid, NotFound
from apps.deployments import routes
from apps.deployments.models import Status
from apps.gateway import registration
from apps.gateway.aliases import alias_delete, alias_get, alias_set
from apps.gateway.listing import changes
from apps.profiles.models import Profile
from tests.factories.profiles import simulated_profile
from tests.gateway.conftest import GatewayProcess, House
from tests.gateway.helpers import chat, until
from tests.gateway.test_streams import read_until

pytestmark = pytest.mark.django_db(transaction=True)
CHAT = "/v1/chat/completions"


def states(gateway: Any, key: str) -> dict[str, str]:
    return {m["id"]: m["status"]["value"] for m in gateway.ask("GET", "/v1/models", key=key).json["data"]}


def announce(house: House, gateway: GatewayProcess) -> None:
    """Profiles change without a route: make the gateway look."""
    routes.routes_changed()
    house.applied(gateway)


def test_models_say_whether_they_are_loaded(house: House, gateway: GatewayProcess, bobs_key: str, alice: Any) -> None:
    _, alices = key_create(alice, name="laptop", actor=PANEL)
    house.serve(gateway, "coder", house.engine("coder"))
    sleeper = house.deploy("sleeper", house.engine("sleeper"))
    type(sleeper).objects.filter(pk=sleeper.pk).update(status=Status.SLEEPING)
    comes = house.deploy("comes")
    type(comes).objects.filter(pk=comes.pk).update(status=Status.LOADING)
    routes.hold(["comes"], job_id=1, eta_at=None)
    simulated_profile("marked", members_may_switch=True)
    simulated_profile("unmarked")
    announce(house, gateway)

    served = {"coder": "loaded", "comes": "loading", "sleeper": "sleeping"}
    assert states(gateway, bobs_key) == {**served, "marked": "unloaded"}
    assert states(gateway, alices)["unmarked"] == "unloaded"  # an owner may switch to anything


def test_an_applied_epoch_comes_with_the_profiles_of_its_time(
    house: House, within: Any, bobs_key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late() -> Any:
        return Profile.objects.filter(slug="late")

    def table_after_a_change() -> routes.RouteTable:
        """In the middle of a look a profile comes, and the next epoch with it."""
        with transaction.atomic():
            if not late().exists():
                simulated_profile("late", members_may_switch=True)
                routes.routes_changed()
        return routes.route_table()

    gateway = within(menu_s=3600.0)  # only a change of routes makes it look at profiles
    monkeypatch.setattr(registration, "route_table", table_after_a_change)
    routes.routes_changed()
    until(late().exists, "the gateway did not look")
    house.applied(gateway)
    assert states(gateway, bobs_key)["late"] == "unloaded"


def test_an_alias_stays_while_its_model_changes(house: House, gateway: GatewayProcess, bobs_key: str) -> None:
    coder, other = house.engine("coder"), house.engine("other")
    house.serve(gateway, "coder", coder)
    house.serve(gateway, "other", other)
    simulated_profile("coder")
    simulated_profile("other")
    alias_set(name="team/code", profile="coder", actor=PANEL)
    house.applied(gateway)

    body = b'{ "model" : "team/code", "x": 0.10, "messages":[{"role":"user","content":"\xe2\x82\xac"}]}'
    assert gateway.ask("POST", CHAT, body, key=bobs_key).status == 200
    assert coder.received[-1].body == body.replace(b"team/code", b"coder")
    assert gateway.ask("GET", "/v1/models/team/code", key=bobs_key).json["alias_of"] == "coder"

    alias_set(name="team/code", profile="other", actor=PANEL)
    house.applied(gateway)
    assert gateway.ask("POST", CHAT, body, key=bobs_key).status == 200
    assert other.received[-1].body == body.replace(b"team/code", b"other")

    alias_delete(alias_get("team/code"), actor=PANEL)
    house.applied(gateway)
    assert gateway.ask("POST", CHAT, body, key=bobs_key).status == 404
    assert [e.action for e in AuditEntry.objects.filter(action__startswith="alias.").order_by("pk")] == [
        "alias.create",
        "alias.update",
        "alias.delete",
    ]


def test_an_alias_without_a_profile_leads_to_whatever_serves(
    house: House, gateway: GatewayProcess, bobs_key: str
) -> None:
    alias_set(name="default", profile="", actor=PANEL)
    house.applied(gateway)
    assert gateway.ask("POST", CHAT, chat("default"), key=bobs_key).status == 404
    engine = house.engine("coder")
    house.serve(gateway, "coder", engine)
    assert gateway.ask("POST", CHAT, chat("default", stream=True), key=bobs_key).status == 200
    assert json.loads(engine.received[-1].body)["model"] == "coder"


def test_a_key_limited_to_an_alias_reaches_what_it_leads_to(house: House, gateway: GatewayProcess, bob: Any) -> None:
    house.serve(gateway, "coder", house.engine("coder"))
    alias_set(name="default", profile="", actor=PANEL)
    _, token = key_create(bob, name="a", actor=PANEL, allowed_models=["default"])
    house.applied(gateway)
    assert gateway.ask("POST", CHAT, chat("default"), key=token).status == 200
    assert gateway.ask("POST", CHAT, chat("coder"), key=token).status == 403


def test_an_alias_is_checked(db: None) -> None:
    profile = simulated_profile("coder")
    for name in ("", " ", "two words", "x" * 101, "a\nb"):
        with pytest.raises(Invalid):
            alias_set(name=name, profile="", actor=PANEL)
    with pytest.raises(Conflict):
        alias_set(name=profile.current.served_name, profile="", actor=PANEL)
    with pytest.raises(NotFound):
        alias_set(name="x", profile="nothing", actor=PANEL)


def test_aliases_have_a_page_and_an_api(house: House, client: Any, alice: Any, bob: Any) -> None:
    simulated_profile("coder")
    client.force_login(alice)
    assert client.post("/aliases/save", {"name": "team/code", "profile": "coder"}).status_code == 302
    page = client.get("/aliases/")
    assert b"team/code" in page.content
    assert client.post("/aliases/save", {"name": "two words", "profile": ""}).status_code == 422
    _, token = key_create(alice, name="api", actor=actor_of(alice))
    headers = {"Authorization": f"Bearer {token}"}
    listed = client.get("/api/v1/aliases", headers=headers).json()
    assert listed["items"] == [{"name": "team/code", "profile": "coder"}]
    made = client.put("/api/v1/aliases/default", "{}", "application/json", headers=headers)
    assert (made.status_code, made.json()) == (200, {"name": "default", "profile": None})
    assert client.delete("/api/v1/aliases/team/code", headers=headers).status_code == 204
    assert client.post("/aliases/default/remove").status_code == 302
    client.force_login(bob)
    assert client.post("/aliases/save", {"name": "x", "profile": ""}).status_code == 403


# -- the router's dialect --------------------------------------------------------------------------


def test_the_routers_list(house: House, gateway: GatewayProcess, bobs_key: str) -> None:
    house.serve(gateway, "coder", house.engine("coder"))
    alias_set(name="default", profile="", actor=PANEL)
    simulated_profile("marked", members_may_switch=True)
    announce(house, gateway)
    listed = gateway.ask("GET", "/models", key=bobs_key).json
    assert listed["object"] == "list"
    coder, marked = listed["data"]
    assert (coder["id"], coder["status"], coder["aliases"]) == ("coder", {"value": "loaded", "args": []}, ["default"])
    assert (marked["id"], marked["status"]["value"]) == ("marked", "unloaded")


def test_downloads_and_removals_are_the_panels(gateway: GatewayProcess, bobs_key: str) -> None:
    for method in ("POST", "DELETE"):
        answer = gateway.ask(method, "/models?model=x", {"model": "x"}, key=bobs_key)
        assert (answer.status, answer.error["code"]) == (501, "not_implemented")
    assert gateway.ask("POST", "/models").status == 401
    assert gateway.ask("GET", "/models/load", key=bobs_key).status == 405


def test_changes_are_told_as_the_router_tells_them(house: House, gateway: GatewayProcess, bobs_key: str) -> None:
    engine = house.engine("coder")
    deployment = house.deploy("coder", engine)
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=60) as connection:
        connection.sendall(f"GET /models/sse HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {bobs_key}\r\n\r\n".encode())
        head = read_until(connection, b": changes of models")
        assert b"content-type: text/event-stream" in head
        routes.open_to(deployment)
        told = read_until(connection, b'"loaded"}}\n\n')
        assert b'data: {"model": "coder", "event": "status_change", "data": {"status": "loaded"}}\n\n' in told
    until(lambda: "client_gone" in gateway.log.read_text(), "the end of the stream was not noticed")


def test_what_changed_between_two_looks() -> None:
    before, now = {"a": "loaded", "b": "unloaded", "c": "loading"}, {"b": "loading", "c": "loaded", "d": "unloaded"}
    told = [json.loads(event[6:]) for event in changes(before, now)]
    assert [(t["model"], t["event"], t["data"]) for t in told] == [
        ("a", "status_change", {"status": "unloaded", "exit_code": 0}),
        ("b", "model_status", {"status": "loading"}),
        ("c", "status_change", {"status": "loaded"}),
    ]
