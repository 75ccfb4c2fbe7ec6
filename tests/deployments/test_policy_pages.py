"""Restart policies, strangers on the cards and an empty rig, as people see them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from django.utils import timezone

from apps.audit.models import AuditEntry
from apps.dashboard import cards
from apps.deployments import policy_api
from apps.deployments.models import Deployment, RestartPolicy, Status
from apps.deployments.strays import FOREIGN, Stray
from tests.factories.profiles import simulated_profile

pytestmark = pytest.mark.django_db


def test_an_operator_sets_when_a_profile_is_restarted(client: Any, rig: Any, olivia: Any) -> None:
    simulated_profile("coder")
    client.force_login(olivia)
    page = client.get("/profiles/coder/restarts/")
    assert b'value="3"' in page.content
    values = {
        "restarts": 0,
        "window_seconds": 60,
        "backoff_seconds": 1,
        "probe_every_seconds": 0,
        "probe_limit_seconds": 5,
        "probe_failures": 2,
    }
    assert client.post("/profiles/coder/restarts/", values | {"probe_failures": 0}).status_code == 422
    assert client.post("/profiles/coder/restarts/", values).status_code == 302
    assert RestartPolicy.objects.get().restarts == 0
    assert AuditEntry.objects.filter(action="profile.restarts").exists()


def test_the_api_changes_only_what_is_given(client: Any, rig: Any, olivia: Any) -> None:
    simulated_profile("coder")
    client.force_login(olivia)
    put = client.put("/api/v1/profiles/coder/restarts", json.dumps({"restarts": 7}), content_type="application/json")
    assert put.status_code == 200, put.content
    found = client.get("/api/v1/profiles/coder/restarts").json()
    assert (found["restarts"], found["probe_failures"]) == (7, 3)
    bad = client.put("/api/v1/profiles/coder/restarts", json.dumps({"restarts": -1}), content_type="application/json")
    assert bad.status_code == 422


def test_a_stranger_on_a_card_is_shown_with_pid_user_and_command(
    client: Any, rig: Any, charlie: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stray = Stray(FOREIGN, 4242, "carol", "python train.py", (2,), 12 * 2**30)
    monkeypatch.setattr(cards, "strays", lambda rig: [stray])
    monkeypatch.setattr(policy_api, "strays", lambda rig: [stray])
    client.force_login(charlie)
    text = client.get("/").content.decode()
    assert "A process of somebody else runs on GPU 2." in text
    assert "Process 4242 of carol, 12" in text
    assert "python train.py" in text
    assert client.get(f"/api/v1/rigs/{rig.slug}/strays").json()[0]["pid"] == 4242


@pytest.mark.parametrize("path", ["/", "/models/", "/jobs/", "/me/"])
def test_an_empty_rig_that_should_not_be_says_so_on_every_page(client: Any, rig: Any, charlie: Any, path: str) -> None:
    version = simulated_profile("coder").current
    Deployment.objects.create(
        rig=rig,
        version=version,
        served_name="coder",
        status=Status.FAILED,
        desired="stopped",
        status_reason="Coder was killed by signal 9 while it served.",
        ended_at=timezone.now(),
    )
    client.force_login(charlie)
    text = client.get(path).content.decode()
    assert "Nothing serves." in text
    assert "killed by signal 9" in text
    assert "switch to a model that works" in text
