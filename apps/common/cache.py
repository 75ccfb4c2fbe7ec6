"""Django's cache on the store, with a memory of its own for the moments when the store is away.

The cache holds the counters of the sign-in limits. A store that restarts must not turn a sign-in into an
error page, nor open the limits: while it cannot be reached, this process counts for itself.
"""

from __future__ import annotations

import time
from typing import Any

import structlog
from django.core.cache.backends.base import DEFAULT_TIMEOUT
from django.core.cache.backends.locmem import LocMemCache
from django.core.cache.backends.redis import RedisCache
from redis import RedisError
from redis.backoff import NoBackoff
from redis.retry import Retry

log = structlog.get_logger(__name__)
# How long a store that failed is not asked again: a page must not wait for a timeout per counter.
SILENCE_SECONDS = 2.0
LOCAL_ENTRIES_MAX = 2000


class StoreCache(RedisCache):
    """Redis, or a small local memory while Redis does not answer."""

    def __init__(self, server: Any, params: dict[str, Any]) -> None:
        # redis-py waits with growing pauses between three tries by default: seconds, for a dead store.
        options = {"socket_timeout": 2, "socket_connect_timeout": 1, "retry": Retry(NoBackoff(), 1)}
        super().__init__(server, {**params, "OPTIONS": {**options, **params.get("OPTIONS", {})}})
        self._local = LocMemCache("store-cache-fallback", {"MAX_ENTRIES": LOCAL_ENTRIES_MAX})
        self._silent_until = 0.0

    def _ask(self, name: str, *args: Any, **kwargs: Any) -> Any:
        if time.monotonic() >= self._silent_until:
            try:
                return getattr(RedisCache, name)(self, *args, **kwargs)
            except (RedisError, OSError) as error:
                self._silent_until = time.monotonic() + SILENCE_SECONDS
                log.warning("cache falls back to this process", error=str(error))
        return getattr(self._local, name)(*args, **kwargs)

    def add(self, key: Any, value: Any, timeout: Any = DEFAULT_TIMEOUT, version: int | None = None) -> bool:
        return bool(self._ask("add", key, value, timeout=timeout, version=version))

    def get(self, key: Any, default: Any = None, version: int | None = None) -> Any:
        return self._ask("get", key, default=default, version=version)

    def set(self, key: Any, value: Any, timeout: Any = DEFAULT_TIMEOUT, version: int | None = None) -> None:
        self._ask("set", key, value, timeout=timeout, version=version)

    def touch(self, key: Any, timeout: Any = DEFAULT_TIMEOUT, version: int | None = None) -> bool:
        return bool(self._ask("touch", key, timeout=timeout, version=version))

    def delete(self, key: Any, version: int | None = None) -> bool:
        return bool(self._ask("delete", key, version=version))

    def get_many(self, keys: Any, version: int | None = None) -> dict[Any, Any]:
        return dict(self._ask("get_many", keys, version=version))

    def has_key(self, key: Any, version: int | None = None) -> bool:
        return bool(self._ask("has_key", key, version=version))

    def incr(self, key: Any, delta: int = 1, version: int | None = None) -> int:
        return int(self._ask("incr", key, delta=delta, version=version))

    def set_many(self, data: Any, timeout: Any = DEFAULT_TIMEOUT, version: int | None = None) -> list[Any]:
        return list(self._ask("set_many", data, timeout=timeout, version=version))

    def delete_many(self, keys: Any, version: int | None = None) -> None:
        self._ask("delete_many", list(keys), version=version)

    def clear(self) -> None:
        """Forget only what this cache wrote: RedisCache would flush the database, and with it the
        messages of the workers."""
        client = self._cache.get_client(None, write=True)
        found = list(client.scan_iter(match=f"{self.key_prefix}:*", count=500))
        if found:
            client.delete(*found)
        self._local.clear()
