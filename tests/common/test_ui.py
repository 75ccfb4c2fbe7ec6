"""Template parts: numbers, times, shapes."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from django import forms
from django.template import Context, Template

from apps.common.templatetags import ui
from apps.common.units import THIN_SPACE

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)


def render(source: str, **context: object) -> str:
    return Template("{% load ui %}" + source).render(Context(context)).strip()


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0, "just now"), (14, "14 s ago"), (-90, "in 1 min"), (3 * 3600 + 720, "3 h 12 min ago"), (86400 * 2, "2 d ago")],
)
def test_relative_times_read_as_people_say_them(seconds: int, expected: str) -> None:
    assert ui.relative(NOW - timedelta(seconds=seconds), NOW) == expected


def test_a_time_carries_its_absolute_self() -> None:
    html = render("{% reltime at %}", at=NOW)
    assert 'datetime="2026-11-23T12:00:00+00:00"' in html
    assert 'title="2026-11-23 12:00:00 UTC"' in html
    assert render("{% reltime at %}", at=None) == "never"


@pytest.mark.parametrize(
    "part", ["value|gib", "value|number", 'value|reported:"W"', "value|percent", "value|gib_number"]
)
@pytest.mark.parametrize("context", [{"value": None}, {}])
def test_what_is_not_known_reads_not_reported_and_never_zero(part: str, context: dict) -> None:
    assert render("{{ " + part + " }}", **context) == "not reported"


def test_zero_is_a_value() -> None:
    assert render('{{ value|reported:"%" }}', value=0) == "0 %"
    assert render("{{ value|number }}", value=12345) == f"12{THIN_SPACE}345"


def test_a_chip_has_a_shape_besides_its_word_and_an_unknown_state_none_that_says_fine() -> None:
    assert 'class="dot ok"' in render('{% chip "ready" %}')
    assert 'class="dot bad"' in render('{% chip "failed" "did not start" %}')
    assert "did not start" in render('{% chip "failed" "did not start" %}')
    assert 'class="dot idle"' in render('{% chip "never heard of" %}')


def test_a_chip_escapes_what_it_is_given() -> None:
    assert "<b>" not in render("{% chip state %}", state="<b>x</b>")


def test_a_sparkline_has_a_gap_where_nothing_was_reported() -> None:
    path = ui.spark_path([0.0, 100.0, None, 50.0], 100.0, points=4)
    assert path == "M0.0 34.0L39.3 2.0M118.0 18.0"
    assert ui.spark_path([], 100.0) == ""


def test_a_bar_never_grows_past_its_end() -> None:
    html = render("{% bar parts 'memory' %}", parts=[("2", 80.0), ("1", 80.0), ("rest", None)])
    assert 'x="80.00" width="20.00"' in html
    assert 'aria-valuenow="100"' in html


class Name(forms.Form):
    name = forms.CharField(help_text="As others see it.")
    agreed = forms.BooleanField(required=False)


def test_a_wrong_field_says_so_beside_itself_and_keeps_what_was_typed() -> None:
    html = render('{% include "components/form.html" %}', form=Name({"name": "", "agreed": "on"}))
    assert 'aria-invalid="true"' in html
    assert 'id="id_name_error"' in html
    assert 'aria-describedby="id_name_helptext id_name_error"' in html
    assert "checked" in html
