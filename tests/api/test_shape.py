"""What holds for the whole API: errors, paging, sign-in, its description."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings
from django.test import Client

from apps.accounts.models import ApiKey, User
from apps.accounts.services import key_create, key_revoke, user_update
from apps.common.actors import actor_of
from apps.jobs.models import Job
from rigpanel.api import openapi_schema, operations

DESCRIPTION_FILE = Path(settings.BASE_DIR) / "docs" / "openapi.json"
Api = Callable[[Any], Client]


def error_of(answer: Any) -> dict[str, Any]:
    body = answer.json()
    assert set(body) == {"error"}
    assert {"code", "message"} <= set(body["error"]) <= {"code", "message", "fields"}
    error: dict[str, Any] = body["error"]
    return error


def test_the_checked_in_description_is_the_code() -> None:
    """After a change: ``manage.py openapi > docs/openapi.json``."""
    assert json.loads(DESCRIPTION_FILE.read_text("utf-8")) == openapi_schema()


def test_every_operation_is_described_with_its_role_and_a_name_of_its_own() -> None:
    schema = openapi_schema()
    ids = [details["operationId"] for methods in schema["paths"].values() for details in methods.values()]
    assert len(ids) == len(set(ids)) == len(operations())
    for methods in schema["paths"].values():
        for details in methods.values():
            assert details["x-role"] in ("viewer", "member", "operator", "owner")


def test_strangers_get_401_in_the_one_shape(db: None) -> None:
    answer = Client().get("/api/v1/jobs")
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert error_of(answer)["code"] == "unauthorized"


def test_a_wrong_key_is_401_even_beside_a_good_session(bob: User) -> None:
    client = Client(headers={"Authorization": "Bearer rp-never-was"})
    client.force_login(bob)
    assert client.get("/api/v1/jobs").status_code == 401
    assert Client(headers={"Authorization": "Basic Ym9iOmJvYg=="}).get("/api/v1/jobs").status_code == 401


def test_a_key_works_until_it_is_revoked_and_its_use_is_remembered(bob: User) -> None:
    key, token = key_create(bob, name="laptop", actor=actor_of(bob))
    client = Client(headers={"Authorization": f"Bearer {token}"})
    assert client.get("/api/v1/jobs").status_code == 200
    assert ApiKey.objects.get(pk=key.pk).last_used_at is not None
    key_revoke(key, actor=actor_of(bob))
    assert client.get("/api/v1/jobs").status_code == 401


def test_a_key_of_somebody_deactivated_stops_at_once(api: Api, alice: User, bob: User) -> None:
    client = api(bob)
    assert client.get("/api/v1/jobs").status_code == 200
    user_update(bob, actor=actor_of(alice), is_active=False)
    assert client.get("/api/v1/jobs").status_code == 401


def test_a_session_needs_the_csrf_token_to_change_something_and_a_key_does_not(api: Api, bob: User) -> None:
    browser = Client(enforce_csrf_checks=True)
    browser.force_login(bob)
    assert browser.get("/api/v1/keys").status_code == 200
    refused = browser.post("/api/v1/keys", {"name": "x"}, content_type="application/json")
    assert refused.status_code == 403
    assert error_of(refused)["code"] == "csrf"
    browser.get("/accounts/password/change/")
    browser.get("/me/")
    token = browser.cookies[settings.CSRF_COOKIE_NAME].value
    allowed = browser.post(
        "/api/v1/keys", {"name": "x"}, content_type="application/json", headers={"X-CSRFToken": token}
    )
    assert allowed.status_code == 201
    script = api(bob)
    script.handler.enforce_csrf_checks = True
    assert script.post("/api/v1/keys", {"name": "y"}, content_type="application/json").status_code == 201


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "field"),
    [
        ("get", "/api/v1/nothing/here", None, 404, None),
        ("get", "/api/v1/", None, 404, None),
        ("get", "/api/v1/rigs/never-was", None, 404, None),
        ("get", "/api/v1/jobs/99999999999999999999999", None, 404, None),
        ("put", "/api/v1/jobs", {}, 405, None),
        ("get", "/api/v1/jobs?limit=0", None, 422, "limit"),
        ("get", "/api/v1/jobs?limit=501", None, 422, "limit"),
        ("get", "/api/v1/jobs?since=yesterday", None, 422, "since"),
        ("get", "/api/v1/jobs?state=asleep", None, 422, "state"),
        ("get", "/api/v1/jobs/export?format=xml", None, 422, "format"),
        ("post", "/api/v1/keys", {}, 422, "name"),
        ("post", "/api/v1/keys", {"name": ""}, 422, "name"),
        ("post", "/api/v1/members", {"email": "no address"}, 422, "email"),
        ("post", "/api/v1/members", {"role": "emperor"}, 422, "role"),
        ("post", "/api/v1/switch", {"profile": "x", "wait_s": 601}, 422, "wait_s"),
        ("post", "/api/v1/installs", {"name": "starter", "wait_s": 601}, 422, "wait_s"),
        ("post", "/api/v1/verifications", {"wait_s": -1}, 422, "wait_s"),
        ("post", "/api/v1/models/x/download", {"wait_s": "long"}, 422, "wait_s"),
        ("post", "/api/v1/models", {"slug": "A B", "name": "x"}, 422, "slug"),
        ("get", "/api/v1/telemetry/history?metric=mood", None, 422, "metric"),
        ("get", "/api/v1/telemetry/latest?rig=never-was", None, 404, None),
        ("delete", "/api/v1/keys/999", None, 404, None),
    ],
)
def test_errors_have_one_shape(
    api: Api, alice: User, rig: Any, method: str, path: str, body: Any, status: int, field: str | None
) -> None:
    answer = getattr(api(alice), method)(path, body, content_type="application/json")
    assert answer.status_code == status, answer.content
    error = error_of(answer)
    if field is not None:
        assert field in error["fields"]
    if status == 405:
        assert "GET" in answer.headers["Allow"]


def test_a_body_that_is_no_json_is_an_error_in_the_one_shape(api: Api, alice: User) -> None:
    answer = api(alice).post("/api/v1/keys", "{", content_type="application/json")
    assert answer.status_code in (400, 422)
    error_of(answer)


def test_a_bug_of_ours_answers_500_in_the_one_shape(api: Api, alice: User, rig: Any) -> None:
    """A row that the code cannot read stands for a bug: nothing of ours is replaced."""
    Job.objects.create(kind="switch", title="x", rig_name="r", queue="q", user_name="x", result=["not", "an", "object"])
    answer = api(alice).get("/api/v1/jobs")
    assert answer.status_code == 500
    assert error_of(answer)["code"] == "errored"


def test_lists_are_paged(api: Api, alice: User) -> None:
    for n in range(5):
        Job.objects.create(kind="switch", title=f"Switch {n}", rig_name="r", queue="q", user_name="x")
    page = api(alice).get("/api/v1/jobs?limit=2&offset=1").json()
    assert set(page) == {"items", "count"}
    assert page["count"] == 5
    newest = Job.objects.order_by("-pk")[1:3]
    assert [item["id"] for item in page["items"]] == [job.pk for job in newest]


def test_the_docs_page_shows_every_operation_and_needs_nothing_from_elsewhere(bob: User) -> None:
    client = Client()
    client.force_login(bob)
    page = client.get("/api/v1/docs").content.decode()
    for operation in operations():
        assert operation.path in page
    assert not re.findall(r"""(?:src|href)=["'](?:https?:)?//""", page)
    assert "<style" not in page
    assert not re.findall(r"<script(?![^>]*\bsrc=)", page)


def test_metrics_and_probes_come_over_plain_loopback_where_the_pages_are_https(
    settings: Any, api: Api, alice: User
) -> None:
    settings.SECURE_SSL_REDIRECT = True  # as with an https RIGPANEL_PUBLIC_URL
    for path in ("/healthz", "/readyz", "/metrics"):
        assert Client().get(path).status_code != 301, path
    assert b"rigpanel_part_ok" in Client().get("/metrics").content
    assert Client().get("/metrics", REMOTE_ADDR="192.0.2.1").status_code == 403
    assert Client().get("/").status_code == 301


def test_the_description_is_there_for_anybody(db: None) -> None:
    assert Client().get("/api/v1/openapi.json").json()["openapi"].startswith("3.")


def test_a_worker_does_not_load_the_api() -> None:
    """The library behind the API costs each process some twenty megabytes."""
    code = """
import sys, django
django.setup()
from rigpanel.celery import app
app.loader.import_default_modules()
sys.exit("ninja" in sys.modules)
"""
    environment = {**os.environ, "DJANGO_SETTINGS_MODULE": "tests.settings"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=settings.BASE_DIR,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
