from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from apps.common.store import store
from tests.factories.store import Valkey, valkey


@pytest.fixture(scope="session")
def valkey_server() -> Iterator[Valkey]:
    with valkey() as server:
        yield server


@pytest.fixture
def live_store(valkey_server: Valkey, settings: Any) -> Iterator[Valkey]:
    """The panel's store is this Valkey, emptied."""
    settings.REDIS_URL = valkey_server.url
    store.cache_clear()
    store().flushall()
    yield valkey_server
    store().close()
    store.cache_clear()
