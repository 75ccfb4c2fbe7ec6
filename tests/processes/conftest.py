"""A real panel of its own per test or per module, without an account: who gets the first one is part of the tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.panel import Panel


@pytest.fixture
def panel() -> Iterator[Panel]:
    """Not started yet."""
    with Panel(owner=False) as made:
        yield made


@pytest.fixture(scope="module")
def running_panel() -> Iterator[Panel]:
    """One started panel for all tests of a module; each leaves it ready."""
    with Panel(owner=False) as made:
        yield made.start()
