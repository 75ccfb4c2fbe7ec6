from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import pytest
from django.test import Client

from apps.accounts.models import User
from apps.accounts.services import invitation_create, reset_path
from apps.common.actors import PANEL
from apps.common.roles import Role
from rigpanel.logs import hide_links


@pytest.fixture
def logged() -> Iterator[io.StringIO]:
    """What the panel's own handler writes."""
    (handler,) = [h for h in logging.getLogger().handlers if type(h) is logging.StreamHandler]
    written = io.StringIO()
    before = handler.setStream(written)
    yield written
    handler.setStream(before)


def test_links_that_let_people_in_are_not_in_the_log(client: Client, bob: User, logged: io.StringIO) -> None:
    _, join = invitation_create(role=Role.MEMBER, actor=PANEL)
    reset = reset_path(bob, actor=PANEL)
    for path in (join, reset):
        assert client.post(path, {"password": "short"}).status_code == 422
    text = logged.getvalue()
    assert "/join/…" in text
    assert "/reset/…" in text
    for path in (join, reset):
        assert path.split("/")[-2] not in text


def test_other_paths_stay_readable() -> None:
    event = {"request": "GET /jobs/17/", "n": 3}
    assert hide_links(None, "info", dict(event)) == event
