"""The frame of every page."""

from __future__ import annotations

import pytest
from django.test import Client

pytestmark = pytest.mark.django_db


def test_strangers_are_sent_to_sign_in(client: Client) -> None:
    response = client.get("/")
    assert response.status_code == 302
    assert response["Location"].startswith("/accounts/login/")


def test_the_simulated_marker_is_on_every_page_even_for_strangers(client, rig, alice) -> None:
    assert b"Simulated rig." in client.get("/nowhere/").content
    client.force_login(alice)
    assert b"Simulated rig." in client.get("/").content
    rig.hardware_source = "nvml"
    rig.save()
    assert b"Simulated rig." not in client.get("/").content


def test_only_owners_see_settings_in_the_navigation(client, rig, alice, bob) -> None:
    client.force_login(bob)
    assert b'href="/settings/"' not in client.get("/").content
    assert client.get("/settings/").status_code == 403
    client.force_login(alice)
    assert b'href="/settings/"' in client.get("/").content


def test_the_theme_is_kept_in_a_cookie_without_javascript(client, rig, bob) -> None:
    client.force_login(bob)
    response = client.post("/settings/theme/", {"theme": "light", "next": "/jobs/"})
    assert response["Location"] == "/jobs/"
    assert b'data-theme="light"' in client.get("/").content
    client.post("/settings/theme/", {"theme": "auto"})
    assert b"data-theme" not in client.get("/").content


def test_an_unknown_theme_and_a_foreign_address_are_ignored(client, rig, bob) -> None:
    client.force_login(bob)
    response = client.post("/settings/theme/", {"theme": "x", "next": "https://elsewhere.example/"})
    assert response["Location"] == "/"
    assert "rigpanel_theme" not in response.cookies


def test_a_page_that_does_not_exist_answers_404_with_a_way_back(client, rig, bob) -> None:
    client.force_login(bob)
    response = client.get("/nowhere/")
    assert response.status_code == 404
    assert b"There is nothing here" in response.content


def test_htmx_gets_an_error_into_the_problems_area(client, rig, bob) -> None:
    client.force_login(bob)
    response = client.get("/settings/", headers={"HX-Request": "true"})
    assert response.status_code == 403
    assert response["HX-Retarget"] == "#problems"
    assert b"needs the role owner" in response.content
    assert b"<html" not in response.content
