"""The Redis or Valkey connection, and the heartbeats kept there."""

from __future__ import annotations

import json
import time
from functools import lru_cache
from typing import Any

import redis
from django.conf import settings

from apps.common.identity import process_key

HEARTBEAT_SECONDS = 5
HEARTBEAT_EXPIRES_SECONDS = 20
RIGS_KEY = "rigpanel:rigs"  # sorted set: rig names by when their control worker was last seen


@lru_cache(maxsize=1)
def store() -> redis.Redis:
    """One pooled connection per process; commands raise ``redis.RedisError`` while the store is down."""
    return redis.Redis.from_url(settings.REDIS_URL, decode_responses=True, socket_timeout=3, socket_connect_timeout=2)


def heartbeat(process: str, rig_name: str = "", *, connection: redis.Redis | None = None, **facts: Any) -> None:
    """Say that a process is alive and working; forgotten after HEARTBEAT_EXPIRES_SECONDS."""
    value = json.dumps({"at": time.time(), "key": process_key(), **facts})
    (connection or store()).set(f"rigpanel:alive:{process}:{rig_name}", value, ex=HEARTBEAT_EXPIRES_SECONDS)


def last_heartbeat(process: str, rig_name: str = "") -> dict[str, Any] | None:
    """The last heartbeat, or None; raises redis.RedisError while the store is down."""
    raw = store().get(f"rigpanel:alive:{process}:{rig_name}")
    return json.loads(str(raw)) if raw else None
