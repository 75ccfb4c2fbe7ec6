from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from django.test import Client

from apps.accounts.models import User
from apps.accounts.services import key_create
from apps.catalog.services import load_shipped as load_models
from apps.common.actors import actor_of
from apps.jobs import waiting
from apps.jobs.models import Job, JobLogLine, JobState, JobStep, StepState
from apps.profiles.services import load_shipped as load_profiles

Api = Callable[[Any], Client]
JOB_FIELDS = {
    "id", "kind", "state", "reason", "created_at", "started_at", "finished_at", "eta_s", "progress", "steps", "profile",
    "profile_version", "deployment", "rig", "user", "superseded_by", "result",
}  # fmt: skip


def job_of(user: User, **values: Any) -> Job:
    defaults: dict[str, Any] = {
        "kind": "switch",
        "title": "x",
        "rig_name": "bench-01",
        "queue": "q",
        "user_name": "bob",
    }
    return Job.objects.create(**{**defaults, "user": user, **values})


def test_a_job_has_exactly_the_promised_fields(api: Api, bob: User) -> None:
    later = job_of(bob)
    job = job_of(
        bob, state=JobState.CANCELLED, profile_slug="coder", profile_version=2, deployment_id=5, superseded_by=later,
        result={"summary": "Superseded."},
    )  # fmt: skip
    JobStep.objects.create(job=job, index=0, name="plan", title="Plan", state=StepState.DONE, detail="fits")
    body = api(bob).get(f"/api/v1/jobs/{job.pk}").json()
    assert set(body) == JOB_FIELDS
    assert list(body["steps"][0]) == ["name", "state", "started_at", "finished_at", "detail"]
    assert (body["profile"], body["profile_version"], body["deployment"]) == ("coder", 2, 5)
    assert body["superseded_by"] == later.pk
    assert body["user"] == "bob"
    assert body["rig"] == "bench-01"
    assert body["eta_s"] is None
    assert api(bob).get(f"/api/v1/jobs?state=cancelled&kind=switch&user={bob.pk}").json()["count"] == 1


def test_a_log_is_followed_from_line_to_line(api: Api, bob: User) -> None:
    job = job_of(bob, state=JobState.RUNNING)
    client = api(bob)
    empty = client.get(f"/api/v1/jobs/{job.pk}/log").json()
    assert empty == {"items": [], "next_after": 0, "state": "running"}
    JobLogLine.objects.create(job=job, text="one")
    first = client.get(f"/api/v1/jobs/{job.pk}/log").json()
    assert [line["text"] for line in first["items"]] == ["one"]
    JobLogLine.objects.create(job=job, text="two", source="engine")
    then = client.get(f"/api/v1/jobs/{job.pk}/log?after={first['next_after']}").json()
    assert [(line["text"], line["source"]) for line in then["items"]] == [("two", "engine")]


def test_cancelling_answers_202_with_the_job(api: Api, alice: User, bob: User) -> None:
    own, others = job_of(bob), job_of(alice)
    answer = api(bob).post(f"/api/v1/jobs/{own.pk}/cancel")
    assert answer.status_code == 202
    assert answer.json()["state"] == "cancelled"
    assert api(bob).post(f"/api/v1/jobs/{own.pk}/cancel").json()["error"]["code"] == "job_ended"
    assert api(bob).post(f"/api/v1/jobs/{others.pk}/cancel").status_code == 403


@pytest.fixture
def shipped(rig: Any) -> None:
    load_models()
    load_profiles()


STARTING: dict[str, dict[str, Any]] = {
    "/api/v1/verifications": {},
    "/api/v1/installs": {"name": "starter"},
    "/api/v1/models/qwq-32b-awq/download": {},
    "/api/v1/switch": {"profile": "gemma-3-270m-cpu"},
}


@pytest.mark.parametrize("path", STARTING)
def test_wait_s_answers_once_the_job_has_ended(
    api: Api, alice: User, shipped: None, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    def while_it_sleeps(_: float) -> None:
        Job.objects.update(state=JobState.SUCCEEDED)  # the worker

    monkeypatch.setattr(waiting, "time", SimpleNamespace(monotonic=time.monotonic, sleep=while_it_sleeps))
    client = api(alice)
    asked = client.post(path, STARTING[path] | {"wait_s": 60}, content_type="application/json")
    assert (asked.status_code, asked.json()["state"]) == (202, "succeeded"), asked.content
    assert client.post(path, STARTING[path], content_type="application/json").json()["state"] == "queued"


def test_what_needs_no_field_needs_no_body(api: Api, alice: User, shipped: None) -> None:
    client = api(alice)
    assert client.generic("POST", "/api/v1/verifications").status_code == 202
    assert client.generic("POST", "/api/v1/models/qwq-32b-awq/download").status_code == 202
    key, _ = key_create(alice, name="ci", actor=actor_of(alice))
    assert client.generic("POST", f"/api/v1/keys/{key.pk}/rotate").status_code == 201
    assert client.generic("POST", "/api/v1/members").json()["role"] == "member"
