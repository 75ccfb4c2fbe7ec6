"""Route by role: each route of ``routes.py`` is asked for real as a stranger and as each of the four roles."""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
import time
from collections.abc import Iterator
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from asgiref.testing import ApplicationCommunicator
from django.test import Client
from django.urls import URLPattern, get_resolver

from apps.accounts.models import User
from apps.accounts.services import invitation_create, key_create, user_create, user_update
from apps.common.access import ROLE_ATTRIBUTE
from apps.common.actors import PANEL, actor_of
from apps.common.roles import Role
from apps.common.sockets import SIGNED_OUT
from apps.deployments.models import Deployment
from apps.gateway.application import ROUTER_PATHS, Gateway
from apps.gateway.keys import keys_load
from apps.gateway.protocol import FORM_PATHS, JSON_PATHS, MODELS_PATH
from apps.gateway.registration import Registration
from apps.installs.models import EngineInstall
from apps.jobs.models import Job
from apps.verification.models import VerificationRun
from rigpanel.api import operations
from rigpanel.routing import websocket_urlpatterns
from tests.api.routes import API, GATEWAY, PAGES, SOCKETS, Entry
from tests.factories.profiles import simulated_profile

WHO = [None, *Role]
OK, FORBIDDEN, SIGN_IN = "ok", "forbidden", "sign-in"


def expected(needed: Role | None, role: Role | None) -> str:
    if needed is None:
        return OK
    if role is None:
        return SIGN_IN
    return OK if role.covers(needed) else FORBIDDEN


def named(value: Any) -> str:
    return "stranger" if value is None else str(value)


# -- the table is complete ------------------------------------------------------------------------


def url_routes() -> dict[str, URLPattern]:
    """Everything the resolver knows but the API's operations, which describe themselves."""

    def walk(patterns: list[Any], prefix: str) -> Iterator[tuple[str, URLPattern]]:
        for pattern in patterns:
            route = prefix + str(pattern.pattern)
            if isinstance(pattern, URLPattern):
                yield route, pattern
            else:
                yield from walk(pattern.url_patterns, route)

    described = {op.path.lstrip("/").replace("{", "<").replace("}", ">") for op in operations()}
    found = dict(walk(get_resolver().url_patterns, ""))
    return {
        route: p
        for route, p in found.items()
        if route.replace("<int:", "<").replace("<path:", "<") not in described or "/v1" not in route
    }


def test_every_page_is_in_the_table_and_says_its_role_itself() -> None:
    routes = url_routes()
    table = {entry.partition(" ")[2] for entry in PAGES}
    assert set(routes) - table == set(), "these pages are missing from tests/api/routes.py"
    assert table - set(routes) == set(), "these pages of tests/api/routes.py no longer exist"
    for entry, (role, _) in PAGES.items():
        view = routes[entry.partition(" ")[2]].callback
        assert hasattr(view, ROLE_ATTRIBUTE), f"{entry}: decorate it with role_required(…) or public"
        assert getattr(view, ROLE_ATTRIBUTE) == role, entry


def test_every_operation_of_the_api_is_in_the_table_with_its_role() -> None:
    declared = {f"{op.method} {op.path}": op.role for op in operations()}
    assert declared == {entry: role for entry, (role, _) in API.items()}


def test_every_socket_is_in_the_table() -> None:
    assert {str(p.pattern) for p in websocket_urlpatterns} == set(SOCKETS)


def test_every_path_of_the_gateway_is_in_the_table() -> None:
    tree = ast.parse(textwrap.dedent(inspect.getsource(Gateway._answer)))
    written = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    paths = {text for text in written if text.startswith("/") and len(text) > 1} | {MODELS_PATH}
    listed = {entry.partition(" ")[2] for entry in GATEWAY}
    # Whatever else is under /v1/ goes to the engine; one such path stands for all.
    assert listed == paths | JSON_PATHS | FORM_PATHS | ROUTER_PATHS | {"/v1/anything/else"}


# -- and it is true -------------------------------------------------------------------------------


@pytest.fixture
def people(db: None) -> dict[Role | None, User]:
    return {
        role: user_create(email=f"{role}@lab.example", password="matrix-secret-1", role=role, actor=PANEL)
        for role in Role
    }


@pytest.fixture
def things(rig: Any, people: dict[Role | None, User]) -> dict[str, Any]:
    """What the routes' parameters name. The first owner stays, so that nobody can lock the team out."""
    profile = simulated_profile("for-members", members_may_switch=True)
    other = user_create(email="dora@lab.example", password="matrix-secret-1", role=Role.MEMBER, actor=PANEL)
    invitation, _ = invitation_create(role=Role.MEMBER, actor=PANEL)
    deployment = Deployment.objects.create(rig=rig, version=profile.current, served_name="x", status="stopped")
    install = EngineInstall.objects.create(rig_name=rig.slug, engine="vllm", name="found", command=["vllm"])
    run = VerificationRun.objects.create(suite="quick", rig=rig)
    return {
        "rig": rig.slug,
        "profile": profile.slug,
        "model": profile.current.model.slug,
        "member": other.public_id,
        "deployment": deployment.pk,
        "install": install.pk,
        "verification": run.pk,
        "invitation": invitation.pk,
        "person": other.pk,
        "key": 2**40,
        "pin": 2**40,  # as of somebody who is gone: 404
        "pause": 2**40,
        "pk": 2**40,
        "slot": 2**40,
        "name": "team-default",
        "token": "spent",
    }


def job_of(user: User | None) -> Job:
    return Job.objects.create(
        kind="switch", title="x", rig_name="r", queue="q", user=user, user_name="x", exclusion=f"x{time.monotonic_ns()}"
    )


def page_path(route: str, things: dict[str, Any], user: User | None) -> str:
    app = route.partition("/")[0]
    pk = {
        "team": things["invitation"] if "invitations" in route else things["person"],
        "me": things["key"],
        "installs": things["install"],
        "deployments": things["deployment"],
        "jobs": job_of(user).pk,
        "verify": things["verification"],
    }.get(app, 0)
    slug = {"models": things["model"], "profiles": things["profile"]}.get(app, "")
    for name, value in {
        "<int:pk>": pk,
        "<slug:slug>": slug,
        "<slug:name>": "head",
        "<str:token>": things["token"],
        "<str:uid>": "MQ",
        "<path:name>": "team/default",
        "^(?P<rest>.*)$": "never/was",
    }.items():
        route = route.replace(name, str(value))
    return f"/{route}"


def api_path(path: str, things: dict[str, Any], user: User | None) -> str:
    return path.format(**{**things, "job": job_of(user).pk if "{job}" in path else 0})


def outcome(answer: Any) -> str:
    if answer.status_code == 401 or "/accounts/login/?next=" in answer.headers.get("Location", ""):
        return SIGN_IN
    assert answer.status_code != 500
    return FORBIDDEN if answer.status_code == 403 else OK


# Strangers come first and owners last: whatever an allowed request changes comes after the refusals.
@pytest.mark.parametrize("entry", PAGES, ids=str)
def test_pages(entry: str, people: dict[Any, User], things: dict[str, Any]) -> None:
    method, _, route = entry.partition(" ")
    needed, body = PAGES[entry]
    found = {}
    for role in WHO:
        client = Client()
        if role is not None:
            client.force_login(people[role])
        path = page_path(route, things, people.get(role))
        answer = client.post(path, body) if method == "POST" else client.get(path)
        assert answer.status_code != 405
        found[named(role)] = outcome(answer)
    assert found == {named(role): expected(needed, role) for role in WHO}


@pytest.mark.parametrize("by", ["session", "key"])
@pytest.mark.parametrize("entry", API, ids=str)
def test_api(entry: str, by: str, people: dict[Any, User], things: dict[str, Any]) -> None:
    method, _, path = entry.partition(" ")
    needed, body = API[entry]
    found, wanted = {}, {named(role): expected(needed, role) for role in WHO}
    if by == "key":
        wanted["viewer"] = SIGN_IN  # viewers have no keys, and an old one is void
    for role in WHO:
        client = Client()
        if by == "key":
            client = Client(headers={"Authorization": f"Bearer {key_of(people.get(role))}"})
        elif role is not None:
            client.force_login(people[role])
        url = api_path(path, things, people.get(role))
        answer = client.generic(method, url, json.dumps(body), content_type="application/json")
        assert answer.status_code != 405
        found[named(role)] = outcome(answer)
        if found[named(role)] != OK:
            assert set(answer.json()["error"]) <= {"code", "message", "fields"}
    assert found == wanted


def key_of(user: User | None) -> str:
    """A key of theirs; a viewer's is from when they were a member."""
    if user is None:
        return "rp-never-was"
    role = Role(user.role)
    if role == Role.VIEWER:
        user = user_update(user, actor=PANEL, role=Role.MEMBER)
    _, token = key_create(user, name="matrix", actor=actor_of(user))
    if role == Role.VIEWER:
        user_update(user, actor=PANEL, role=Role.VIEWER)
    return token


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("path", SOCKETS, ids=str)
def test_sockets(path: str, people: dict[Any, User], rig: Any) -> None:
    found = {named(role): socket_outcome(path, people.get(role)) for role in WHO}
    assert found == {named(role): expected(SOCKETS[path][0], role) for role in WHO}


def socket_outcome(path: str, user: User | None) -> str:
    from rigpanel.asgi import application

    client = Client()
    if user is not None:
        client.force_login(user)
    cookies = "; ".join(f"{name}={morsel.value}" for name, morsel in client.cookies.items())
    headers = [(b"origin", b"http://testserver"), (b"host", b"testserver"), (b"cookie", cookies.encode())]
    scope = {"type": "websocket", "path": f"/{path}", "query_string": b"", "headers": headers, "subprotocols": []}

    async def connect() -> str:
        socket = ApplicationCommunicator(application, scope)
        await socket.send_input({"type": "websocket.connect"})
        first = await socket.receive_output(timeout=10)
        if first["type"] == "websocket.accept":
            if await socket.receive_nothing(timeout=0.2):
                first = {"type": "nothing more"}
            else:
                first = await socket.receive_output(timeout=10)
        await socket.send_input({"type": "websocket.disconnect", "code": 1000})
        await socket.wait(timeout=10)
        if first["type"] != "websocket.close":
            return OK
        return SIGN_IN if first.get("code") == SIGNED_OUT else FORBIDDEN

    return async_to_sync(connect)()


@pytest.mark.parametrize("entry", GATEWAY, ids=str)
def test_gateway(entry: str, people: dict[Any, User], monkeypatch: pytest.MonkeyPatch) -> None:
    # Its own looks at the database are on other connections. They see nothing of this test, and wait for its end on
    # SQLite; on PostgreSQL the row with which a gateway registers itself would be there for all tests after it.
    monkeypatch.setattr(Registration, "refresh_now", looks_at_nothing)
    method, _, path = entry.partition(" ")
    needed, body = GATEWAY[entry]
    found = {}
    for role in WHO:
        headers = [] if role is None else [(b"authorization", f"Bearer {key_of(people[role])}".encode())]
        gateway = Gateway()
        gateway.keys.apply(1, keys_load())
        gateway.keys.confirmed_at = time.monotonic()
        status = async_to_sync(asked)(gateway, method, path, headers, json.dumps(body).encode() if body else b"")
        found[named(role)] = SIGN_IN if status == 401 else FORBIDDEN if status == 403 else OK
    wanted = {named(role): expected(needed, role) for role in WHO}
    # A key of somebody who is a viewer now is refused like one that is not known.
    assert found == {who: SIGN_IN if it == FORBIDDEN else it for who, it in wanted.items()}


async def looks_at_nothing(_: Registration) -> None:
    """What it was told stays."""


async def asked(gateway: Gateway, method: str, path: str, headers: list[Any], body: bytes) -> int:
    """The status of one request that comes from another machine."""
    sent: list[dict[str, Any]] = []
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        return waiting.pop() if waiting else {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope: Entry | Any = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [*headers, (b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())],
        "client": ("203.0.113.5", 40000),
    }
    await gateway(scope, receive, send)
    return int(next(m["status"] for m in sent if m["type"] == "http.response.start"))
