"""UTC seconds since the epoch inside a query, on SQLite and PostgreSQL."""

from __future__ import annotations

from typing import Any

from django.db.models import Func, IntegerField


class EpochSeconds(Func):
    """Whole seconds of a DateTimeField."""

    function = "EXTRACT"
    template = "FLOOR(EXTRACT(EPOCH FROM %(expressions)s))"
    output_field = IntegerField()

    def as_sqlite(self, compiler: Any, connection: Any, **extra: Any) -> Any:
        # Django keeps times as UTC text there. The percent sign passes two rounds of formatting.
        return self.as_sql(
            compiler, connection, template="CAST(strftime('%%%%s', %(expressions)s) AS INTEGER)", **extra
        )
