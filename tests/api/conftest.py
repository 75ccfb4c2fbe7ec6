from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from django.test import Client

from apps.accounts.services import key_create
from apps.common.actors import actor_of


@pytest.fixture
def api() -> Callable[[Any], Client]:
    """``api(bob)`` is a client with a key of bob's; ``api(None)`` one of nobody."""

    def client_of(user: Any) -> Client:
        if user is None:
            return Client()
        _, token = key_create(user, name="tests", actor=actor_of(user))
        return Client(headers={"Authorization": f"Bearer {token}"})

    return client_of
