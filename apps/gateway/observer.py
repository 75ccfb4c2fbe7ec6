"""What others may see and say of a request: one ``Exchange`` per request, one ``Observer`` per process.

The gateway tells when a request begins, when it may go to an engine, and how it ended. Who counts, limits or queues
sits behind this seam, so the data plane knows neither a ledger nor a quota. Everything here runs in the event
loop's thread, on the hot path: nothing may block, look at the database or write to a disk that can hang.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

REFUSED = "refused"


@dataclass(slots=True)
class Exchange:
    """A request and what is known of it so far. Times in seconds, sizes in bytes; ``None`` is unknown, never 0.

    ``user_id``        who asks: the key's owner, or the person that Open WebUI's signed header names behind its key
    ``key_owner_id``   whose key it is
    ``guest``          who asks behind Open WebUI's key without an account here (an address): then ``user_id`` is the
                       key's owner, who answers for the use, but turns and switches are the guest's own
    ``model``          the served name; ``asked_model`` is what the client wrote, which may be an alias of it
    ``task``           what kind of background work (Open WebUI's titles, tags, ...); empty for what a person waits for
    ``tokens_limit``   the most tokens the client asks for (``max_tokens`` and its kin)
    ``tokens_held``    how many tokens count against quotas while it runs, before it is known how many it took
    ``deployment_id``, ``version_id``  who answers (and its profile version); set before the engine is asked
    ``tokens_in``      with ``tokens_cached``, which are a part of it
    ``events``         data events of a stream that were passed on, about one per token: what is known when a client
                       leaves before the figures come
    ``first_token_s``  from the request's head to a stream's first text, reasoning or call of a tool (not to its head or
                       the event that only opens it), of another answer to its head; None before
    ``waited_s``       of it in the waiting room and in the queue
    ``status``         what the client got; 200 where the engine's error came as an event of a stream that had begun
    ``outcome``        ``ok``, ``refused`` (the engine answered with an error), or the gateway's own error code
                       (``client_gone``, ``engine_died``, ``model_loading``, ...)
    """

    request_id: str
    path: str
    key_id: int
    key_owner_id: int
    user_id: int
    asked_model: str
    model: str
    stream: bool
    began_at: float  # POSIX time
    body_bytes: int
    tokens_limit: int | None = None
    task: str = ""
    guest: str = ""
    tokens_held: int = 0
    deployment_id: int | None = None
    version_id: int | None = None
    tokens_in: int | None = None
    tokens_out: int | None = None
    tokens_cached: int | None = None
    events: int = 0
    first_token_s: float | None = None
    waited_s: float = 0.0
    duration_s: float | None = None
    status: int | None = None
    outcome: str = ""
    answer_headers: list[tuple[bytes, bytes]] = field(default_factory=list)


class Observer:
    """Sees everything and does nothing; what counts or limits overrides what it needs."""

    async def start(self) -> None:
        """Before the first request."""

    async def stop(self) -> None:
        """After the last one."""

    def admit(self, exchange: Exchange) -> None:
        """May the request begin? Raises ``GatewayError`` (429) if not: then neither ``open`` nor ``close`` follow.

        What is put into ``exchange.answer_headers`` (``x-ratelimit-*``) is sent with the answer.
        """

    def refused(self, *, user_id: int, key_id: int, model: str, code: str) -> None:
        """The gateway refused a request of a known key before it began, over a limit or for what was wrong with it;
        neither ``open`` nor ``close`` follow. ``model``: the served name, as far as it was known."""

    def open(self, exchange: Exchange) -> None:
        """It begins. ``close`` follows exactly once, unless the process is killed."""

    def turn(self, exchange: Exchange) -> asyncio.Future[None] | None:
        """May it go to an engine now? None: yes. Else a future that is done when its turn has come, or that raises a
        ``GatewayError``. The gateway keeps the client alive meanwhile and cancels the future when it leaves."""
        return None

    def turn_over(self, exchange: Exchange) -> None:
        """It is not at an engine any more (it may ask for another turn). Once for each turn that was given: after None,
        or after a future that was done without an error and not cancelled."""

    def close(self, exchange: Exchange) -> None:
        """It ended; everything that will ever be known is in ``exchange``."""
