"""Pages deep inside long lists: first the ids, from an index alone, then these few rows.

OFFSET makes the database walk every row before the page. Job rows carry kilobytes of JSON, so that walking a
hundred thousand of them reads hundreds of megabytes; walking an index reads a few.
"""

from __future__ import annotations

from typing import Any

from django.core.paginator import Page, Paginator
from django.db.models import QuerySet


def page_of(rows: QuerySet[Any], offset: int, limit: int) -> list[Any]:
    """``rows[offset:offset + limit]``, in the same order."""
    ids = list(rows.prefetch_related(None).values_list("pk", flat=True)[offset : offset + limit])
    found = {row.pk: row for row in rows.filter(pk__in=ids)}
    return [found[pk] for pk in ids if pk in found]


class IdPaginator(Paginator):  # type: ignore[type-arg]
    """A paginator whose pages are made by ``page_of``."""

    def page(self, number: Any) -> Any:
        number = self.validate_number(number)
        rows = page_of(self.object_list, (number - 1) * self.per_page, self.per_page)  # type: ignore[arg-type]
        return Page(rows, number, self)
