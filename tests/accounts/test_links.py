from __future__ import annotations

from datetime import timedelta

import pytest
from allauth.account.models import EmailAddress
from django.test import Client
from django.utils import timezone

from apps.accounts.models import Invitation, User
from apps.accounts.services import (
    invitation_accept,
    invitation_create,
    invitation_revoke,
    key_create,
    key_lookup,
    reset_path,
    setup_link_path,
    user_update,
)
from apps.audit.models import AuditEntry
from apps.common.actors import PANEL, actor_of
from apps.common.errors import Conflict, Invalid
from apps.common.roles import Role

GOOD = "correct-horse-battery"


def form(**changes: str) -> dict[str, str]:
    return {"email": "dora@lab.example", "name": "Dora", "password": GOOD, "password_again": GOOD, **changes}


def signed_in_as(client: Client) -> str | None:
    answer = client.get("/api/v1/members")
    return None if answer.status_code == 401 else client.session.get("_auth_user_id")


@pytest.mark.django_db
def test_the_set_up_link_makes_the_first_owner_and_signs_them_in(client: Client) -> None:
    path = setup_link_path()
    assert path is not None
    assert "Set up this panel" in client.get(path).content.decode()
    answer = client.post(path, form())
    assert answer.status_code == 302
    dora = User.objects.get(email="dora@lab.example")
    assert dora.role == Role.OWNER
    assert client.session["_auth_user_id"] == str(dora.pk)
    assert EmailAddress.objects.filter(user=dora, verified=True, primary=True).exists()
    assert setup_link_path() is None, "there is an owner now"


@pytest.mark.django_db
def test_a_newer_set_up_link_ends_the_one_before(client: Client) -> None:
    first, second = setup_link_path(), setup_link_path()
    assert first is not None
    assert second is not None
    assert client.get(first).status_code == 404
    assert client.get(second).status_code == 200


def test_an_invitation_works_once(client: Client, alice: User) -> None:
    _, path = invitation_create(role=Role.OPERATOR, email="Dora@Lab.example", actor=actor_of(alice))
    assert client.get(path).status_code == 200
    assert client.get(path).status_code == 200, "a preview of the link uses nothing up"
    assert client.post(path, form(email="somebody@else.example")).status_code == 302
    dora = User.objects.get(email="dora@lab.example")
    assert dora.role == Role.OPERATOR, "the invitation's address counts, not the request's"
    assert Client().post(path, form(email="eve@lab.example")).status_code == 404
    assert not User.objects.filter(email="eve@lab.example").exists()


def test_of_two_people_with_one_link_one_gets_in(alice: User) -> None:
    _, path = invitation_create(role=Role.MEMBER, actor=actor_of(alice))
    token = path.split("/")[2]
    invitation_accept(token, email="first@lab.example", password=GOOD)
    with pytest.raises(Invalid, match="used already"):
        invitation_accept(token, email="second@lab.example", password=GOOD)


def test_an_account_that_cannot_be_made_leaves_the_link_open(alice: User, bob: User) -> None:
    _, path = invitation_create(role=Role.MEMBER, actor=actor_of(alice))
    with pytest.raises(Conflict):
        invitation_accept(path.split("/")[2], email=bob.email, password=GOOD)
    assert Invitation.objects.get().is_open()


@pytest.mark.parametrize(
    ("changes", "field", "sentence"),
    [
        ({"password": "short", "password_again": "short"}, "password", "too short"),
        ({"password": "password1", "password_again": "password1"}, "password", "too common"),
        ({"password_again": "something-else-1"}, "password_again", "differ"),
        ({"email": "not an address"}, "email", "valid email"),
        ({"email": "bob@lab.example"}, "email", "already an account"),
        ({"password": "dora@lab.example", "password_again": "dora@lab.example"}, "password", "too similar"),
    ],
)
def test_a_wrong_form_keeps_what_was_typed_and_says_what_is_wrong_beside_the_field(
    client: Client, alice: User, bob: User, changes: dict[str, str], field: str, sentence: str
) -> None:
    _, path = invitation_create(role=Role.MEMBER, actor=actor_of(alice))
    answer = client.post(path, form(**changes))
    assert answer.status_code == 422
    assert sentence in " ".join(answer.context["form"].errors[field])
    assert 'value="Dora"' in answer.content.decode()
    assert GOOD not in answer.content.decode(), "a password is never sent back"
    assert Invitation.objects.get().is_open()


def test_withdrawn_and_expired_invitations_lead_nowhere(client: Client, alice: User) -> None:
    withdrawn, first = invitation_create(role=Role.MEMBER, actor=actor_of(alice))
    invitation_revoke(withdrawn, actor=actor_of(alice))
    expired, second = invitation_create(role=Role.MEMBER, actor=actor_of(alice))
    Invitation.objects.filter(pk=expired.pk).update(expires_at=timezone.now() - timedelta(seconds=1))
    for path in (first, second, "/join/never-was/"):
        answer = client.get(path)
        assert answer.status_code == 404
        assert "no longer works" in answer.content.decode()


def test_somebody_signed_in_is_told_to_sign_out_before_joining(client: Client, alice: User, bob: User) -> None:
    _, path = invitation_create(role=Role.OWNER, actor=actor_of(alice))
    client.force_login(bob)
    answer = client.post(path, form())
    assert answer.status_code == 409
    assert User.objects.filter(email="dora@lab.example").count() == 0


def test_a_reset_link_sets_the_password_once_and_ends_other_sessions(client: Client, alice: User, bob: User) -> None:
    laptop = Client()
    laptop.force_login(bob)
    assert laptop.get("/team/").status_code == 200
    path = reset_path(bob, actor=actor_of(alice))
    assert client.post(path, {"password": GOOD, "password_again": GOOD}).status_code == 302
    assert laptop.get("/team/").status_code == 302, "the session from before is over"
    assert client.get(path).status_code == 404, "the link is spent"
    assert client.login(email=bob.email, password=GOOD)
    assert AuditEntry.objects.filter(action="user.password", object_name=bob.email).count() == 1


def test_a_reset_link_of_somebody_else_or_made_up_leads_nowhere(client: Client, alice: User, bob: User) -> None:
    path = reset_path(bob, actor=PANEL)
    _, _, uid, token, _ = path.split("/")
    for wrong in (
        f"/reset/{uid}/{token[:-1]}x/",
        f"/reset/!!!/{token}/",
        f"/reset/MTIzNDU2Nzg5/{token}/",
        "/reset/_w/x-y/",
    ):
        assert client.get(wrong).status_code == 404


def test_a_deactivated_person_gets_no_reset_link(alice: User, bob: User) -> None:
    user_update(bob, actor=actor_of(alice), is_active=False)
    bob.refresh_from_db()
    with pytest.raises(Conflict, match="deactivated"):
        reset_path(bob, actor=actor_of(alice))


def test_keys_end_with_the_role_the_person_and_the_key(alice: User, bob: User) -> None:
    _, token = key_create(bob, name="laptop", actor=actor_of(bob))
    assert key_lookup(token) is not None
    user_update(bob, actor=actor_of(alice), role=Role.VIEWER)
    assert key_lookup(token) is None
    user_update(bob, actor=actor_of(alice), role=Role.MEMBER)
    assert key_lookup(token) is not None
    user_update(bob, actor=actor_of(alice), is_active=False)
    assert key_lookup(token) is None


def test_the_last_owner_stays(alice: User, bob: User) -> None:
    for change in ({"role": Role.MEMBER}, {"is_active": False}):
        with pytest.raises(Conflict, match="at least one active owner"):
            user_update(alice, actor=actor_of(alice), **change)  # type: ignore[arg-type]
    user_update(bob, actor=actor_of(alice), role=Role.OWNER)
    user_update(alice, actor=actor_of(bob), role=Role.MEMBER)
    alice.refresh_from_db()
    assert alice.role == Role.MEMBER
