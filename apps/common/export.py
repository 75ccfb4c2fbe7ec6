"""Long lists as CSV or JSON lines, sent while they are read: memory stays flat."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from typing import Any

from asgiref.sync import sync_to_async
from django.core.handlers.asgi import ASGIRequest
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponseBase, StreamingHttpResponse
from django.utils import timezone

from apps.common.errors import Invalid

PAGE_ROWS = 500
CONTENT_TYPES = {"csv": "text/csv; charset=utf-8", "jsonl": "application/x-ndjson"}
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def csv_cell(value: Any) -> str:
    """A cell that a spreadsheet takes as text: one that begins like a formula gets an apostrophe
    (OWASP, "CSV injection")."""
    if value is None:
        return ""
    if isinstance(value, dict | list):
        value = json.dumps(value, ensure_ascii=False)
    text = str(value)
    return f"'{text}" if text.startswith(_FORMULA_STARTS) and not isinstance(value, int | float) else text


def keyset_pages(rows: QuerySet[Any], key: str = "pk") -> Iterator[list[Any]]:
    """``rows`` newest first in pages. Each is a query of its own, so that a slow download holds no
    database snapshot open."""
    last: Any = None
    rows = rows.order_by(f"-{key}")
    while page := list((rows if last is None else rows.filter(**{f"{key}__lt": last}))[:PAGE_ROWS]):
        yield page
        if len(page) < PAGE_ROWS:
            return
        last = getattr(page[-1], key)


def export(
    request: HttpRequest,
    rows: QuerySet[Any],
    columns: Iterable[str],
    row: Callable[[Any], Mapping[str, Any]],
    form: str,
    name: str,
    key: str = "pk",
) -> HttpResponseBase:
    """Stream ``rows``, newest by ``key`` first. ``row`` gives a mapping with the keys ``columns``; ``form`` is
    *csv* or *jsonl*.

    Raises Invalid for any other form.
    """
    if form not in CONTENT_TYPES:
        raise Invalid(f"The format {form!r} is not known; use csv or jsonl.", fields={"format": ["Use csv or jsonl."]})
    pages = keyset_pages(rows, key)
    chunks = _csv(pages, list(columns), row) if form == "csv" else _jsonl(pages, row)
    # Django would read a plain generator to its end into memory before an ASGI answer begins.
    content: Any = _drawn(chunks) if isinstance(request, ASGIRequest) else chunks
    response = StreamingHttpResponse(content, content_type=CONTENT_TYPES[form])
    response["Content-Disposition"] = f'attachment; filename="{name}-{timezone.now():%Y-%m-%d}.{form}"'
    return response


def _next(chunks: Iterator[str]) -> str | None:
    return next(chunks, None)


async def _drawn(chunks: Iterator[str]) -> AsyncIterator[str]:
    while (chunk := await sync_to_async(_next)(chunks)) is not None:
        yield chunk


def _csv(pages: Iterator[list[Any]], columns: list[str], row: Callable[[Any], Mapping[str, Any]]) -> Iterator[str]:
    yield ",".join(columns) + "\r\n"
    for page in pages:
        text = io.StringIO()
        writer = csv.writer(text)
        for item in page:
            values = row(item)
            writer.writerow([csv_cell(values[column]) for column in columns])
        yield text.getvalue()


def _jsonl(pages: Iterator[list[Any]], row: Callable[[Any], Mapping[str, Any]]) -> Iterator[str]:
    for page in pages:
        yield "".join(json.dumps(row(item), ensure_ascii=False, default=str) + "\n" for item in page)
