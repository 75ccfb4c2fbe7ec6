"""The job history as a table."""

from __future__ import annotations

from typing import Any

import django_tables2 as tables
from django.utils.html import format_html
from django.utils.safestring import SafeString

from apps.common.units import seconds
from apps.jobs.models import Job


def cell(classes: str) -> dict[str, dict[str, str]]:
    return {"td": {"class": classes}}


class JobTable(tables.Table):  # type: ignore[misc]
    """Sorted by age only, which is the number's order too: that is an index, the rest would sort a hundred
    thousand rows."""

    id = tables.Column(verbose_name="Job", order_by=("created_at", "pk"), attrs=cell("number nowrap"))
    title = tables.Column(
        verbose_name="What",
        linkify=("jobs:detail", {"pk": tables.A("pk")}),
        orderable=False,
        attrs={**cell("what"), "a": {"class": "link"}},
    )
    state = tables.TemplateColumn(
        "{% load ui %}{% chip record.state record.get_state_display %}", verbose_name="State", orderable=False
    )
    user_name = tables.Column(verbose_name="Who", orderable=False, attrs=cell("nowrap"))
    created_at = tables.TemplateColumn(
        "{% load ui %}{% reltime record.created_at %}", verbose_name="When", orderable=False, attrs=cell("nowrap")
    )
    took = tables.Column(verbose_name="Took", accessor="duration_seconds", orderable=False, attrs=cell("took nowrap"))
    summary = tables.Column(verbose_name="Result", orderable=False, empty_values=(), attrs=cell("result"))

    class Meta:
        model = Job
        fields = ("id", "title", "state", "user_name", "created_at", "took", "summary")
        order_by = "-id"
        attrs = {"class": "jobs"}
        empty_text = "No jobs match. A switch, an install or a verification makes one."

    def render_took(self, value: float) -> str:
        return seconds(value)

    def render_summary(self, record: Any) -> SafeString:
        """How it ended, and why it was asked for."""
        summary = record.summary if record.is_final else ""
        if not record.reason:
            return format_html("{}", summary)
        return format_html('{} <span class="muted reason">“{}”</span>', summary, record.reason)
