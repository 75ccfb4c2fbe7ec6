from __future__ import annotations

import time
from pathlib import Path

import pytest

from apps.common.cache import StoreCache


@pytest.fixture
def dead(tmp_path: Path) -> StoreCache:
    return StoreCache(f"unix://{tmp_path / 'nobody.sock'}", {"KEY_PREFIX": "t"})


def test_a_dead_store_is_no_error_and_this_process_goes_on_counting(dead: StoreCache) -> None:
    assert dead.get("tries", []) == []
    dead.set("tries", [1.0], 60)
    assert dead.get("tries") == [1.0], "a limit still counts while the store is away"
    assert dead.add("lock", True, timeout=10)
    assert not dead.add("lock", True, timeout=10)
    dead.delete("lock")
    assert dead.add("lock", True, timeout=10)
    assert dead.get_many(["tries", "never"]) == {"tries": [1.0]}
    assert dead.has_key("tries")


def test_a_dead_store_is_asked_once_and_then_left_alone_for_a_while(dead: StoreCache) -> None:
    dead.get("tries")
    assert dead._silent_until > time.monotonic()


def test_sign_in_works_while_the_store_is_down(client: object, bob: object, settings: object, tmp_path: Path) -> None:
    from django.test import Client

    settings.CACHES = {  # type: ignore[attr-defined]
        "default": {"BACKEND": "apps.common.cache.StoreCache", "LOCATION": f"unix://{tmp_path / 'nobody.sock'}"}
    }
    browser = Client()
    wrong = browser.post("/accounts/login/", {"login": "bob@lab.example", "password": "wrong"})
    assert wrong.status_code == 422
    right = browser.post("/accounts/login/", {"login": "bob@lab.example", "password": "bob-secret-1"})
    assert right.status_code == 302
    for _ in range(12):
        answer = Client().post("/accounts/login/", {"login": "bob@lab.example", "password": "wrong"})
    assert answer.status_code in (422, 429)
    assert (
        Client().post("/accounts/login/", {"login": "bob@lab.example", "password": "bob-secret-1"}).status_code != 302
    )
