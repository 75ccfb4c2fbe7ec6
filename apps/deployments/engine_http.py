"""Requests straight to an engine, with its launch's own key."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

from apps.deployments.models import Replica
from apps.engines.protocol import HealthProbe

BODY_MAX_BYTES = 1 << 20


def doors(replicas: Iterable[Replica]) -> list[Replica]:
    """One replica for each address: all of them, but for engines that serve several replicas behind one."""
    by_address: dict[str, Replica] = {}
    for replica in replicas:
        by_address.setdefault(replica.base_url, replica)
    return list(by_address.values())


def ask(
    replica: Replica, method: str, path: str, body: Any = None, *, limit_seconds: float = 2.0
) -> tuple[int | None, str]:
    """Status and body (at most 1 MiB of it); ``(None, why)`` when nothing answered."""
    parts = urlsplit(replica.base_url)
    connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=limit_seconds)
    headers = {"Authorization": f"Bearer {replica.engine_key}", "Content-Type": "application/json"}
    try:
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        answer = connection.getresponse()
        return answer.status, answer.read(BODY_MAX_BYTES).decode("utf-8", "replace").replace("\x00", "\ufffd")
    except (OSError, http.client.HTTPException) as error:
        return None, str(error)
    finally:
        connection.close()


def probe_health(replica: Replica, path: str) -> HealthProbe:
    status, body = ask(replica, "GET", path)
    return HealthProbe(status, body[:2000])


def one_token(replica: Replica, served_name: str, *, limit_seconds: float) -> tuple[int | None, str]:
    """The smallest request that makes the engine work; status and body as ``ask`` gives them."""
    completion = {"model": served_name, "prompt": "The capital of France is", "max_tokens": 1, "temperature": 0}
    status, text = ask(replica, "POST", "/v1/completions", completion, limit_seconds=limit_seconds)
    if status in (404, 501):  # an embedding model has no completions
        embedding = {"model": served_name, "input": "hello"}
        return ask(replica, "POST", "/v1/embeddings", embedding, limit_seconds=limit_seconds)
    return status, text
