"""Database work for the event loop: one thread that reads, one that writes.

Apart, so that a write that waits for its lock never delays the look that sees a revoked key. Django opens one
connection per thread; after an error it is closed, so that the next call begins with a new one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from django.db import Error, connections

P = ParamSpec("P")
T = TypeVar("T")


class Worker:
    """Runs blocking calls one after another in a thread of its own."""

    def __init__(self, name: str) -> None:
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"gateway-{name}")

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(
            self._threads, lambda: _guarded(function, *args, **kwargs)
        )

    async def close(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._threads, connections.close_all)
        self._threads.shutdown(wait=False)


def _guarded(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    try:
        return function(*args, **kwargs)
    except Error:
        connections.close_all()
        raise
