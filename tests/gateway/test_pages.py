"""Use and quotas as people meet them: /me/, the owners' pages, the API. Members see only their own."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from django.test import Client
from django.utils import timezone

from apps.accounts.models import ApiKey, User
from apps.accounts.services import key_create
from apps.audit.models import AuditEntry
from apps.common.actors import actor_of
from apps.gateway.models import Quota, UsageDay, UsageRefusal
from apps.gateway.selectors import today
from apps.gateway.services import quota_set

TEAM_QUERIES = 16  # session, person, frame and the page itself; it must not grow with the rows
ME_QUERIES = 26


def signed_in(user: User) -> Client:
    client = Client()
    client.force_login(user)
    return client


def used(user: User, name: str = "laptop", ago: int = 0, **sums: Any) -> UsageDay:
    key = ApiKey.objects.filter(user=user, name=name).first() or key_create(user, name=name, actor=actor_of(user))[0]
    row = {"model": "coder", "requests": 10, "tokens_in": 1000, "tokens_out": 500, "deployment_id": 3, **sums}
    return UsageDay.objects.create(day=today() - timedelta(days=ago), user=user, key=key, **row)


@pytest.fixture
def some_use(alice: User, bob: User, rig: Any) -> None:
    used(alice, tokens_out=77_000, energy_joules=7_200_000)
    used(bob, tokens_out=4_321, interrupted=2, unknown=2)
    used(bob, name="editor", ago=1, model="chat", background=4, tokens_cached=900)
    used(bob, name="editor", ago=200, model="ancient")


def test_a_member_sees_their_own_use_by_model_and_key_and_no_others(some_use: None, bob: User) -> None:
    page = signed_in(bob).get("/me/").content.decode()
    assert "4\u2009321" in page
    assert "2 interrupted" in page
    assert "editor (rp-" in page
    assert "4 in the background" in page
    assert "77\u2009000" not in page
    assert "ancient" not in page
    assert "Nothing limits you" in page
    assert "style=" not in page
    assert "onclick" not in page


def test_refused_requests_are_told_with_their_reason(some_use: None, alice: User, bob: User) -> None:
    used(bob, model="", deployment_id=0, requests=0, tokens_in=0, tokens_out=0, refused=1234)
    key = ApiKey.objects.get(user=bob, name="laptop")
    UsageRefusal.objects.create(
        minute=timezone.now(), user=bob, key=key, model="coder", code="rate_limit_exceeded", count=1234
    )
    for page in (signed_in(bob).get("/me/"), signed_in(alice).get(f"/team/usage/?member={bob.public_id}")):
        told = page.content.decode()
        assert "over a limit per minute or at once" in told
        assert "1\u2009234" in told
    csv = b"".join(signed_in(alice).get("/team/usage/?format=csv").streaming_content).decode()  # type: ignore[attr-defined]
    assert ",refused," in csv.splitlines()[0]
    assert ",1234," in csv
    (row,) = [r for r in signed_in(bob).get("/api/v1/usage?by=model").json()["items"] if r["of"] == ""]
    assert (row["refused"], row["requests"]) == (1234, 0)
    assert "over a limit" not in signed_in(alice).get("/me/").content.decode()


def test_meters_show_how_far_a_limit_is(some_use: None, alice: User, bob: User) -> None:
    quota_set(bob, {"tokens_per_day": 6000, "tokens_per_month": 5000}, actor=actor_of(alice))
    page = signed_in(bob).get("/me/").content.decode()
    assert "5\u2009321</b> of 6\u2009000" in page
    assert 'aria-valuenow="89"' in page
    assert "fill-warn" in page
    assert "requests get 429 until it begins anew" in page, "the month is spent"


def test_snippets_are_there_for_every_tool_with_the_gateways_address(bob: User, rig: Any) -> None:
    page = signed_in(bob).get("/me/").content.decode()
    for part in ("curl http://127.0.0.1:8000/v1/chat/completions", "new OpenAI(", "OPENAI_API_BASE_URLS=http",
                 "apiBase: http", "OpenAI Compatible", "aider --model openai/",
                 "ANTHROPIC_BASE_URL=http://127.0.0.1:8000\n", "ANTHROPIC_DEFAULT_HAIKU_MODEL="):  # fmt: skip
        assert part in page, part


def test_money_is_shown_once_a_price_is_set(some_use: None, alice: User, settings: Any) -> None:
    assert "Cost" not in signed_in(alice).get("/team/usage/").content.decode()
    settings.ENERGY_PRICE, settings.ENERGY_CURRENCY = 0.5, "CHF"
    page = signed_in(alice).get("/team/usage/").content.decode()
    assert "1.00 CHF" in page
    assert "Energy is an estimate" in page


def test_an_owner_sees_everybody_or_one_person_and_takes_it_along_as_csv(
    some_use: None, alice: User, bob: User
) -> None:
    client = signed_in(alice)
    page = client.get("/team/usage/?days=7").content.decode()
    assert "77\u2009000" in page
    assert "4\u2009821" in page
    page = client.get(f"/team/usage/?member={bob.public_id}").content.decode()
    assert "What bob uses" in page
    assert "77\u2009000" not in page
    answer = client.get("/team/usage/?format=csv&days=30")
    lines = b"".join(answer.streaming_content).decode().splitlines()  # type: ignore[attr-defined]
    assert answer["Content-Disposition"].startswith('attachment; filename="usage-')
    assert lines[0].startswith("day,person,email,key,model,deployment,requests")
    assert len(lines) == 4
    assert any("bob@lab.example" in line and ",4321," in line for line in lines)
    for wrong in ("start=soon", "start=2027-02-31", "start=2027-02-03&end=2027-02-01", "format=xlsx"):
        assert client.get(f"/team/usage/?{wrong}").status_code == 422, wrong


def test_an_owner_sets_and_takes_away_a_quota(alice: User, bob: User, rig: Any) -> None:
    client = signed_in(alice)
    form = client.get(f"/team/quotas/?subject=user-{bob.pk}").content.decode()
    assert 'name="tokens_per_day"' in form
    body = {"subject": f"user-{bob.pk}", "tokens_per_day": "5000", "share": "2"}
    assert client.post("/team/quotas/", body).status_code == 302
    assert Quota.objects.get().tokens_per_day == 5000
    assert "<b>5\u2009000</b>" in client.get("/team/quotas/").content.decode()
    answer = client.post("/team/quotas/", {**body, "share": "0"})
    assert answer.status_code == 422
    assert 'value="5000"' in answer.content.decode(), "what was typed stays"
    assert client.post("/team/quotas/", {"subject": f"user-{bob.pk}"}).status_code == 302
    assert not Quota.objects.exists()
    assert AuditEntry.objects.filter(action="quota.set").count() == 2
    for wrong in ("role-viewer", "user-x", "nobody-1", ""):
        assert client.post("/team/quotas/", {"subject": wrong}).status_code == 422, wrong
    assert client.post("/team/quotas/", {"subject": "user-99999"}).status_code == 404


def test_a_roles_limit_is_shown_beside_everybody_it_is_for(alice: User, bob: User, rig: Any) -> None:
    quota_set(subject_role("member"), {"concurrent": 7}, actor=actor_of(alice))
    page = signed_in(alice).get("/team/quotas/").content.decode()
    assert '<span class="muted" title="from the role">7</span>' in page


def subject_role(name: str) -> Any:
    from apps.common.roles import Role

    return Role(name)


def test_the_api_gives_members_their_own_use_only(some_use: None, alice: User, bob: User) -> None:
    client = signed_in(bob)
    days = client.get("/api/v1/usage?by=day").json()
    assert days["count"] == 30
    assert days["items"][-1]["tokens_out"] == 4321
    users = client.get("/api/v1/usage?by=user").json()["items"]
    assert [item["of"] for item in users] == [str(bob.public_id)]
    assert {item["name"] for item in client.get("/api/v1/usage?by=model").json()["items"]} == {"coder", "chat"}
    assert client.get(f"/api/v1/usage?member={alice.email}").status_code == 403
    assert client.get("/api/v1/usage?member=nobody@lab.example").status_code == 403  # not 404: that would tell
    assert client.get(f"/api/v1/usage?member={bob.email.upper()}").status_code == 200
    for far in ("0001-01-05", "9999-12-31"):
        assert client.get(f"/api/v1/usage?end={far}").status_code == 422
    owner = signed_in(alice)
    assert len(owner.get("/api/v1/usage?by=user").json()["items"]) == 2
    assert len(owner.get(f"/api/v1/usage?by=user&member={bob.email}").json()["items"]) == 1
    assert owner.get("/api/v1/usage?by=moon").status_code == 422
    assert owner.get("/api/v1/usage?start=2027-02-03&end=2027-02-01").status_code == 422


def test_pages_ask_the_database_no_more_often_with_more_rows(
    some_use: None, alice: User, bob: User, django_assert_max_num_queries: Any
) -> None:
    client = signed_in(alice)
    for path, most in (("/team/usage/", TEAM_QUERIES), ("/team/quotas/", TEAM_QUERIES), ("/me/", ME_QUERIES)):
        client.get(path)
        with django_assert_max_num_queries(most):
            client.get(path)
    for number in range(12):
        used(bob, name=f"key-{number}", ago=number % 5, model=f"model-{number}")
        quota_set(ApiKey.objects.get(name=f"key-{number}"), {"concurrent": number}, actor=actor_of(alice))
    for path, most in (("/team/usage/", TEAM_QUERIES), ("/team/quotas/", TEAM_QUERIES), ("/me/", ME_QUERIES)):
        with django_assert_max_num_queries(most):
            assert client.get(path).status_code == 200


def test_a_full_disk_is_said_where_owners_look(alice: User, rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apps.gateway.views.ledger_trouble", lambda: "No space left on device")
    assert (
        "The ledger cannot be written: No space left on device" in signed_in(alice).get("/team/usage/").content.decode()
    )
