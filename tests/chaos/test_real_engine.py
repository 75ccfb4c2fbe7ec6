"""Rounds of the chaos suite with the real llama.cpp in the middle of it: ``make chaos REAL=5``."""

from __future__ import annotations

import os

import pytest

from tests.chaos.world import World
from tests.panel import Panel
from tests.real.conftest import GEMMA, hub, panel

__all__ = ["hub", "panel"]

ROUNDS = int(os.environ.get("CHAOS_REAL_ROUNDS") or 0)
SEED = int(os.environ.get("CHAOS_SEED") or 20260329)


pytestmark = [pytest.mark.processes, pytest.mark.skipif(not ROUNDS, reason="asked for with make chaos REAL=5")]


def test_rounds_with_a_real_engine(panel: Panel) -> None:
    """On the CPU, whose one place the real engine and a simulated one contend for."""
    world = World(SEED, panel=panel, served={GEMMA: "gemma-3-270m", "steady": "steady"}).start()
    try:
        for number in range(ROUNDS):
            world.round(number)
            print(f"round {number} of seed {SEED}: {world.history[-1]}", flush=True)
    finally:
        world.stop()
