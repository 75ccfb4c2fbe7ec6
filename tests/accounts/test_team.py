from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from django.core.management import CommandError, call_command
from django.test import Client
from django.utils import timezone

from apps.accounts.models import ApiKey, Invitation, User
from apps.accounts.selectors import key_list
from apps.accounts.services import key_create, key_lookup, key_revoke
from apps.accounts.tokens import people_secret
from apps.audit.models import AuditEntry
from apps.common.actors import actor_of
from tests.factories.profiles import simulated_profile


def client_of(user: User) -> Client:
    client = Client()
    client.force_login(user)
    return client


def test_everybody_sees_who_shares_the_rig_but_only_owners_see_more(alice: User, bob: User, charlie: User) -> None:
    User.objects.filter(pk=bob.pk).update(is_active=False)
    seen = client_of(charlie).get("/team/").content.decode()
    assert "alice" in seen
    assert alice.email not in seen
    assert "bob" not in seen, "who left is the owners' business"
    assert "Invite somebody" not in seen
    owned = client_of(alice).get("/team/").content.decode()
    assert bob.email in owned
    assert "Reactivate" in owned


def test_an_owner_invites_and_the_link_is_shown_only_in_that_answer(alice: User) -> None:
    client = client_of(alice)
    page = client.post("/team/invite", {"email": "dora@lab.example", "role": "operator"}).content.decode()
    link = re.search(r"http://[^\"<]+/join/[\w-]+/", page)
    assert link is not None
    assert "/join/" not in client.get("/team/").content.decode()
    assert client.get(link.group().partition("://")[2].partition("/")[2].join(["/", ""])).status_code == 409
    invitation = Invitation.objects.get()
    assert client.post(f"/team/invitations/{invitation.pk}/withdraw").status_code == 302
    assert not Invitation.objects.get().is_open()
    assert not AuditEntry.objects.filter(detail__icontains="/join/").exists(), "the audit keeps no link"


def test_an_invitation_for_somebody_who_is_here_says_so_beside_the_field(alice: User, bob: User) -> None:
    answer = client_of(alice).post("/team/invite", {"email": bob.email, "role": "member"})
    assert answer.status_code == 422
    assert "already an account" in " ".join(answer.context["form"].errors["email"])
    assert bob.email in answer.content.decode()


def test_an_owner_changes_a_role_and_shuts_somebody_out(alice: User, bob: User) -> None:
    client, bobs = client_of(alice), client_of(bob)
    assert client.post(f"/team/{bob.pk}/edit", {"role": "operator"}).status_code == 302
    bob.refresh_from_db()
    assert bob.role == "operator"
    assert bob.is_active, "a role's form does not touch the rest"
    assert client.post(f"/team/{bob.pk}/edit", {"is_active": "false"}).status_code == 302
    assert bobs.get("/team/").status_code == 302
    assert client.post(f"/team/{bob.pk}/edit", {"is_active": "true"}).status_code == 302
    bob.refresh_from_db()
    assert bob.is_active
    assert bob.role == "operator"
    assert client.post(f"/team/{bob.pk}/edit", {"role": "emperor"}).status_code == 422
    assert client.post(f"/team/{alice.pk}/edit", {"role": "member"}).status_code == 409


def test_a_reset_link_made_on_the_team_page_works(alice: User, bob: User) -> None:
    page = client_of(alice).post(f"/team/{bob.pk}/reset-link").content.decode()
    link = re.search(r"/reset/[\w-]+/[\w-]+/", page)
    assert link is not None
    assert Client().get(link.group()).status_code == 200


def test_members_may_not_touch_people(bob: User, alice: User) -> None:
    client = client_of(bob)
    posts = ["/team/invite", f"/team/{bob.pk}/edit", f"/team/{alice.pk}/reset-link"]
    for path in posts:
        assert client.post(path, {"role": "owner"}).status_code == 403
    bob.refresh_from_db()
    assert bob.role == "member"


def test_a_key_is_shown_once_with_what_to_paste(bob: User, settings: Any) -> None:
    client = client_of(bob)
    page = client.post("/me/keys", {"name": "laptop"}).content.decode()
    token = re.search(r"rp-[\w-]{40,}", page)
    assert token is not None
    assert f"curl {settings.GATEWAY_URL}/v1/chat/completions" in page
    key = key_lookup(token.group())
    assert key is not None
    assert key.user == bob
    assert token.group() not in client.get("/me/").content.decode()
    assert client.post(f"/me/keys/{key.pk}/revoke").status_code == 302
    assert key_lookup(token.group()) is None
    assert client.post("/me/keys", {"name": ""}).status_code == 422


def shown_key(page: str) -> ApiKey:
    token = re.search(r"rp-[\w-]{40,}", page)
    assert token is not None, page
    key = key_lookup(token.group())
    assert key is not None
    return key


def test_a_key_is_limited_on_the_page_and_the_list_says_how(bob: User, settings: Any) -> None:
    settings.PANEL_TIME_ZONE = ZoneInfo("Europe/Berlin")
    simulated_profile("coder")
    client = client_of(bob)
    first = client.get("/me/").content.decode()
    assert 'name="models" value="coder"' in first
    assert "names_people" not in first, "that is for owners"
    made = {"name": "ci", "models": ["coder"], "networks": "10.0.0.7, 192.168.1.9/24", "last_day": "2099-03-01"}
    key = shown_key(client.post("/me/keys", made).content.decode())
    assert key.allowed_models == ["coder"]
    assert key.allowed_networks == ["10.0.0.7/32", "192.168.1.0/24"]
    assert key.expires_at == datetime(2099, 3, 1, 23, tzinfo=UTC), "the end of that day in Berlin"
    page = client.get("/me/").content.decode()
    for told in ("only <span", "10.0.0.7/32", "192.168.1.0/24", "2099-03-01 23:00:00 UTC"):
        assert told in page
    lasts = shown_key(client.post("/me/keys", {"name": "week", "lifetime": "7"}).content.decode())
    assert lasts.expires_at is not None
    assert abs(lasts.expires_at - timezone.now() - timedelta(days=7)) < timedelta(minutes=5)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"models": ["codr"]}, "codr is not one of the available choices"),
        ({"networks": "the office"}, "&#x27;the&#x27; is not an address or a network."),
        ({"last_day": "2020-01-01"}, "That time has passed."),
        ({"last_day": "tomorrow"}, "Enter a valid date."),
        ({"last_day": "9999-12-31"}, "Give a time within 100 years"),
        ({"last_day": "2099-01-01", "lifetime": "7"}, "Choose one of the two"),
    ],
    ids=str,
)
def test_what_is_wrong_with_a_limit_stands_beside_it_and_nothing_is_made(
    bob: User, wrong: dict[str, Any], said: str
) -> None:
    simulated_profile("coder")
    answer = client_of(bob).post("/me/keys", {"name": "ci", **wrong})
    assert answer.status_code == 422
    page = answer.content.decode()
    assert said in page
    assert 'value="ci"' in page, "what was typed stays"
    assert "<details open>" in page
    assert not ApiKey.objects.exists()


def test_a_key_is_replaced_on_the_page_and_the_old_one_goes_on_for_a_while(bob: User, alice: User) -> None:
    old, token = key_create(bob, name="laptop", allowed_networks=["10.0.0.0/8"], actor=actor_of(bob))
    client = client_of(bob)
    assert f"/me/keys/{old.pk}/rotate" in client.get("/me/").content.decode()
    page = client.post(f"/me/keys/{old.pk}/rotate", {"overlap_hours": "1"}).content.decode()
    assert "goes on and ends" in page
    new = shown_key(page)
    assert (new.name, new.allowed_networks) == ("laptop", ["10.0.0.0/8"])
    old.refresh_from_db()
    assert old.expires_at is not None
    assert timedelta(minutes=55) < old.expires_at - timezone.now() <= timedelta(hours=1)
    assert key_lookup(token) is not None
    assert "has ended" in client.post(f"/me/keys/{old.pk}/rotate", {"overlap_hours": "0"}).content.decode()
    assert key_lookup(token) is None
    again = client.post(f"/me/keys/{old.pk}/rotate", {"overlap_hours": "24"})
    assert again.status_code == 409
    assert "make a new one instead" in again.content.decode()
    assert client.post(f"/me/keys/{new.pk}/rotate", {"overlap_hours": "99"}).status_code == 422
    assert client_of(alice).post(f"/me/keys/{new.pk}/rotate", {"overlap_hours": "24"}).status_code == 404


def test_an_owner_makes_open_webuis_key_on_the_page_and_nobody_else_can(alice: User, bob: User) -> None:
    page = client_of(alice).post("/me/keys", {"name": "Open WebUI", "names_people": "on"}).content.decode()
    key = shown_key(page)
    assert key.names_people
    assert people_secret(key.digest) in page
    assert not shown_key(
        client_of(bob).post("/me/keys", {"name": "x", "names_people": "on"}).content.decode()
    ).names_people


def test_keys_that_were_revoked_come_last(bob: User) -> None:
    for name in ("one", "two"):
        key_create(bob, name=name, actor=actor_of(bob))
    key_revoke(ApiKey.objects.get(name="two"), actor=actor_of(bob))
    assert [key.name for key in key_list(bob)] == ["one", "two"]


def test_viewers_have_no_keys_and_the_page_says_why(charlie: User) -> None:
    client = client_of(charlie)
    assert "they have no keys" in client.get("/me/").content.decode()
    assert client.post("/me/keys", {"name": "laptop"}).status_code == 403


def test_nobody_revokes_somebody_elses_key(alice: User, bob: User) -> None:
    key, token = key_create(bob, name="laptop", actor=actor_of(bob))
    assert client_of(alice).post(f"/me/keys/{key.pk}/revoke").status_code == 404
    assert key_lookup(token) is not None


def test_a_name_is_saved_and_html_in_it_stays_text(bob: User) -> None:
    client = client_of(bob)
    assert client.post("/me/name", {"name": "<b>Bob</b>"}).status_code == 302
    page = client.get("/me/").content.decode()
    assert "<b>Bob</b>" not in page
    assert "&lt;b&gt;Bob&lt;/b&gt;" in page


def test_createkey_prints_the_key_alone_and_resetlink_the_link(
    alice: User, charlie: User, capsys: pytest.CaptureFixture[str]
) -> None:
    call_command("createkey", "Alice@lab.example", "--name", "script")
    token = capsys.readouterr().out.strip()
    key = key_lookup(token)
    assert key is not None
    assert key.user == alice
    with pytest.raises(CommandError, match="Viewers have no keys"):
        call_command("createkey", charlie.email, "--name", "script")
    with pytest.raises(CommandError, match="nobody"):
        call_command("createkey", "eve@lab.example", "--name", "script")
    capsys.readouterr()
    call_command("resetlink", charlie.email)
    link = capsys.readouterr().out.strip()
    assert Client().get("/" + link.split("/", 3)[3]).status_code == 200
