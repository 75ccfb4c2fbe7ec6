"""The one change that a failed start suggests, applied by a click."""

from __future__ import annotations

from typing import Any

import pytest
from django.test import Client

from apps.audit.models import AuditEntry
from apps.common.actors import actor_of
from apps.common.errors import Conflict
from apps.deployments.suggestions import suggestion_apply, suggestion_of
from apps.jobs.models import Job
from tests.factories.profiles import add_version, catalogue_model, simulated_profile


@pytest.fixture
def failed(rig: Any) -> Job:
    simulated_profile("coder", max_model_len=32768)
    return Job.objects.create(
        kind="switch",
        title="Switch to Coder",
        state="failed",
        rig_name="bench-01",
        queue="q",
        user_name="alice",
        profile_slug="coder",
        profile_name="Coder",
        result={
            "summary": "Coder did not start: a context of 32,768 tokens needs 8.0 GiB.",
            "suggestion": "Set max_model_len to 16128.",
            "suggested_options": {"max_model_len": 16128},
        },
    )


def test_a_click_on_the_jobs_page_makes_the_version(client: Client, failed: Job, olivia: Any) -> None:
    client.force_login(olivia)
    page = client.get(f"/jobs/{failed.pk}/").content.decode()
    assert "Make a version with max_model_len 16128" in page
    answer = client.post(f"/deployments/suggestions/{failed.pk}/", follow=True)
    assert answer.redirect_chain[-1][0] == "/profiles/coder/"
    assert "Version 2 of Coder" in answer.content.decode()
    found = suggestion_of(failed)
    assert found is None  # the profile has it now
    entry = AuditEntry.objects.filter(action="profile.update").latest("pk")
    assert entry.actor_name == "olivia"
    assert client.post(f"/deployments/suggestions/{failed.pk}/").status_code == 409


def test_members_see_the_suggestion_but_not_the_button(client: Client, failed: Job, bob: Any) -> None:
    client.force_login(bob)
    page = client.get(f"/jobs/{failed.pk}/").content.decode()
    assert "Set max_model_len to 16128." in page
    assert "Make a version" not in page
    assert client.post(f"/deployments/suggestions/{failed.pk}/").status_code == 403


def test_only_the_suggested_option_changes_from_what_is_newest(failed: Job, olivia: Any) -> None:
    found = suggestion_of(failed)
    assert found is not None
    assert found.words == "max_model_len 16128"
    add_version(found.profile, tp=4, replicas=1, model=catalogue_model("coder"), max_model_len=32768, max_num_seqs=8)
    version = suggestion_apply(failed, actor=actor_of(olivia))
    assert (version.number, version.options["max_num_seqs"], version.options["max_model_len"]) == (3, 8, 16128)
    assert version.note == f"As job {failed.pk} suggested: max_model_len 16128."
    with pytest.raises(Conflict):
        suggestion_apply(failed, actor=actor_of(olivia))
