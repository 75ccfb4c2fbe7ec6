"""``/ws/telemetry/``: live readings as compact arrays, the newest only.

First a *header* that names what the arrays hold and, as a snapshot, the last minute for the sparklines;
then one frame after another. A slow client gets fewer frames, never older ones.
"""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import redis
import structlog
from asgiref.sync import sync_to_async
from channels.db import database_sync_to_async

from apps.common.realtime import telemetry_group
from apps.common.sockets import SignedInConsumer
from apps.rigs.selectors import rig_default
from apps.telemetry import selectors
from apps.telemetry.frames import GPU_FIELDS, HOST_FIELDS, STALE_AFTER_SECONDS, VIEWERS_SECONDS, Frame, looked_at

log = structlog.get_logger(__name__)
SPARK_METRIC = "utilization_percent"
SPARK_SECONDS = 60


class TelemetryConsumer(SignedInConsumer):
    """One browser that watches this panel's rig."""

    async def opened(self) -> None:
        self._latest: dict[str, Any] | None = None
        self._news = asyncio.Event()
        self._uuids: list[str] = []
        self._rig_name = await database_sync_to_async(_rig_name)()
        await self.channel_layer.group_add(telemetry_group(self._rig_name), self.channel_name)
        self.start(self._say_that_somebody_looks())
        frame, ring = await sync_to_async(selectors.live)(self._rig_name, SPARK_SECONDS)
        if frame is not None:
            await self._send_header(list(frame.gpus))
            await self._send_history(ring)
            await self._send(_message(frame))
        else:
            await self._send_header([])
        self.start(self._send_newest())

    async def closed(self) -> None:
        if hasattr(self, "_rig_name"):
            await self.channel_layer.group_discard(telemetry_group(self._rig_name), self.channel_name)

    async def telemetry_frame(self, event: dict[str, Any]) -> None:
        """From the sampler, by way of the channel layer. Only the newest frame waits to be sent."""
        self._latest = event["frame"]
        self._news.set()

    async def _send_newest(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            frame, self._latest = self._latest, None
            if frame is None:
                continue
            if frame["uuids"] != self._uuids:
                await self._send_header(frame["uuids"])
            await self._send({"t": frame["at"], "g": frame["gpus"], "h": frame["host"]})

    async def _send_header(self, uuids: list[str]) -> None:
        self._uuids = uuids
        await self._send(
            {
                "type": "header",
                "rig": self._rig_name,
                "fields": GPU_FIELDS,
                "host": HOST_FIELDS,
                "gpus": uuids,
                "now": round(time.time(), 3),
                "stale_after_s": STALE_AFTER_SECONDS,
            }
        )

    async def _send_history(self, ring: list[Frame]) -> None:
        lines = [[frame.gpus.get(u, {}).get(SPARK_METRIC) for frame in ring] for u in self._uuids]
        await self._send({"type": "history", "metric": SPARK_METRIC, "every_s": 1, "gpus": lines})

    async def _send(self, message: dict[str, Any]) -> None:
        await self.send(text_data=json.dumps(message, separators=(",", ":")))

    async def _say_that_somebody_looks(self) -> None:
        while True:
            try:
                await sync_to_async(looked_at)(self._rig_name)
            except redis.RedisError as error:
                log.debug("nobody could be told that somebody looks", error=str(error))
            await asyncio.sleep(VIEWERS_SECONDS * 0.4)


def _rig_name() -> str:
    return str(rig_default().slug)


def _message(frame: Frame) -> dict[str, Any]:
    return {
        "t": frame.at,
        "g": [[reading.get(name) for name in GPU_FIELDS] for reading in frame.gpus.values()],
        "h": [frame.host.get(name) for name in HOST_FIELDS],
    }
