"""The base of both sockets: who may connect, and that it stays so while they are open.

Where a socket was opened from (Origin) is checked in front of the consumers, in ``rigpanel.asgi``.
"""

from __future__ import annotations

import asyncio
from importlib import import_module
from typing import Any

from channels.auth import get_user
from channels.generic.websocket import AsyncWebsocketConsumer
from django.conf import settings
from django.contrib.auth.models import AnonymousUser

from apps.common.access import role_of
from apps.common.roles import Role

SIGNED_OUT = 4401  # our own close code: do not reconnect
RECHECK_SECONDS = 15.0


async def user_now(scope: dict[str, Any]) -> Any:
    """The signed-in user as the database has it now: the session read anew, its hash checked again."""
    session = scope.get("session")
    key = getattr(session, "session_key", None)
    if not key:
        return AnonymousUser()
    engine = import_module(settings.SESSION_ENGINE)
    return await get_user({"session": engine.SessionStore(key)})


class SignedInConsumer(AsyncWebsocketConsumer):  # type: ignore[misc]
    """Accepts people with ``needed_role``; ends with SIGNED_OUT once they are not that any more.

    Subclasses fill in ``opened`` (after accept) and ``closed``.
    """

    needed_role = Role.VIEWER
    user: Any = None

    async def connect(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        await self.accept()
        # Accepted first, since a browser learns a close code only from a socket that was open.
        if await self.still_allowed():
            self.start(self._recheck())
            await self.opened()

    async def disconnect(self, code: int) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        # One that fails while it ends has been reported by ``_finished``; the groups must be left all the same.
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.closed()

    async def opened(self) -> None:
        """The socket is open and its user may be here."""

    async def closed(self) -> None:
        """The socket is gone."""

    async def still_allowed(self) -> bool:
        """Read the user anew; closes the socket and answers False when access has ended."""
        self.user = await user_now(self.scope)
        role = role_of(self.user)
        if role is not None and role.covers(self.needed_role):
            return True
        await self.close(code=SIGNED_OUT)
        return False

    def start(self, work: Any) -> None:
        """Run a coroutine for as long as the socket is open."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            # The browser reconnects and starts anew with a snapshot; 1011 says that it was our fault.
            self._tasks.add(closing := asyncio.ensure_future(self.close(code=1011)))
            closing.add_done_callback(self._tasks.discard)
            asyncio.get_running_loop().call_exception_handler(
                {"message": "a socket's task failed", "exception": task.exception(), "task": task}
            )

    async def _recheck(self) -> None:
        while True:
            await asyncio.sleep(RECHECK_SECONDS)
            if not await self.still_allowed():
                return
