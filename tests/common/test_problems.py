"""Errors that are answers, on pages and in htmx."""

from __future__ import annotations

from typing import Any

import pytest
from django.contrib.auth.models import AnonymousUser
from django.http import HttpResponse
from django.test import RequestFactory

from apps.common.errors import Conflict, Invalid
from apps.common.htmx import begun, form_status, safe_next
from apps.common.middleware import ApplicationErrorMiddleware
from apps.common.problems import server_error

pytestmark = pytest.mark.django_db


def answer(error: Exception, *, htmx: bool = False) -> HttpResponse | None:
    from django_htmx.middleware import HtmxMiddleware

    request = RequestFactory().get("/", headers={"HX-Request": "true"} if htmx else {})
    request.user = AnonymousUser()
    HtmxMiddleware(lambda r: HttpResponse())(request)
    return ApplicationErrorMiddleware(lambda r: HttpResponse()).process_exception(request, error)


def test_a_conflict_becomes_a_page_with_its_sentence() -> None:
    response = answer(Conflict("Another switch is under way."))
    assert response is not None
    assert response.status_code == 409
    assert b"Another switch is under way." in response.content
    assert b"<html" in response.content


def test_for_htmx_it_becomes_a_strip_with_the_fields_and_escaped() -> None:
    response = answer(Invalid("Look again.", fields={"name": ["<too long>"]}), htmx=True)
    assert response is not None
    assert response.status_code == 422
    assert response["HX-Retarget"] == "#problems"
    assert b"&lt;too long&gt;" in response.content
    assert b"<html" not in response.content


def test_a_bug_is_left_to_the_server_error_page() -> None:
    assert answer(RuntimeError("ours")) is None


def test_the_server_error_page_needs_no_database(django_assert_num_queries: Any) -> None:
    with django_assert_num_queries(0):
        page = server_error(RequestFactory().get("/"))
        strip = server_error(RequestFactory().get("/", headers={"HX-Request": "true"}))
    assert page.status_code == strip.status_code == 500
    assert b"Something broke" in page.content
    assert strip["HX-Retarget"] == "#problems"


@pytest.mark.parametrize("target", ["https://elsewhere.example/", "//elsewhere.example", "javascript:alert(1)", ""])
def test_next_never_leads_elsewhere(target: str) -> None:
    assert safe_next(RequestFactory().post("/", {"next": target})) == "/"


def test_a_click_on_the_home_page_stays_there() -> None:
    plain = RequestFactory().post("/", {"next": "home"})
    assert begun(plain, "/jobs/1/")["Location"] == "/"
    assert begun(RequestFactory().post("/"), "/jobs/1/")["Location"] == "/jobs/1/"


def test_an_unsent_form_is_no_error() -> None:
    from django import forms

    class One(forms.Form):
        name = forms.CharField()

    assert form_status(One()) == 200
    assert form_status(One({})) == 422
    assert form_status(One({"name": "x"})) == 200
