"""What running engines say about themselves: their /metrics, read on the rig, kept briefly in the store."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import redis
import structlog
from django.conf import settings

from apps.common.realtime import page_changed
from apps.common.store import store
from apps.deployments.engine_http import ask, doors
from apps.deployments.equipment import engine_adapter
from apps.deployments.history import looked
from apps.deployments.models import SERVING, Deployment
from apps.deployments.routes import in_flight
from apps.engines.protocol import EngineMetrics, InvalidOptions

log = structlog.get_logger(__name__)
TIMEOUT_SECONDS = 0.5
KEPT_SECONDS = 15


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """All replicas of a deployment together; None where none of them says."""

    generation_tokens_per_second: float | None = None
    requests_running: float | None = None
    requests_waiting: float | None = None
    kv_cache_usage_ratio: float | None = None  # of the fullest replica, 0..1
    time_to_first_token_seconds: float | None = None  # mean since the last look, else since the start


def scrape(rig_name: str, **_: Any) -> None:
    """The clock's beat: read every serving engine of this rig once and keep what it says."""
    if rig_name != settings.RIG_NAME:
        return
    serving = Deployment.objects.filter(rig__slug=rig_name, status__in=SERVING).select_related(
        "version__profile", "rig"
    )
    for deployment in serving.prefetch_related("replicas"):
        replicas = doors(r for r in deployment.replicas.all() if r.released_at is None and r.healthy)
        try:
            engine = engine_adapter(deployment.version, deployment.rig)
        except InvalidOptions:
            continue
        answers = [ask(r, "GET", engine.metrics_path, limit_seconds=TIMEOUT_SECONDS) for r in replicas]
        metrics = [engine.parse_metrics(text) for status, text in answers if status == 200]
        try:
            _keep(deployment.pk, metrics)
        except redis.RedisError as error:
            log.debug("engine facts not kept", error=str(error))
            return


def engine_facts(deployment_ids: Iterable[int]) -> dict[int, EngineFacts]:
    """What was last read of these deployments, without those that say nothing."""
    ids = list(deployment_ids)
    if not ids:
        return {}
    try:
        found = store().mget([_key(i) for i in ids])
    except redis.RedisError:
        return {}
    return {i: EngineFacts(**json.loads(raw)["facts"]) for i, raw in zip(ids, found, strict=True) if raw}


def summed(metrics: list[EngineMetrics], before: dict[str, float], at: float) -> tuple[EngineFacts, dict[str, float]]:
    """Facts of all replicas, and the counters that the next look subtracts."""
    counters = {"at": at}
    for name in ("generation_tokens_total", "time_to_first_token_seconds_sum", "time_to_first_token_count"):
        total = _sum(getattr(m, name) for m in metrics)
        if total is not None:
            counters[name] = total
    seconds = at - before.get("at", at)
    tokens = _grown("generation_tokens_total", counters, before)
    answers = _grown("time_to_first_token_count", counters, before)
    waited = _grown("time_to_first_token_seconds_sum", counters, before)
    if not answers:
        answers, waited = counters.get("time_to_first_token_count"), counters.get("time_to_first_token_seconds_sum")
    facts = EngineFacts(
        generation_tokens_per_second=tokens / seconds if tokens is not None and seconds > 0 else None,
        requests_running=_sum(m.requests_running for m in metrics),
        requests_waiting=_sum(m.requests_waiting for m in metrics),
        kv_cache_usage_ratio=max(
            (m.kv_cache_usage_ratio for m in metrics if m.kv_cache_usage_ratio is not None), default=None
        ),
        time_to_first_token_seconds=waited / answers if answers and waited is not None else None,
    )
    return facts, counters


def _keep(deployment_id: int, metrics: list[EngineMetrics]) -> None:
    raw = store().get(_key(deployment_id))
    kept = json.loads(str(raw)) if raw else {}
    streams = in_flight([deployment_id])  # what gateways count comes later than what engines say of the same answer
    facts, counters = summed(metrics, kept.get("counters", {}), time.time())
    before = (kept.get("facts") or {}).get("requests_running")
    looked(deployment_id, facts.generation_tokens_per_second, before, facts.requests_running)
    if metrics:
        store().set(
            _key(deployment_id),
            json.dumps({"facts": asdict(facts), "counters": counters, "streams": streams}),
            ex=KEPT_SECONDS,
        )
        if (asdict(facts), streams) != (kept.get("facts"), kept.get("streams")):
            page_changed("engine", deployment=deployment_id)


def _grown(name: str, now: dict[str, float], before: dict[str, float]) -> float | None:
    if name not in now or name not in before or now[name] < before[name]:
        return None
    return now[name] - before[name]


def _sum(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) if known else None


def _key(deployment_id: int) -> str:
    return f"rigpanel:engine:{deployment_id}"
