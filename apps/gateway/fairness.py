"""Who is next when an engine is full: turns by person, so that twenty agents of one do not starve the chat of another.

An engine runs so many requests at once (vLLM's ``max_num_seqs``, llama.cpp's ``parallel``, or fewer, see ``pace.py``);
more would wait inside it, first come first served. So the rest waits here. A free turn goes to the waiting person who
holds the fewest turns for their share; among equals to the one who was served least lately (virtual time, as in fair
queueing); of one person's requests to the oldest. No turn stays free while somebody waits. With free turns it costs a
few dictionary look-ups.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field

from apps.gateway.observer import Exchange

Person = int | str  # an account's id, or the address of somebody without one


@dataclass(slots=True)
class _Person:
    running: int = 0
    served: float = 0.0  # virtual time: grows by 1 / share with each turn
    share: int = 1
    waiting: deque[Hashable] = field(default_factory=deque)


class FairQueue:
    """Pure: tickets in, tickets out. ``slots`` is how many turns there are at once."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.running = 0
        self.waiting = 0
        self._people: dict[Person, _Person] = {}
        self._clock = 0.0  # the virtual time of the last turn that was given

    def ask(self, ticket: Hashable, person: Person, share: int = 1) -> bool:
        """True: it is its turn. False: it waits, and a later ``done``, ``resize`` or ``leave`` returns its ticket."""
        known = self._people.get(person)
        if known is None:
            known = self._people[person] = _Person()
        if not known.running and not known.waiting:
            # Who comes (back) does not bring along the turns that they did not want before.
            known.served = max(known.served, self._clock)
        known.share = max(1, share)
        if self.running < self.slots and not self.waiting:
            self._give(known)
            return True
        known.waiting.append(ticket)
        self.waiting += 1
        return False

    def leave(self, ticket: Hashable, person: Person) -> bool:
        """A waiting ticket is given back. False when it did not wait (any more)."""
        known = self._people.get(person)
        if known is None or ticket not in known.waiting:
            return False
        known.waiting.remove(ticket)
        self.waiting -= 1
        self._forget(person, known)
        return True

    def done(self, person: Person) -> list[Hashable]:
        """A turn of this person is over. Returns the tickets whose turn it is now."""
        known = self._people[person]
        known.running -= 1
        self.running -= 1
        self._forget(person, known)
        return self._next()

    def resize(self, slots: int) -> list[Hashable]:
        """The engine takes another number at once. Returns the tickets whose turn it is now."""
        self.slots = slots
        return self._next()

    @property
    def is_idle(self) -> bool:
        return not self.running and not self.waiting

    def _next(self) -> list[Hashable]:
        given = []
        while self.waiting and self.running < self.slots:
            person = min((p for p in self._people.values() if p.waiting), key=lambda p: (p.running / p.share, p.served))
            given.append(person.waiting.popleft())
            self.waiting -= 1
            self._give(person)
        return given

    def _give(self, person: _Person) -> None:
        self._clock = max(self._clock, person.served)
        person.served += 1 / person.share
        person.running += 1
        self.running += 1

    def _forget(self, person: Person, known: _Person) -> None:
        if not known.running and not known.waiting and known.served <= self._clock:
            del self._people[person]


@dataclass(slots=True, eq=False)
class _Ticket:
    future: asyncio.Future[None]
    lane: str
    queue: FairQueue
    person: Person


class Turns:
    """The queues of all models; belongs to the event loop's thread."""

    def __init__(self) -> None:
        self._queues: dict[str, FairQueue] = {}
        self._held: dict[int, _Ticket] = {}  # by id() of the exchange that has a turn or waits for one

    @property
    def waiting(self) -> int:
        return sum(queue.waiting for queue in self._queues.values())

    def turn(self, exchange: Exchange, lane: str, slots: int, share: int) -> asyncio.Future[None] | None:
        """None: go. Else a future that is done when it may; cancelling it gives the place up."""
        queue = self._queues.get(lane)
        if queue is None:
            queue = self._queues[lane] = FairQueue(slots)
        else:
            self.resize(lane, slots)
        person: Person = exchange.guest or exchange.user_id
        ticket = _Ticket(asyncio.get_running_loop().create_future(), lane, queue, person)
        self._held[id(exchange)] = ticket
        if queue.ask(ticket, person, share):
            return None

        def ended(future: asyncio.Future[None], known_as: int = id(exchange)) -> None:
            if future.cancelled():
                queue.leave(ticket, person)
                if self._held.get(known_as) is ticket:
                    del self._held[known_as]

        ticket.future.add_done_callback(ended)
        return ticket.future

    def lanes(self) -> dict[str, int]:
        """How many turns are taken, by lane."""
        return {lane: queue.running for lane, queue in self._queues.items()}

    def resize(self, lane: str, slots: int) -> None:
        queue = self._queues.get(lane)
        if queue is not None and queue.slots != slots:
            _wake(queue.resize(slots))

    def over(self, exchange: Exchange) -> None:
        ticket = self._held.pop(id(exchange), None)
        if ticket is None:
            return  # the lane had no bound when it began
        queue = ticket.queue
        _wake(queue.done(ticket.person))
        if queue.is_idle and self._queues.get(ticket.lane) is queue:
            del self._queues[ticket.lane]


def _wake(tickets: list[Hashable]) -> None:
    """Their turn has come. One that was given up in this very moment hands it on."""
    while tickets:
        ticket = tickets.pop(0)
        assert isinstance(ticket, _Ticket)  # noqa: S101 - what ``turn`` put in
        if ticket.future.done():
            tickets += ticket.queue.done(ticket.person)
        else:
            ticket.future.set_result(None)
