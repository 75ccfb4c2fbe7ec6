"""Models, profiles, plans, switches, engines, verifications, readings and people through the API."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from django.test import Client

from apps.accounts.models import Invitation, User
from apps.deployments.models import Deployment
from apps.jobs.models import Job
from apps.profiles.models import Profile
from apps.telemetry.models import Sample
from apps.verification.models import CheckResult, VerificationRun
from tests.factories.profiles import simulated_profile

Api = Callable[[Any], Client]


def send(client: Client, method: str, path: str, body: Any) -> Any:
    return client.generic(method, f"/api/v1{path}", json.dumps(body), content_type="application/json")


def test_a_rig_is_found_by_slug_and_id_with_cards_and_bridges(api: Api, charlie: User, bob: User, rig: Any) -> None:
    client = api(bob)
    by_slug = client.get("/api/v1/rigs/bench-01").json()
    assert by_slug == client.get(f"/api/v1/rigs/{rig.pk}").json()
    assert {"index", "uuid", "name", "memory_total_bytes", "pcie", "numa_node"} <= set(by_slug["gpus"][0])
    assert by_slug["gpus"][0]["pcie"]["width_max"] == 16
    assert by_slug["gpus"][0]["numa_node"] is None, "not reported is null, never 0"
    assert [(link["first"], link["second"]) for link in by_slug["links"]] == [(0, 1), (2, 3)]
    assert by_slug["is_simulated"] is True


def test_a_model_is_made_changed_and_removed(api: Api, olivia: User) -> None:
    client = api(olivia)
    made = send(client, "POST", "/models", {"slug": "tiny", "name": "Tiny", "checkpoint": "lab/tiny", "layers": 4})
    assert made.status_code == 201, made.content
    changed = send(client, "PATCH", "/models/tiny", {"layers": 8, "licence": None})
    assert changed.json()["layers"] == 8
    assert changed.json()["checkpoint"] == "lab/tiny", "what was left out stays"
    assert send(client, "PATCH", "/models/tiny", {"layers": "many"}).status_code == 422
    assert send(client, "PATCH", "/models/tiny", {"mood": "good"}).status_code == 422
    assert send(client, "POST", "/models", {"slug": "tiny", "name": "Tiny"}).status_code == 409
    assert client.delete("/api/v1/models/tiny").status_code == 204
    assert client.get("/api/v1/models/tiny").status_code == 404


@pytest.fixture
def coder(rig: Any) -> Profile:
    return simulated_profile("coder", tp=2, members_may_switch=True)


def test_a_profile_is_made_and_a_change_makes_a_version(api: Api, olivia: User, coder: Profile) -> None:
    client = api(olivia)
    body = {"slug": "pair", "name": "Pair", "model": "coder", "engine": "simulated", "tensor_parallel_size": 2}
    made = send(client, "POST", "/profiles", body)
    assert made.status_code == 201, made.content
    assert made.json()["version"]["layout"] == "TP2"
    assert send(client, "POST", "/profiles", body).status_code == 409
    changed = send(client, "PATCH", "/profiles/pair", {"replicas": 2, "note": "both pairs"}).json()
    assert changed["version"]["number"] == 2
    assert changed["version"]["layout"] == "2×TP2"
    versions = client.get(f"/api/v1/profiles/{changed['id']}/versions").json()
    assert [version["number"] for version in versions["items"]] == [2, 1]
    assert send(client, "PATCH", "/profiles/pair", {"engine": "steam"}).status_code == 422
    assert send(client, "POST", "/profiles", {**body, "slug": "x", "model": "never-was"}).status_code == 404
    assert client.delete("/api/v1/profiles/pair").status_code == 204
    assert "pair" not in [item["slug"] for item in client.get("/api/v1/profiles").json()["items"]]


def test_a_plan_says_where_a_profile_would_lie_saved_or_not(api: Api, bob: User, coder: Profile) -> None:
    plan = api(bob).get("/api/v1/profiles/coder/plan").json()
    assert plan["fits"] is True
    assert plan["layout"] == "TP2"
    assert plan["replicas"] in ([[0, 1]], [[2, 3]])
    assert len(plan["command_lines"]) == 1
    draft = send(api(bob), "POST", "/plan", {"model": "coder", "engine": "simulated", "tensor_parallel_size": 4})
    assert draft.status_code == 200, draft.content
    assert sorted(draft.json()["replicas"][0]) == [0, 1, 2, 3]
    assert draft.json()["version"] == 0
    too_big = send(api(bob), "POST", "/plan", {"model": "coder", "engine": "simulated", "tensor_parallel_size": 8})
    assert too_big.json()["fits"] is False
    assert too_big.json()["problems"]
    refused = send(api(bob), "POST", "/plan", {"model": "coder", "engine": "vllm", "options": {"--no": "such"}})
    assert refused.status_code == 422
    assert "options" in refused.json()["error"]["fields"]


def test_a_switch_answers_with_its_job_and_a_double_click_is_one(
    api: Api, bob: User, olivia: User, coder: Profile
) -> None:
    first = send(api(bob), "POST", "/switch", {"profile": "coder", "reason": "sprint"})
    assert first.status_code == 202
    assert (first.json()["state"], first.json()["profile"]) == ("queued", "coder")
    assert send(api(bob), "POST", "/switch", {"profile": str(coder.pk)}).json()["id"] == first.json()["id"]
    simulated_profile("private", tp=2)
    assert send(api(bob), "POST", "/switch", {"profile": "private"}).status_code == 403
    # Replacing everything else is stopping it, which members may not.
    assert send(api(bob), "POST", "/switch", {"profile": "coder", "exclusive": True}).status_code == 403
    assert send(api(olivia), "POST", "/switch", {"profile": "private"}).status_code == 202
    assert Job.objects.get(pk=first.json()["id"]).state == "cancelled", "superseded"
    assert send(api(bob), "POST", "/switch", {"profile": "never-was"}).status_code == 404


def test_waiting_for_a_switch_ends_with_the_limit(api: Api, bob: User, coder: Profile) -> None:
    answer = send(api(bob), "POST", "/switch", {"profile": "coder", "wait_s": 0.5})
    assert answer.status_code == 202
    assert answer.json()["state"] == "queued", "no worker runs here"


def test_deployments_are_listed_and_what_has_ended_cannot_be_stopped(
    api: Api, olivia: User, rig: Any, coder: Profile
) -> None:
    ended = Deployment.objects.create(rig=rig, version=coder.current, served_name="coder", status="stopped")
    live = Deployment.objects.create(rig=rig, version=coder.current, served_name="coder", status="ready")
    client = api(olivia)
    assert [d["id"] for d in client.get("/api/v1/deployments").json()["items"]] == [live.pk, ended.pk]
    only = client.get("/api/v1/deployments?live=true&rig=bench-01").json()
    assert [d["profile"] for d in only["items"]] == ["coder"]
    assert "engine_key" not in json.dumps(only)
    assert send(client, "POST", f"/deployments/{ended.pk}/stop", {}).status_code == 409
    stopping = send(client, "POST", f"/deployments/{live.pk}/stop", {"reason": "night"})
    assert stopping.status_code == 202
    assert stopping.json()["kind"] == "stop"
    again = client.generic("POST", f"/api/v1/deployments/{live.pk}/stop")
    assert again.json()["id"] == stopping.json()["id"], "no body is needed, and twice is once"


def test_an_engine_is_asked_for_by_name(api: Api, olivia: User, rig: Any) -> None:
    answer = send(api(olivia), "POST", "/installs", {"name": "starter"})
    assert answer.status_code == 202
    assert send(api(olivia), "POST", "/installs", {"name": "rm -rf"}).status_code == 404
    assert api(olivia).get("/api/v1/installs").json()["count"] == 0


def test_a_verification_is_asked_for_and_read(api: Api, olivia: User, rig: Any) -> None:
    job = send(api(olivia), "POST", "/verifications", {"suite": "quick"})
    assert job.status_code == 202, job.content
    assert send(api(olivia), "POST", "/verifications", {"suite": "never-was"}).status_code in (404, 422)
    run = VerificationRun.objects.get(job_id=job.json()["id"])
    CheckResult.objects.create(
        run=run, check_name="gpu_count", title="GPUs", verdict="pass", expected="4", measured="4"
    )
    body = api(olivia).get(f"/api/v1/verifications/{run.pk}").json()
    assert body["job"] == job.json()["id"]
    assert body["results"][0]["check"] == "gpu_count"
    assert (body["results"][0]["expected"], body["results"][0]["measured"]) == ("4", "4")


def test_readings_without_a_sampler_are_null_and_never_zero(api: Api, bob: User, rig: Any) -> None:
    latest = api(bob).get("/api/v1/telemetry/latest").json()
    assert latest["at"] is None
    assert latest["stale"] is True
    assert latest["gpus"] == []


def test_history_is_one_grid_for_all_cards(api: Api, bob: User, rig: Any) -> None:
    at = datetime.now(UTC).replace(microsecond=0) - timedelta(minutes=5)
    at -= timedelta(seconds=at.second % 10)
    gpu = rig.gpus.first()
    Sample.objects.create(rig=rig, gpu_uuid=gpu.uuid, at=at, seconds=10, power_watts=250.0)
    body = api(bob).get("/api/v1/telemetry/history?metric=power&points=400").json()
    assert body["unit"] == "W"
    assert len(body["series"]) == 4
    assert [value for value in body["series"][0]["values"] if value is not None] == [250.0]
    assert all(len(line["values"]) == len(body["times"]) for line in body["series"])
    assert api(bob).get("/api/v1/telemetry/history?metric=power&gpu=9").status_code == 422


def test_members_see_names_and_owners_see_and_change_more(api: Api, alice: User, bob: User) -> None:
    seen = {item["name"]: item for item in api(bob).get("/api/v1/members").json()["items"]}
    assert seen["alice"]["role"] == "owner"
    assert seen["alice"]["email"] is None
    owner = api(alice)
    invited = send(owner, "POST", "/members", {"email": "dora@lab.example", "role": "viewer"})
    assert invited.status_code == 201
    assert "/join/" in invited.json()["link"]
    assert Invitation.objects.get().role == "viewer"
    changed = send(owner, "PATCH", f"/members/{bob.public_id}", {"role": "operator"})
    assert changed.json()["role"] == "operator"
    assert send(owner, "PATCH", f"/members/{alice.public_id}", {"is_active": False}).status_code == 409


def test_a_key_made_by_the_api_is_shown_once(api: Api, bob: User) -> None:
    client = api(bob)
    made = send(client, "POST", "/keys", {"name": "ci"})
    assert made.status_code == 201
    token = made.json()["key"]
    listed = client.get("/api/v1/keys").json()
    assert token not in json.dumps(listed)
    other = Client(headers={"Authorization": f"Bearer {token}"})
    assert other.get("/api/v1/jobs").status_code == 200
    assert client.delete(f"/api/v1/keys/{made.json()['id']}").status_code == 204
    assert other.get("/api/v1/jobs").status_code == 401
