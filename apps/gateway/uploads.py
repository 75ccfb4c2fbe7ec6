"""Multipart bodies (audio): read as far as the field ``model``, then passed on piece by piece."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from email.message import Message

from apps.gateway import errors
from apps.gateway.limits import Limits

BOUNDARY_LENGTH_MAX = 200  # RFC 2046 allows 70
PART_HEAD_BYTES_MAX = 16 * 1024
NAME = re.compile(rb'^content-disposition:[^\r\n]*?[; ]name="?([^";\r\n]*)"?', re.IGNORECASE | re.MULTILINE)
FILENAME = re.compile(rb"^content-disposition:[^\r\n]*?[; ]filename\*?=", re.IGNORECASE | re.MULTILINE)
Chunk = Callable[[], Awaitable[bytes | None]]


class Upload:
    """A multipart body on its way. ``receive`` gives its next piece, None after the last.

    ``started``: a byte went to an engine, so the request cannot be sent to another one any more.
    ``finished`` is set once the last byte was taken from the client.
    """

    def __init__(self, receive: Chunk, content_type: str, limits: Limits, declared_bytes: int | None) -> None:
        self.model = ""
        self.started = False
        self.finished = asyncio.Event()
        self._receive = receive
        self._limits = limits
        self._delimiter = b"--" + _boundary(content_type)
        self._declared_bytes = declared_bytes
        self._seen_bytes = 0
        self._head = bytearray()
        self._place = (0, 0)  # of the model's name in the head

    # -- as far as the model --------------------------------------------------------------------

    async def find_model(self) -> str:
        """Read until the field ``model`` is there. Raises 400 when there is none, 413 when it comes too late."""
        at = 0  # where the part that is looked at begins
        while True:
            found = self._model_from(at)
            if isinstance(found, str):
                self.model = found
                return found
            at = found
            if len(self._head) > self._limits.body_bytes:
                raise errors.model_too_late(self._limits.body_bytes)
            chunk = await self._next()
            if chunk is None:
                raise errors.bad_request(
                    "The form has no field 'model'; GET /v1/models lists them.", code="invalid_request", param="model"
                )
            self._head += chunk

    def _model_from(self, at: int) -> str | int:
        """The model's name, or where to look on when more has come."""
        head, delimiter = self._head, self._delimiter
        while True:
            start = head.find(delimiter, at)
            if start < 0:
                return max(at, len(head) - len(delimiter) - 4)
            head_end = head.find(b"\r\n\r\n", start)
            if head_end < 0:
                if len(head) - start > PART_HEAD_BYTES_MAX:
                    raise errors.bad_request("A part of the form has a head that is too long or none.")
                return start
            about = bytes(head[start:head_end])
            name = NAME.search(about)
            if name is None or name[1] != b"model" or FILENAME.search(about):
                at = head_end + 2  # the next delimiter is found from here; the file's bytes are not looked at twice
                continue
            end = head.find(b"\r\n" + delimiter, head_end + 2)
            if end < 0:
                if len(head) - head_end > PART_HEAD_BYTES_MAX:
                    raise errors.bad_request("The field 'model' is too long.", param="model")
                return start
            self._place = (head_end + 4, end)
            try:
                text = bytes(head[head_end + 4 : end]).decode("utf-8").strip()
            except UnicodeDecodeError:
                text = ""
            if not text:
                raise errors.bad_request("The field 'model' is empty or not UTF-8.", param="model")
            return text

    # -- on to the engine -----------------------------------------------------------------------

    def rename(self, model: str) -> None:
        """Another name for the model, as the engine knows it."""
        start, end = self._place
        self._head[start:end] = model.encode()
        if self._declared_bytes is not None:
            self._declared_bytes += len(model.encode()) - (end - start)
        self._place = (start, start + len(model.encode()))

    @property
    def length(self) -> int | None:
        """Of what the engine will get; None where the client did not say."""
        return self._declared_bytes

    @property
    def held_bytes(self) -> int:
        return len(self._head)

    async def pieces(self) -> AsyncIterator[bytes]:
        """Everything, the head first."""
        self.started = True
        head, self._head = bytes(self._head), bytearray()
        yield head
        while (chunk := await self._next()) is not None:
            if chunk:
                yield chunk

    async def _next(self) -> bytes | None:
        if self.finished.is_set():
            return None
        try:
            async with asyncio.timeout(self._limits.body_s):
                chunk = await self._receive()
        except TimeoutError:
            raise errors.body_too_slow(self._limits.body_s) from None
        if chunk is None:
            self.finished.set()
            return None
        self._seen_bytes += len(chunk)
        if self._seen_bytes > self._limits.upload_bytes:
            raise errors.body_too_large(self._limits.upload_bytes)
        return chunk


def _boundary(content_type: str) -> bytes:
    message = Message()
    message["content-type"] = content_type
    boundary = message.get_boundary("")
    if not boundary or len(boundary) > BOUNDARY_LENGTH_MAX or not boundary.isascii():
        raise errors.bad_request("The form's Content-Type has no usable boundary.")
    return boundary.encode()


def is_form(content_type: bytes | None) -> bool:
    return content_type is not None and content_type.split(b";", 1)[0].strip().lower() == b"multipart/form-data"
