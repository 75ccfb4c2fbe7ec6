"""A click asks only when somebody would notice, and asks about what runs at that moment."""

from __future__ import annotations

from typing import Any

import pytest
from django.test import Client

from apps.deployments.models import Deployment, GatewayProcess, GpuReservation, Replica
from apps.jobs.models import Job
from apps.profiles.models import Profile
from tests.dashboard.test_home import deploy
from tests.factories.profiles import simulated_profile

HTMX = {"HX-Request": "true"}


@pytest.fixture
def busy(rig: Any) -> Deployment:
    """Coder TP2 on cards 0 and 1 with three running answers."""
    deployment = deploy(rig)
    GatewayProcess.objects.create(key="elsewhere:1:1", in_flight={str(deployment.pk): 3})
    simulated_profile("beside", tp=2)
    simulated_profile("big", tp=4)
    return deployment


@pytest.fixture
def olivias(client: Client, olivia: Any) -> Client:
    client.force_login(olivia)
    return client


def test_a_switch_that_cuts_running_answers_asks_first_and_says_whose(olivias: Client, busy: Deployment) -> None:
    answer = olivias.post("/deployments/switch/", {"profile": "big", "next": "home"}, headers=HTMX)
    assert answer.headers["HX-Retarget"] == "#ask"
    html = answer.content.decode()
    assert "This stops 3 running answers of Coder" in html
    assert 'name="profile" value="big"' in html
    assert not Job.objects.exists()


def test_the_yes_of_the_question_switches(olivias: Client, busy: Deployment) -> None:
    olivias.post("/deployments/switch/", {"profile": "big", "next": "home", "confirmed": "1"}, headers=HTMX)
    assert Job.objects.get().profile_slug == "big"


def test_without_javascript_the_question_is_a_page(olivias: Client, busy: Deployment) -> None:
    html = olivias.post("/deployments/switch/", {"profile": "big"}).content.decode()
    assert "<h1>Switch to Big?</h1>" in html
    assert "Keep as it is" in html


def test_a_switch_beside_what_runs_does_not_ask(olivias: Client, busy: Deployment) -> None:
    olivias.post("/deployments/switch/", {"profile": "beside", "next": "home"}, headers=HTMX)
    assert Job.objects.get().profile_slug == "beside"


def test_waking_a_sleeper_on_its_cards_asks_for_whoever_is_awake_there(olivias: Client, busy: Deployment) -> None:
    asleep = Deployment.objects.create(
        rig=busy.rig, version=Profile.objects.get(slug="beside").current, served_name="beside", status="sleeping"
    )
    replica = Replica.objects.create(
        deployment=asleep, index=0, launch_id="beside", host="127.0.0.1", port=28199, base_url="http://y"
    )
    for gpu in busy.rig.gpus.filter(reservations__replica__deployment=busy):
        GpuReservation.objects.create(rig=busy.rig, gpu=gpu, slot=f"sleep-{asleep.pk}", replica=replica)
    html = olivias.post("/deployments/switch/", {"profile": "beside", "next": "home"}, headers=HTMX).content.decode()
    assert "This stops 3 running answers of Coder" in html


def test_nobody_is_asked_about_a_model_that_answers_nobody(olivias: Client, busy: Deployment) -> None:
    GatewayProcess.objects.update(in_flight={str(busy.pk): 0})
    olivias.post("/deployments/switch/", {"profile": "big", "next": "home"}, headers=HTMX)
    assert Job.objects.get().profile_slug == "big"


def test_stopping_asks_when_answers_would_be_cut(olivias: Client, busy: Deployment) -> None:
    answer = olivias.post(f"/deployments/{busy.pk}/stop/", {"next": "home"}, headers=HTMX)
    assert "This stops 3 running answers of Coder" in answer.content.decode()
    assert not Job.objects.exists()
    GatewayProcess.objects.update(in_flight={})
    olivias.post(f"/deployments/{busy.pk}/stop/", {"next": "home"}, headers=HTMX)
    assert Job.objects.get().kind == "stop"
