"""``/ws/pages/``: HTML of the regions a page shows, when they have changed.

The page says what it shows with ``?watch=home,job:17`` (or later ``{"watch": [...]}``). After a message
the consumer reads anew, checks access and renders the same partial as the page; htmx swaps it by its id.
"""

from __future__ import annotations

import asyncio
import json
from html import escape
from typing import Any
from urllib.parse import parse_qs

from asgiref.sync import sync_to_async
from channels.db import database_sync_to_async

from apps.common.realtime import PAGES_GROUP
from apps.common.sockets import SignedInConsumer
from apps.dashboard.live import concerned, draw, watched
from apps.jobs.models import FINAL_STATES, Job

GATHER_SECONDS = 0.15  # one drawing for all messages of one change


class PagesConsumer(SignedInConsumer):
    """One open page."""

    async def opened(self) -> None:
        query = parse_qs(self.scope.get("query_string", b"").decode("latin-1"))
        self._regions = watched(",".join(query.get("watch", [])).split(","))
        self._waiting: dict[str, dict[str, Any]] = {}
        self._changed = asyncio.Event()
        self._jobs_seen: set[int] = set()
        self._announced: set[int] = set()
        self._drawn: dict[str, int] = {}
        await self.channel_layer.group_add(PAGES_GROUP, self.channel_name)
        # What changed between the page's own reading and now would be missed otherwise.
        await self._draw({name: {} for name in self._regions})
        self.start(self._draw_changes())

    async def closed(self) -> None:
        await self.channel_layer.group_discard(PAGES_GROUP, self.channel_name)

    async def receive(self, text_data: str | None = None, bytes_data: bytes | None = None) -> None:
        """``{"watch": [names]}``; anything else is ignored."""
        try:
            message = json.loads(text_data or "")
        except ValueError:
            return
        names = message.get("watch") if isinstance(message, dict) else None
        if isinstance(names, list):
            self._regions = watched(str(name) for name in names)
            self._wait_for({name: {} for name in self._regions})

    async def page_changed(self, event: dict[str, Any]) -> None:
        """From ``apps.common.realtime.page_changed``, by way of the channel layer."""
        ids = event.get("ids") or {}
        if event.get("topic") == "job" and "job" in ids and not ids.get("log"):
            self._jobs_seen.add(int(ids["job"]))
        self._wait_for(dict.fromkeys(concerned(self._regions, str(event.get("topic")), ids), ids))

    def _wait_for(self, regions: dict[str, dict[str, Any]]) -> None:
        for name, ids in regions.items():
            # A change of the whole and added log lines together are a change of the whole.
            earlier = self._waiting.get(name)
            self._waiting[name] = ids if earlier is None or earlier.get("log") else earlier
        if self._waiting or self._jobs_seen:
            self._changed.set()

    async def _draw_changes(self) -> None:
        while True:
            await self._changed.wait()
            await asyncio.sleep(GATHER_SECONDS)
            self._changed.clear()
            waiting, self._waiting = self._waiting, {}
            jobs, self._jobs_seen = self._jobs_seen, set()
            if not await self.still_allowed():
                return
            await self._draw(waiting)
            await self._announce(jobs - self._announced)

    async def _draw(self, regions: dict[str, dict[str, Any]]) -> None:
        drawn = await database_sync_to_async(_drawings)(regions, self.user)
        # The same again is not sent: a swap under somebody's pointer or caret is never for nothing.
        news = {name: html for name, html in drawn.items() if self._drawn.get(name) != hash(html)}
        self._drawn |= {name: hash(html) for name, html in news.items()}
        if html := "".join(news.values()):
            await self.send(text_data=html)

    async def _announce(self, jobs: set[int]) -> None:
        """Say the end of a job in the page's one live region, once."""
        if not jobs:
            return
        ended = await sync_to_async(_ended)(jobs)
        if ended:
            self._announced |= set(ended)
            text = " ".join(ended.values())
            await self.send(text_data=f'<div id="announcer" hx-swap-oob="innerHTML">{escape(text)}</div>')


def _drawings(regions: dict[str, dict[str, Any]], user: Any) -> dict[str, str]:
    return {name: draw(name, user, ids) for name, ids in regions.items()}


def _ended(jobs: set[int]) -> dict[int, str]:
    rows = Job.objects.filter(pk__in=jobs, state__in=FINAL_STATES).only("title", "state", "result")
    return {job.pk: f"{job.title}: {job.get_state_display().lower()}. {job.summary}" for job in rows}
