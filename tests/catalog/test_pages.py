"""The pages of models and engines: who sees and changes what, and how many queries that takes."""

from __future__ import annotations

from typing import Any

import pytest
from django.test import Client

from apps.catalog.models import Model
from apps.catalog.selectors import model_get
from apps.catalog.services import load_shipped, weights_register
from apps.jobs.models import Job
from apps.profiles.services import load_shipped as load_profiles

QUERIES = 17  # session, person, frame (rig, jobs, what runs) and the page itself; it must not grow with the rows


def test_the_list_shows_verdicts_for_this_rig_and_filters(client: Client, rig: Any, charlie: Any) -> None:
    load_shipped()
    weights_register(model_get("phi-4"), rig_name="bench-01", path="/srv/phi-4", size_bytes=29)
    client.force_login(charlie)
    page = client.get("/models/").content.decode()
    assert "Mixtral 8x22B Instruct AWQ" in page
    assert "does not fit" in page
    assert "Add a model" not in page
    assert "DeepSeek-V4-Pro" not in client.get("/models/?fits=yes").content.decode()
    here = client.get("/models/?fits=here").content.decode()
    assert "Phi-4" in here
    assert "Mixtral" not in here
    assert "No model matches" in client.get("/models/?q=no-such-thing").content.decode()


def test_a_list_of_47_models_takes_no_more_queries_than_one_of_a_few(
    client: Client, rig: Any, charlie: Any, django_assert_max_num_queries: Any
) -> None:
    load_profiles()
    client.force_login(charlie)
    for address in ("/models/", "/models/mixtral-8x22b-instruct-awq/", "/profiles/", "/installs/"):
        with django_assert_max_num_queries(QUERIES):
            assert client.get(address).status_code == 200


def test_a_models_page_tells_sources_doubts_and_who_uses_it(client: Client, rig: Any, charlie: Any) -> None:
    load_profiles()
    client.force_login(charlie)
    page = client.get("/models/mixtral-8x22b-instruct-awq/").content.decode()
    for words in ("llmfit", "not confirmed to exist", "/profiles/mixtral-8x22b-tp4/", "140\u2009630\u2009071\u2009296"):
        assert words in page
    assert client.get("/models/no-such/").status_code == 404


def test_an_operator_adds_a_model_and_a_wrong_form_keeps_what_was_typed(client: Client, rig: Any, olivia: Any) -> None:
    client.force_login(olivia)
    wrong = client.post("/models/new/", {"slug": "Lab 7B", "name": "Lab <7B>", "checkpoint": "--flag"})
    assert wrong.status_code == 422
    page = wrong.content.decode()
    assert "Lab &lt;7B&gt;" in page
    assert "lowercase" in page
    assert "hub repository (owner/name)" in page
    assert client.post("/models/new/", {"slug": "lab-7b", "name": "Lab <7B>"}).status_code == 302
    assert "Lab &lt;7B&gt;" in client.get("/models/lab-7b/").content.decode()
    assert client.post("/models/new/", {"slug": "lab-7b", "name": "Again"}).status_code == 422
    assert client.post("/models/lab-7b/edit/", {"name": "Lab 7B", "layers": 32, "notes": "one\ntwo"}).status_code == 302
    model = model_get("lab-7b")
    assert (model.layers, model.notes) == (32, ["one", "two"])
    assert client.post("/models/lab-7b/delete/").status_code == 302
    assert not Model.objects.filter(slug="lab-7b").exists()


@pytest.mark.parametrize("method", ["get", "post"])
def test_members_and_viewers_change_nothing(client: Client, rig: Any, bob: Any, charlie: Any, method: str) -> None:
    load_shipped()
    for person in (bob, charlie):
        client.force_login(person)
        for address in ("/models/new/", "/models/phi-4/edit/", "/profiles/new/"):
            assert getattr(client, method)(address).status_code == 403
    for address in ("/models/phi-4/delete/", "/installs/install/", "/verify/start/"):
        assert client.post(address).status_code == 403
    assert not Job.objects.exists()


def test_strangers_are_sent_to_the_sign_in(client: Client, rig: Any) -> None:
    for address in ("/models/", "/profiles/", "/installs/", "/verify/"):
        answer = client.get(address)
        assert answer.status_code == 302
        assert answer["Location"].startswith("/accounts/login/")


def test_the_install_button_makes_one_job_however_often_it_is_pressed(client: Client, rig: Any, olivia: Any) -> None:
    client.force_login(olivia)
    assert "Install starter engine" in client.get("/installs/").content.decode()
    first = client.post("/installs/install/", {"name": "starter"})
    second = client.post("/installs/install/", {"name": "starter"})
    assert first["Location"] == second["Location"] == f"/jobs/{Job.objects.get().pk}/"
    assert client.post("/installs/install/", {"name": "../x"}).status_code == 404
    assert client.get("/installs/install/").status_code == 405
