"""Limits of keys, the person behind Open WebUI's key, rotation, and streams of keys that end."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import jwt
import openai
import pytest
from django.utils import timezone

from apps.accounts.models import ApiKey
from apps.accounts.services import key_create, key_owner, key_revoke, key_rotate, user_update
from apps.accounts.tokens import people_secret
from apps.common.actors import PANEL, actor_of
from apps.common.errors import Invalid, NotAllowed
from apps.common.roles import Role
from apps.deployments import routes
from apps.gateway import errors, registration
from apps.gateway.identity import named_person, networks_of, origin
from apps.gateway.keys import Known
from apps.gateway.menu import Menu
from apps.jobs.models import Job
from tests.gateway.conftest import GatewayProcess, House
from tests.gateway.helpers import chat, until
from tests.gateway.test_observer import Recorder
from tests.gateway.test_streams import nothing_runs, open_request, read_until

pytestmark = pytest.mark.django_db(transaction=True)
CHAT = "/v1/chat/completions"
SECRET = "s" * 64


def signed(secret: str = SECRET, algorithm: str = "HS256", **claims: Any) -> bytes:
    now = int(time.time())
    known = {"iss": "open-webui", "sub": "1", "email": "Bob@lab.example", "iat": now, "exp": now + 300}
    return jwt.encode({**known, **claims}, secret, algorithm=algorithm).encode()


def test_open_webuis_signed_header_names_a_person() -> None:
    assert named_person([(b"x-openwebui-user-jwt", signed())], SECRET) == "bob@lab.example"
    assert named_person([(b"x-openwebui-user-email", b"bob@lab.example")], SECRET) is None  # unsigned: says nothing


# Made when the test runs: by then one that was made at import has expired, and is refused for that alone.
FORGED: dict[str, Callable[[], bytes]] = {
    "another secret": lambda: signed("another secret of some length, so that it can be one"),
    "another issuer": lambda: signed(iss="somebody"),
    "expired": lambda: signed(exp=int(time.time()) - 3600),
    "not yet": lambda: signed(nbf=int(time.time()) + 3600),
    "no time": lambda: signed(exp="never"),
    "no address": lambda: signed(email=None),
    "an empty address": lambda: signed(email=""),
    "another algorithm": lambda: signed(algorithm="HS512"),
    "no algorithm": lambda: jwt.encode({"iss": "open-webui", "email": "a@b"}, None, algorithm="none").encode(),
    "empty": lambda: b"",
    "two parts": lambda: b"a.b",
    "three parts of nothing": lambda: b"a.b.c",
    "dots": lambda: b"....",
    "no text": lambda: b"\xff\xfe.\x00.x",
    "another head": lambda: b"[]." + signed().split(b".", 1)[1],
    "one character more": lambda: signed() + b"x",
    "long": lambda: b"x" * 5000,
}


@pytest.mark.parametrize("forged", FORGED)
def test_a_forged_or_stale_name_is_refused(forged: str) -> None:
    with pytest.raises(errors.GatewayError) as refused:
        named_person([(b"x-openwebui-user-jwt", FORGED[forged]())], SECRET)
    assert (refused.value.status, refused.value.code) == (401, "invalid_user_token")


def test_an_address_from_a_proxy_counts_only_if_the_proxy_is_trusted() -> None:
    trusted = networks_of(["10.0.0.0/8", "::1"])

    def seen(peer: str, forwarded: str) -> str:
        return origin((peer, 1), [(b"x-forwarded-for", forwarded.encode())], trusted)

    assert seen("192.0.2.1", "203.0.113.9") == "192.0.2.1"
    assert seen("10.0.0.1", "203.0.113.9") == "203.0.113.9"
    assert seen("10.0.0.1", "198.51.100.7, 203.0.113.9, 10.0.0.2") == "203.0.113.9"
    assert seen("::1", "nonsense") == "nonsense"
    assert origin(("10.0.0.1", 1), [], trusted) == "10.0.0.1"
    lines = [(b"x-forwarded-for", b"198.51.100.7"), (b"x-forwarded-for", b"203.0.113.9")]
    assert origin(("10.0.0.1", 1), lines, trusted) == "203.0.113.9"  # the first line is the client's own word


def test_a_key_may_be_limited_to_models_and_networks(house: House, gateway: GatewayProcess, bob: Any) -> None:
    house.serve(gateway, "coder", house.engine("coder"))
    house.serve(gateway, "other", house.engine("other"))
    _, near = key_create(bob, name="a", actor=PANEL, allowed_models=["coder"], allowed_networks=["127.0.0.1"])
    _, far = key_create(bob, name="b", actor=PANEL, allowed_networks=["192.0.2.0/24"])
    house.applied(gateway)

    assert gateway.ask("POST", CHAT, chat("coder"), key=near).status == 200
    refused = gateway.ask("POST", CHAT, chat("other"), key=near)
    assert (refused.status, refused.error["code"]) == (403, "model_not_allowed")
    assert [m["id"] for m in gateway.ask("GET", "/v1/models", key=near).json["data"]] == ["coder"]
    assert gateway.ask("GET", "/v1/models/other", key=near).status == 404
    away = gateway.ask("POST", CHAT, chat("coder"), key=far)
    assert (away.status, away.error["code"]) == (403, "network_not_allowed")
    claimed = gateway.ask("POST", CHAT, chat("coder"), key=far, headers={"X-Forwarded-For": "192.0.2.5"})
    assert claimed.status == 403  # no proxy is trusted here


def has_menu(house: House, gateway: Any, read: Callable[[], Menu], monkeypatch: pytest.MonkeyPatch) -> None:
    """The gateway goes by this menu from now on: a look that is under way has ended when this one has."""
    monkeypatch.setattr(registration, "menu_read", read)
    house.loop.run(gateway.gateway.registration._read_menu(time.monotonic()))
    assert gateway.gateway.routes.menu is read()


def test_an_alias_that_leads_elsewhere_in_the_moment_of_a_request_does_not_widen_a_key(
    house: House, within: Any, bob: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = house.engine("other")
    routes.open_to(house.deploy("other", engine))
    _, token = key_create(bob, name="narrow", allowed_models=["coder"], actor=PANEL)
    gateway = within()
    house.applied(gateway)
    cache = gateway.gateway.routes
    before = Menu(aliases={"mine": "coder"}, offers={})
    after = Menu(aliases={"mine": "other"}, offers=cache.menu.offers, states={"other": "loaded"})

    async def menu_now() -> None:
        cache.menu = after

    has_menu(house, gateway, lambda: before, monkeypatch)
    monkeypatch.setattr(gateway.gateway.registration, "menu_now", menu_now)
    answer = gateway.ask("POST", CHAT, chat("mine"), key=token)
    assert (answer.status, answer.error["code"]) == (403, "model_not_allowed")
    assert not engine.received


def test_an_alias_that_leads_elsewhere_while_a_request_waits_does_not_widen_a_key(
    house: House, within: Any, bob: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who may use the model itself is still answered by it."""
    engine = house.engine("coder")
    deployment = house.deploy("coder", engine)
    routes.hold(["coder"], job_id=1, eta_at=None)
    _, narrow = key_create(bob, name="narrow", allowed_models=["mine"], actor=PANEL)
    _, wide = key_create(bob, name="wide", allowed_models=["coder", "mine"], actor=PANEL)
    gateway = within()
    house.applied(gateway)
    menus = [Menu(aliases={"mine": name}, offers={}, states={"coder": "loading"}) for name in ("coder", "other")]
    has_menu(house, gateway, lambda: menus[0], monkeypatch)
    answers: dict[str, Any] = {}

    def ask(token: str) -> None:
        answers[token] = gateway.ask("POST", CHAT, chat("mine"), key=token)

    asking = [threading.Thread(target=ask, args=(token,)) for token in (narrow, wide)]
    for thread in asking:
        thread.start()
    until(lambda: gateway.metric("rigpanel_gateway_waiting") == 2, "they do not wait")
    menus.pop(0)
    gateway.gateway.routes.menu = menus[0]
    routes.open_to(deployment)
    for thread in asking:
        thread.join(60)
    assert (answers[narrow].status, answers[narrow].error["code"]) == (403, "model_not_allowed")
    assert answers[wide].status == 200
    assert len(engine.received) == 1


def slowly(gateway: Any, token: str, then: Callable[[], None], header: str = "", path: str = CHAT) -> bytes:
    """A request's answer as far as its error, where ``then`` happens while its body is on its way."""
    body = json.dumps(chat("coder")).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nContent-Length: {len(body)}\r\n"
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=60) as connection:
        connection.sendall(f"{head}{header}\r\n".encode() + body[:10])
        until(lambda: (gateway.metric("rigpanel_gateway_body_bytes") or 0) >= 10, "it was not read so far")
        then()
        connection.sendall(body[10:])
        return read_until(connection, b"}")


def test_a_key_that_is_revoked_while_its_body_comes_opens_nothing(
    house: House, gateway: GatewayProcess, bob: Any
) -> None:
    engine = house.engine("coder")
    house.serve(gateway, "coder", engine)
    key, token = key_create(bob, name="slow", actor=PANEL)
    house.applied(gateway)

    def revoked() -> None:
        key_revoke(key, actor=actor_of(bob))
        house.applied(gateway)

    answer = slowly(gateway, token, revoked)
    assert b"HTTP/1.1 401" in answer
    assert b"key_revoked" in answer
    assert not engine.received


@pytest.mark.parametrize("change", [{"is_active": False}, {"role": Role.VIEWER}])
def test_a_person_behind_open_webuis_key_who_leaves_while_the_body_comes_opens_nothing(
    house: House, gateway: GatewayProcess, alice: Any, bob: Any, change: dict[str, Any]
) -> None:
    engine = house.engine("coder")
    house.serve(gateway, "coder", engine)
    key, token = key_create(alice, name="Open WebUI", actor=PANEL, names_people=True)
    house.applied(gateway)

    def left() -> None:
        user_update(bob, actor=PANEL, **change)
        house.applied(gateway)

    named = signed(people_secret(key.digest), email=bob.email).decode()
    answer = slowly(gateway, token, left, f"X-OpenWebUI-User-Jwt: {named}\r\n")
    assert b"HTTP/1.1 401" in answer
    assert b"key_revoked" in answer
    assert not engine.received


@pytest.mark.parametrize("path", ["/models/load", "/models/unload"])
def test_a_key_that_is_revoked_while_its_body_comes_loads_and_unloads_nothing(
    house: House, gateway: GatewayProcess, olivia: Any, path: str
) -> None:
    house.serve(gateway, "coder", house.engine("coder"))
    key, token = key_create(olivia, name="slow", actor=PANEL)
    house.applied(gateway)

    def revoked() -> None:
        key_revoke(key, actor=actor_of(olivia))
        house.applied(gateway)

    answer = slowly(gateway, token, revoked, path=path)
    assert b"HTTP/1.1 401" in answer
    assert b"key_revoked" in answer
    assert Job.objects.count() == 0


def test_a_key_that_is_revoked_while_the_menu_is_read_opens_nothing(
    house: House, within: Any, bobs_key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = house.engine("other")
    routes.open_to(house.deploy("other", engine))
    gateway = within()
    house.applied(gateway)
    cache, keys = gateway.gateway.routes, gateway.gateway.keys
    before = Menu(aliases={"mine": "coder"}, offers={})

    async def menu_now() -> None:
        cache.menu = Menu(aliases={"mine": "other"}, offers={}, states={"other": "loaded"})
        keys.apply(keys.epoch, Known({}, {}))

    has_menu(house, gateway, lambda: before, monkeypatch)
    monkeypatch.setattr(gateway.gateway.registration, "menu_now", menu_now)
    answer = gateway.ask("POST", CHAT, chat("mine"), key=bobs_key)
    assert (answer.status, answer.error["code"]) == (401, "key_revoked")
    assert not engine.received


def test_a_limited_key_does_not_open_the_panels_api(house: House, bob: Any) -> None:
    _, token = key_create(bob, name="a", actor=PANEL, allowed_models=["coder"])
    with pytest.raises(NotAllowed):
        key_owner(token)
    assert key_owner(key_create(bob, name="b", actor=PANEL)[1]) == bob


def test_limits_are_checked_when_a_key_is_made(house: House, bob: Any) -> None:
    with pytest.raises(Invalid):
        key_create(bob, name="a", actor=PANEL, allowed_networks=["the office"])
    with pytest.raises(Invalid):
        key_create(bob, name="a", actor=PANEL, expires_at=timezone.now() - timedelta(seconds=1))
    with pytest.raises(NotAllowed):
        key_create(bob, name="a", actor=PANEL, names_people=True)
    key, _ = key_create(bob, name="a", actor=PANEL, allowed_networks=["10.0.0.7/8", " ", "10.1.1.1/8"])
    assert key.allowed_networks == ["10.0.0.0/8"]


def test_a_rotated_key_goes_on_for_a_while(house: House, gateway: GatewayProcess, bob: Any) -> None:
    old, old_token = key_create(bob, name="ci", actor=PANEL, allowed_models=["coder"])
    new, new_token = key_rotate(old, actor=actor_of(bob), overlap=timedelta(seconds=4))
    house.applied(gateway)
    assert (new.name, new.allowed_models) == ("ci", ["coder"])
    assert gateway.ask("GET", "/v1/models", key=old_token).status == 200
    assert gateway.ask("GET", "/v1/models", key=new_token).status == 200
    until(lambda: gateway.ask("GET", "/v1/models", key=old_token).status == 401, "the old key did not end")
    assert gateway.ask("GET", "/v1/models", key=new_token).status == 200


def test_the_person_behind_open_webuis_key_is_who_asks(
    house: House, within: Any, alice: Any, bob: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()
    routes.open_to(house.deploy("coder", house.engine("coder")))
    key, token = key_create(alice, name="Open WebUI", actor=PANEL, names_people=True)
    _, own = key_create(bob, name="bob's own", actor=PANEL)
    secret = people_secret(key.digest)
    gateway = within(recorder)
    house.applied(gateway)
    lines: list[dict[str, Any]] = []
    monkeypatch.setattr(gateway.gateway.access_log, "request", lambda **line: lines.append(line))

    def asked(token: str, **headers: str) -> Any:
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        return gateway.ask("POST", CHAT, chat("coder"), key=token, headers=given)

    def guest() -> str:
        return recorder.closed[-1].guest

    def last(count: int) -> tuple[int, int, str]:
        until(lambda: len(recorder.closed) == count, "the end was not told")
        seen = recorder.closed[-1]
        return seen.user_id, seen.key_owner_id, seen.task

    named = signed(secret, email=bob.email).decode()
    assert asked(token, X_OpenWebUI_User_Jwt=named, X_OpenWebUI_Task="title_generation").status == 200
    assert last(1) == (bob.pk, alice.pk, "title_generation")
    assert asked(token).status == 200
    assert last(2) == (alice.pk, alice.pk, "")
    assert guest() == "somebody"
    assert asked(token, X_OpenWebUI_User_Email=bob.email).status == 200  # unsigned
    assert last(3) == (alice.pk, alice.pk, "")
    stranger = signed(secret, email="stranger@lab.example").decode()
    assert asked(token, X_OpenWebUI_User_Jwt=stranger).status == 200  # known to Open WebUI only
    assert last(4) == (alice.pk, alice.pk, "")
    assert guest() == "stranger@lab.example"
    other = signed(secret, email=alice.email).decode()
    assert asked(own, X_OpenWebUI_User_Jwt=other).status == 200  # a key of one person names nobody
    assert last(5) == (bob.pk, bob.pk, "")
    assert guest() == ""
    until(lambda: len(lines) == 5, "a request was not logged")
    assert [line["user_id"] for line in lines] == [bob.pk, alice.pk, alice.pk, alice.pk, bob.pk]
    forged = asked(token, X_OpenWebUI_User_Jwt=signed("f" * 64, email=bob.email).decode())
    assert (forged.status, forged.error["code"]) == (401, "invalid_user_token")

    user_update(bob, actor=PANEL, is_active=False)
    house.applied(gateway)
    gone = asked(token, X_OpenWebUI_User_Jwt=named)
    assert (gone.status, gone.error["code"]) == (403, "person_not_allowed")


def test_a_revoked_key_ends_at_once_and_its_streams_with_it(house: House, gateway: GatewayProcess, bob: Any) -> None:
    engine = house.engine("coder")
    house.serve(gateway, "coder", engine)
    key, token = key_create(bob, name="second", actor=PANEL)
    _, kept = key_create(bob, name="third", actor=PANEL)
    house.applied(gateway)
    stream = open_request(gateway, token, chat("coder", stream=True, gate=True))
    read_until(stream, b"t0")
    other = open_request(gateway, kept, chat("coder", stream=True, gate=True))
    read_until(other, b"t0")
    plain = open_request(gateway, token, chat("coder", script="hang"))
    until(lambda: engine.running == 3, "the request did not arrive")

    key_revoke(key, actor=actor_of(bob))

    rest = read_until(stream, b"[DONE]")
    assert b"key_revoked" in rest
    assert b"HTTP/1.1 401" in read_until(plain, b"key_revoked")
    until(lambda: engine.abandoned == 2, "the engine still works for a revoked key")
    assert gateway.ask("POST", CHAT, chat("coder"), key=token).status == 401
    house.loop.run(engine.release())
    assert b"key_revoked" not in read_until(other, b"[DONE]")
    for connection in (stream, plain, other):
        connection.close()
    nothing_runs(gateway)


def test_the_official_client_sees_that_its_key_was_revoked(house: House, gateway: GatewayProcess, bob: Any) -> None:
    house.serve(gateway, "coder", house.engine("coder"))
    key, token = key_create(bob, name="second", actor=PANEL)
    house.applied(gateway)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{gateway.port}/v1", api_key=token, max_retries=0)
    messages: Any = [{"role": "user", "content": "Hello"}]
    stream = client.chat.completions.create(model="coder", messages=messages, stream=True, extra_body={"gate": True})
    first = next(iter(stream))
    assert first.choices[0].delta.content == "t0 "
    key_revoke(key, actor=PANEL)
    with pytest.raises(openai.APIError, match="revoked"):
        list(stream)


def test_whoever_may_not_use_the_gateway_any_more_is_cut_off(
    house: House, gateway: GatewayProcess, bobs_key: str, alice: Any, bob: Any
) -> None:
    house.serve(gateway, "coder", house.engine("coder"))
    stream = open_request(gateway, bobs_key, chat("coder", stream=True, gate=True))
    read_until(stream, b"t0")
    user_update(bob, actor=PANEL, role=Role.VIEWER)
    assert b"key_revoked" in read_until(stream, b"[DONE]")
    stream.close()


def test_an_expired_keys_stream_is_finished(house: House, gateway: GatewayProcess, bob: Any) -> None:
    engine = house.engine("coder")
    house.serve(gateway, "coder", engine)
    _, token = key_create(bob, name="short", actor=PANEL, expires_at=timezone.now() + timedelta(seconds=2))
    house.applied(gateway)
    stream = open_request(gateway, token, chat("coder", stream=True, gate=True))
    read_until(stream, b"t0")
    until(lambda: gateway.ask("GET", "/v1/models", key=token).status == 401, "the key did not expire")
    house.loop.run(engine.release())
    assert b"error" not in read_until(stream, b"[DONE]")
    stream.close()


def test_keys_in_the_api_with_limits_and_rotation(house: House, client: Any, alice: Any) -> None:
    client.force_login(alice)
    token = key_create(alice, name="api", actor=PANEL)[1]

    def call(path: str, body: dict[str, Any]) -> Any:
        return client.post(
            f"/api/v1{path}", json.dumps(body), "application/json", headers={"Authorization": f"Bearer {token}"}
        )

    made = call("/keys", {"name": "Open WebUI", "names_people": True, "models": ["coder"], "networks": ["10.0.0.1"]})
    assert made.status_code == 201, made.content
    key = made.json()
    assert (key["models"], key["networks"], key["names_people"]) == (["coder"], ["10.0.0.1/32"], True)
    assert key["people_secret"] == people_secret(ApiKey.objects.get(pk=key["id"]).digest)
    turned = call(f"/keys/{key['id']}/rotate", {"overlap_hours": 1})
    assert turned.status_code == 201, turned.content
    assert turned.json()["models"] == ["coder"]
    assert turned.json()["key"] != key["key"]
    old = ApiKey.objects.get(pk=key["id"])
    assert old.expires_at is not None
    assert old.expires_at < timezone.now() + timedelta(hours=2)
    assert call("/keys", {"name": "x", "networks": ["nowhere"]}).status_code == 422
