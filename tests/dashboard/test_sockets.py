"""Both sockets through the whole ASGI application: Origin, session, role, snapshot, news."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from channels.db import database_sync_to_async
from django.test import Client
from django.utils import timezone

from apps.common import sockets
from apps.common.realtime import page_changed, telemetry_frame
from apps.common.sockets import SIGNED_OUT
from apps.deployments.models import Deployment, GatewayProcess
from apps.jobs.models import Job
from apps.telemetry.frames import FrameBuilder, keep, viewers_key
from tests.dashboard.test_home import deploy
from tests.factories.sockets import Socket
from tests.telemetry.readings import card, reading

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.asyncio]
Opener = Callable[..., Awaitable[Socket]]


def cookie_of(user: Any) -> bytes:
    client = Client()
    client.force_login(user)
    return "; ".join(f"{k}={v.value}" for k, v in client.cookies.items()).encode()


@pytest.fixture
async def opened(live_store: Any) -> AsyncIterator[Opener]:
    """Opens sockets and closes them before the store goes: a socket that still writes to it would find it closed."""
    from rigpanel.asgi import application  # loads the apps, so not before the settings are

    sockets_open: list[Socket] = []

    async def open_socket(path: str, user: Any = None, origin: bytes = b"http://127.0.0.1:8080") -> Socket:
        headers = [(b"origin", origin), (b"host", b"127.0.0.1:8080")]
        if user is not None:
            headers.append((b"cookie", await sync_to_async(cookie_of)(user)))
        socket = Socket(application, path, headers)
        sockets_open.append(socket)
        return socket

    yield open_socket
    for socket in sockets_open:
        await socket.close()


async def until(socket: Socket, wanted: str) -> str:
    """The next message that has ``wanted`` in it."""
    while True:
        message = await socket.text()
        if wanted in message:
            return message


@pytest.mark.parametrize("path", ["/ws/telemetry/", "/ws/pages/?watch=home"])
async def test_a_stranger_is_let_go_with_the_code_for_signed_out(opened: Opener, rig: Any, path: str) -> None:
    socket = await opened(path)
    await socket.connect()
    closed = await socket.receive()
    assert (closed["type"], closed["code"]) == ("websocket.close", SIGNED_OUT)


@pytest.mark.parametrize("path", ["/ws/telemetry/", "/ws/pages/"])
async def test_another_sites_page_may_not_open_a_socket(opened: Opener, rig: Any, alice: Any, path: str) -> None:
    socket = await opened(path, alice, origin=b"https://elsewhere.example")
    assert not await socket.connect()


async def test_a_new_watcher_gets_header_history_and_the_newest_frame(opened: Opener, rig: Any, charlie: Any) -> None:
    frames = FrameBuilder()
    for second in (2, 1, 0):
        await sync_to_async(keep)(
            rig.slug, frames.build(reading(time.time() - second, card(), card("GPU-b", power_watts=None)))
        )
    socket = await opened("/ws/telemetry/", charlie)
    assert await socket.connect()
    header, history, frame = [json.loads(await socket.text()) for _ in range(3)]
    assert header["gpus"] == ["GPU-a", "GPU-b"]
    assert history["gpus"] == [[50.0] * 3, [50.0] * 3]
    watts = header["fields"].index("power_watts")
    assert [row[watts] for row in frame["g"]] == [250.0, None]


async def test_frames_arrive_and_the_sampler_learns_that_somebody_looks(opened: Opener, rig: Any, charlie: Any) -> None:
    from apps.common.store import store

    socket = await opened("/ws/telemetry/", charlie)
    await socket.connect()
    await socket.text()
    await sync_to_async(telemetry_frame)(rig.slug, FrameBuilder().build(reading(1000.0, card("GPU-new"))))
    assert json.loads(await socket.text())["gpus"] == ["GPU-new"]
    assert json.loads(await socket.text())["t"] == 1000.0
    assert await sync_to_async(store().exists)(viewers_key(rig.slug))


async def test_a_page_gets_a_snapshot_and_then_what_changes(opened: Opener, rig: Any, bob: Any) -> None:
    socket = await opened("/ws/pages/?watch=nav,home", bob)
    await socket.connect()
    snapshot = await socket.text()
    assert 'id="serving"' in snapshot
    assert 'id="last-jobs"' in snapshot
    job = await database_sync_to_async(Job.objects.create)(
        kind="verify",
        title="Check the rig",
        rig_name=rig.slug,
        queue="q",
        user_name="bob",
        state="succeeded",
        result={"summary": "All is well."},
    )
    await database_sync_to_async(page_changed)("job", job=job.pk)
    changed = await until(socket, "Check the rig")
    assert 'id="last-jobs"' in changed
    assert 'id="home-cards"' not in changed
    spoken = await until(socket, "announcer")
    assert "Check the rig: succeeded. All is well." in spoken
    assert 'hx-swap-oob="innerHTML"' in spoken


async def test_many_messages_of_one_moment_are_few_drawings(opened: Opener, rig: Any, bob: Any) -> None:
    socket = await opened("/ws/pages/?watch=nav", bob)
    await socket.connect()
    await socket.text()

    def burst() -> None:
        for _ in range(50):
            job = Job.objects.create(kind="verify", title="Check", rig_name=rig.slug, queue="q", state="queued")
            page_changed("job", job=job.pk)

    await database_sync_to_async(burst)()
    drawings = 0
    while not await socket.is_silent(1.0):
        assert 'id="nav-jobs"' in await socket.text()
        drawings += 1
    assert 1 <= drawings < 10


async def test_what_has_not_changed_is_not_drawn_again_under_somebodys_pointer(
    opened: Opener, rig: Any, alice: Any, live_store: Any
) -> None:
    # For days: "ready 3 s ago" would be drawn anew a second later.
    deployment = await database_sync_to_async(deploy)(rig, created_at=timezone.now() - timedelta(days=3))
    await database_sync_to_async(Deployment.objects.update)(ready_at=timezone.now() - timedelta(days=3))
    socket = await opened("/ws/pages/?watch=home.serving", alice)
    await socket.connect()
    assert "<dt>streams</dt><dd>" not in await socket.text()
    await database_sync_to_async(page_changed)("engine", deployment=deployment.pk)
    assert await socket.is_silent(1.0)
    await database_sync_to_async(GatewayProcess.objects.create)(key="elsewhere:1:1", in_flight={str(deployment.pk): 1})
    await database_sync_to_async(page_changed)("engine", deployment=deployment.pk)
    assert "<dt>streams</dt><dd>1</dd>" in await socket.text()


async def test_a_page_may_say_later_what_it_shows_and_nonsense_is_ignored(opened: Opener, rig: Any, bob: Any) -> None:
    socket = await opened("/ws/pages/", bob)
    await socket.connect()
    for nonsense in ("{", "[]", '{"watch": 7}', '{"watch": ["secrets"]}'):
        await socket.send(nonsense)
    await socket.send(json.dumps({"watch": ["home.jobs"]}))
    assert 'id="last-jobs"' in await until(socket, "last-jobs")


async def test_a_session_that_ends_closes_the_open_sockets(
    opened: Opener, rig: Any, bob: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets, "RECHECK_SECONDS", 0.05)
    socket = await opened("/ws/pages/?watch=nav", bob)
    await socket.connect()
    await socket.text()
    bob.is_active = False
    await database_sync_to_async(bob.save)()
    closed = await socket.receive()
    assert closed["type"] == "websocket.close"
    assert closed["code"] == SIGNED_OUT
