"""One-token probes of engines that should serve: does it still generate, or only listen?

A probe runs in a thread of its own, so that an engine that hangs holds up nothing else. It does not disturb: while the
engine's own counters show tokens coming, that is the answer and nothing is asked. What is known is kept in this
process; after a restart of the worker it is learnt again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from apps.deployments.engine_http import ask, one_token
from apps.deployments.models import Replica, RestartPolicy
from apps.engines.protocol import CanSleep, EngineAdapter

METRICS_SECONDS = 2.0
AGAIN_SECONDS = 1.0  # after a probe that failed
KEPT_MAX = 200
# What a healthy engine answers to one token: the answer, or that it has too much to do.
ALIVE = frozenset({200, 429})


@dataclass(slots=True)
class Known:
    failed: int = 0
    next_at: float = 0.0
    confirmed: bool = False
    work_done: float | None = None
    at_work: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


_known: dict[str, Known] = {}


def _key(replica: Replica) -> str:
    """Replicas behind one address are one engine to ask."""
    return f"{replica.base_url} {replica.engine_key}"


def probe(
    replica: Replica,
    served_name: str,
    engine: EngineAdapter,
    policy: RestartPolicy,
    *,
    suspect: bool = False,
    asleep: bool = False,
) -> int:
    """Start a probe where one is due; returns how many failed in a row so far.

    ``suspect``: ask at once and do not take the engine's own counters for an answer; see ``confirmed``. One that is
    ``asleep`` generates nothing: it is asked whether it sleeps."""
    if policy.probe_every_seconds <= 0:
        return 0
    known = _known.get(_key(replica))
    if known is None:
        while len(_known) >= KEPT_MAX:
            _known.pop(next(iter(_known)), None)
        known = _known[_key(replica)] = Known(next_at=time.monotonic() + policy.probe_every_seconds)
    with known.lock:
        if not suspect:
            known.confirmed = False
        urgent = suspect and not known.failed and not known.confirmed
        if (urgent or time.monotonic() >= known.next_at) and not known.at_work:
            known.at_work = True
            work = (known, replica, served_name, engine, policy, suspect, asleep)
            threading.Thread(target=_work, args=work, name=f"probe-{replica.launch_id}", daemon=True).start()
        return known.failed


def forget(replicas: Iterable[Replica]) -> None:
    """They serve from now on. What was found out before says nothing of that: they were loading, or an earlier launch
    with the same key at the same port hung."""
    for replica in replicas:
        _known.pop(_key(replica), None)


def confirmed(replica: Replica) -> bool:
    """Whether the engine answered since it is under suspicion."""
    known = _known.get(_key(replica))
    return known is not None and known.confirmed


def _work(
    known: Known,
    replica: Replica,
    served_name: str,
    engine: EngineAdapter,
    policy: RestartPolicy,
    suspect: bool,
    asleep: bool,
) -> None:
    limit = policy.probe_limit_seconds
    try:
        if asleep:
            path = engine.asleep_path if isinstance(engine, CanSleep) else engine.health_path
            well = ask(replica, "GET", path, limit_seconds=limit)[0] == 200
        else:
            well = (not suspect and _generates(known, replica, engine)) or (
                one_token(replica, served_name, limit_seconds=limit)[0] in ALIVE
            )
    except Exception:  # an answer that cannot be read is none
        well = False
    with known.lock:
        known.at_work = False
        known.failed = 0 if well else known.failed + 1
        known.next_at = time.monotonic() + (policy.probe_every_seconds if well else AGAIN_SECONDS)
        known.confirmed = well and suspect


def _generates(known: Known, replica: Replica, engine: EngineAdapter) -> bool:
    """Whether it has generated since the last look, and works on requests now."""
    status, text = ask(replica, "GET", engine.metrics_path, limit_seconds=METRICS_SECONDS)
    if status != 200:
        return False
    metrics = engine.parse_metrics(text)
    done = metrics.generation_tokens_total if metrics.steps_total is None else metrics.steps_total
    before, known.work_done = known.work_done, done
    grown = before is not None and done is not None and done > before
    return grown and bool(metrics.requests_running)
