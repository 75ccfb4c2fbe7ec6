"""The test request that a start has to answer before traffic goes to it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from threading import Event, Thread

from apps.deployments import launching
from apps.deployments.engine_http import doors, one_token
from apps.deployments.models import Deployment, Replica
from apps.deployments.stalls import Stall
from apps.jobs.handlers import JobFailed

SMOKE_SECONDS = 120.0  # a large model's first token comes late: kernels are still being compiled
LOOK_SECONDS = 0.2


def smoke(deployment: Deployment, pause: Callable[[float], None], replicas: Sequence[Replica] | None = None) -> str:
    """One real completion from every address, or from these. Raises JobFailed when one does not answer with tokens.

    ``pause`` waits and raises when the job must stop."""
    began = time.monotonic()
    for replica in doors(deployment.replicas.all()) if replicas is None else replicas:
        status, text = _asked(replica, deployment.served_name, pause)
        if status != 200:
            said = f"HTTP {status}: {text[:300]}" if status else text
            raise JobFailed(
                f"{deployment.profile_name} came up, but replica {replica.index} did not answer a test request: {said}",
                cause="smoke_failed",
            )
    return f"answered in {time.monotonic() - began:.2f} s"


def _asked(replica: Replica, served_name: str, pause: Callable[[float], None]) -> tuple[int | None, str]:
    """Status and body. The request has a thread of its own, so that a cancel or a stopped engine need not wait for it;
    it ends at its limit at the latest."""
    answers: list[tuple[int | None, str]] = []
    answered = Event()

    def ask() -> None:
        try:
            answers.append(one_token(replica, served_name, limit_seconds=SMOKE_SECONDS))
        except Exception as error:  # an answer that cannot be read is none
            answers.append((None, str(error)))
        finally:
            answered.set()

    Thread(target=ask, name=f"smoke-{replica.launch_id}", daemon=True).start()
    stall = Stall()
    while not answered.wait(LOOK_SECONDS):
        pause(0)
        if stall.is_due() and (stuck := stall.look(launching.observe(replica).pids, 0)):
            return None, stuck
    return answers[0]
