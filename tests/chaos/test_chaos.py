"""Random clicks and accidents, and every promise checked after each round.

``CHAOS_ROUNDS`` (25), ``CHAOS_SEED`` and ``CHAOS_FIRST`` choose; ``CHAOS_WORLDS`` panels share the rounds and play them
side by side; with ``CHAOS_KEEP_GOING`` a round that fails is told, and the next ones are played in a new world. ``make
chaos`` sets them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

import pytest

from tests.chaos.world import World

pytestmark = pytest.mark.processes
ROUNDS = int(os.environ.get("CHAOS_ROUNDS") or 25)
FIRST = int(os.environ.get("CHAOS_FIRST") or 0)
SEED = int(os.environ.get("CHAOS_SEED") or 20260329)
WORLDS = int(os.environ.get("CHAOS_WORLDS") or 1)
KEEP_GOING = bool(os.environ.get("CHAOS_KEEP_GOING"))
NEW_WORLDS_MAX = 20  # a panel in which nothing works any more ends the run all the same
starting = Lock()  # one after the other: a start takes every core it gets


def play(numbers: Iterable[int], failures: list[str]) -> None:
    """These rounds one after the other in one warm panel; appends what was found to ``failures``."""
    began, world = time.monotonic(), None
    try:
        for number in numbers:
            if (failures and not KEEP_GOING) or len(failures) > NEW_WORLDS_MAX:
                return
            try:
                if world is None:
                    world = World(SEED)
                    with starting:
                        world.start()
                world.round(number)
                last = f"well after {time.monotonic() - began:.0f} s; {world.history[-1]}"
            except Exception as error:
                last = f"FAILED\n{error}"
                failures.append(f"round {number} of seed {SEED}: {error}")
                if world is not None:
                    world.stop()
                world = None
            print(f"round {number} of seed {SEED}: {last}", flush=True)
    finally:
        if world is not None:
            world.stop()


def test_rounds() -> None:
    failures: list[str] = []
    with ThreadPoolExecutor(WORLDS) as pool:
        played = [pool.submit(play, range(FIRST + n, ROUNDS, WORLDS), failures) for n in range(WORLDS)]
    for one in played:
        one.result()
    assert not failures, f"{len(failures)} rounds failed:\n" + "\n\n".join(failures)
