"""The filters of the job history: the same for page, export and API."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

import django_filters
from django import forms
from django.db.models import Q, QuerySet

from apps.accounts.models import User
from apps.common.errors import Invalid
from apps.jobs.handlers import known_kinds
from apps.jobs.models import Job, JobState
from apps.jobs.selectors import job_list

TEXT_SEARCH_JOBS = 20_000


def _kinds() -> list[tuple[str, str]]:
    """The kinds of work this panel knows, and those that only the history still has words for."""
    return [(kind, kind.replace("_", " ").capitalize()) for kind in known_kinds()]


class JobFilter(django_filters.FilterSet):  # type: ignore[misc]
    state = django_filters.ChoiceFilter(choices=JobState.choices, label="State", empty_label="Any")
    kind = django_filters.CharFilter(
        label="Kind",
        widget=forms.Select(choices=lambda: [("", "Any"), *_kinds()]),  # type: ignore[arg-type]
    )
    user = django_filters.CharFilter(method="by_user", label="Who", widget=forms.TextInput(attrs={"size": 14}))
    since = django_filters.IsoDateTimeFilter(
        field_name="created_at",
        lookup_expr="gte",
        label="Since",
        widget=forms.DateInput(attrs={"type": "date"}, format="%Y-%m-%d"),
    )
    q = django_filters.CharFilter(method="by_text", label="Text", widget=forms.TextInput(attrs={"type": "search"}))

    class Meta:
        model = Job
        fields = ["state", "kind", "user", "since", "q"]

    def by_user(self, jobs: QuerySet[Job], name: str, value: str) -> QuerySet[Job]:
        """An id (ours or the public one), or the beginning of a name or address. History keeps the names of
        people who are gone."""
        if value.isdecimal() and len(value) < 19:
            return jobs.filter(user_id=int(value))
        if len(value) == 36 and (public_id := as_uuid(value)):
            return jobs.filter(user__public_id=public_id)
        # An address must be whole: by its beginning anybody could find a colleague's letter by letter.
        match = Q(email__iexact=value) if "@" in value else Q(name__istartswith=value)
        people = list(User.objects.filter(match).values_list("pk", flat=True))
        # Jobs of the command line, of the panel and of people who are gone have only a name.
        return jobs.filter(Q(user_id__in=people) | Q(user=None, user_name__istartswith=value))

    def by_text(self, jobs: QuerySet[Job], name: str, value: str) -> QuerySet[Job]:
        """Looks into the newest TEXT_SEARCH_JOBS jobs: no index helps to find words inside texts."""
        match = Q(title__icontains=value) | Q(reason__icontains=value) | Q(profile_slug__iexact=value)
        if value.isdecimal() and len(value) < 19:
            match |= Q(pk=int(value))
        return jobs.filter(match, pk__gt=_oldest_searched())


def older_than_text_search() -> QuerySet[Job]:
    """Jobs whose words are not looked at, so that a page can say so."""
    return Job.objects.filter(pk__lte=_oldest_searched())


def _oldest_searched() -> int:
    return (Job.objects.order_by("-pk").values_list("pk", flat=True).first() or 0) - TEXT_SEARCH_JOBS


def as_uuid(text: str) -> uuid.UUID | None:
    try:
        return uuid.UUID(text)
    except ValueError:
        return None


def jobs_filtered(data: Mapping[str, Any]) -> QuerySet[Job]:
    """Newest first. Raises Invalid with the fields that cannot be understood."""
    found = JobFilter({k: v for k, v in data.items() if v is not None}, queryset=job_list())
    if not found.is_valid():
        fields = {name: [str(e) for e in errors] for name, errors in found.errors.items()}
        raise Invalid("These filters cannot be understood: " + ", ".join(sorted(fields)) + ".", fields=fields)
    return found.qs  # type: ignore[no-any-return]
