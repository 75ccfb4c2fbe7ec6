from __future__ import annotations

from typing import Any

import pytest
from allauth.mfa.models import Authenticator
from allauth.mfa.totp.internal.auth import format_hotp_value, hotp_value, yield_hotp_counters_from_time
from django.core.cache import cache
from django.test import Client

from apps.accounts.models import User
from apps.accounts.services import user_update
from apps.audit.models import AuditEntry
from apps.common.actors import actor_of


@pytest.fixture(autouse=True)
def _fresh_counters() -> None:
    cache.clear()


def password_of(user: User) -> str:
    return f"{user.email.partition('@')[0]}-secret-1"


def sign_in(client: Client, user: User, password: str = "") -> Any:
    return client.post("/accounts/login/", {"login": user.email, "password": password or password_of(user)})


def test_somebody_signs_in_and_out(client: Client, bob: User) -> None:
    assert client.get("/team/").headers["Location"].startswith("/accounts/login/?next=")
    assert sign_in(client, bob).headers["Location"] == "/"
    assert client.get("/team/").status_code == 200
    assert client.post("/accounts/logout/").status_code == 302
    assert client.get("/team/").status_code == 302


def test_a_wrong_password_is_said_beside_the_form_with_422(client: Client, bob: User) -> None:
    answer = sign_in(client, bob, "wrong")
    assert answer.status_code == 422
    assert bob.email in answer.content.decode(), "the address that was typed stays"
    assert answer.context["form"].errors


def test_after_some_wrong_passwords_even_the_right_one_has_to_wait(client: Client, bob: User) -> None:
    for _ in range(6):
        answer = sign_in(client, bob, "wrong")
    assert answer.status_code in (422, 429)
    answer = sign_in(client, bob)
    assert answer.status_code in (422, 429)
    assert client.get("/team/").status_code == 302


def test_a_session_ends_at_once_when_its_person_is_deactivated(client: Client, alice: User, bob: User) -> None:
    sign_in(client, bob)
    assert client.get("/team/").status_code == 200
    user_update(bob, actor=actor_of(alice), is_active=False)
    assert client.get("/team/").status_code == 302
    assert client.get("/api/v1/jobs").status_code == 401
    assert sign_in(Client(), bob).status_code in (302, 422)
    assert client.get("/team/").status_code == 302


def test_nobody_signs_up_without_an_invitation(client: Client, db: None) -> None:
    assert client.get("/accounts/signup/").status_code == 404


def code_now(secret: str) -> str:
    return format_hotp_value(hotp_value(secret, next(iter(yield_hotp_counters_from_time()))))


def test_a_second_factor_is_set_up_asked_for_and_removed_by_an_owner(client: Client, alice: User, bob: User) -> None:
    sign_in(client, bob)
    asked = client.get("/accounts/2fa/totp/activate/")
    assert asked.headers["Location"].startswith("/accounts/reauthenticate/"), "a borrowed laptop sets up nothing"
    form = {"password": "wrong", "next": "/accounts/2fa/totp/activate/"}
    assert client.post("/accounts/reauthenticate/", form).status_code == 422
    page = client.post("/accounts/reauthenticate/", {**form, "password": password_of(bob)}, follow=True)
    secret = page.context["form"].secret
    assert "data:image/svg+xml" in page.content.decode()
    wrong = client.post("/accounts/2fa/totp/activate/", {"code": "000000"})
    assert wrong.status_code == 422
    done = client.post("/accounts/2fa/totp/activate/", {"code": code_now(secret)})
    assert done.headers["Location"] == "/accounts/2fa/recovery-codes/"
    codes = client.get("/accounts/2fa/recovery-codes/").context["unused_codes"]
    assert len(codes) == 10
    assert client.get("/accounts/2fa/").status_code == 200

    phone = Client()
    answer = sign_in(phone, bob)
    assert answer.headers["Location"] == "/accounts/2fa/authenticate/"
    assert phone.get("/team/").status_code == 302, "the password alone is not enough"
    assert phone.get("/accounts/2fa/authenticate/").status_code == 200
    assert phone.post("/accounts/2fa/authenticate/", {"code": codes[0]}).status_code == 302
    assert phone.get("/team/").status_code == 200

    owner = Client()
    owner.force_login(alice)
    assert owner.post(f"/team/{bob.pk}/remove-second-factor").status_code == 302
    assert not Authenticator.objects.filter(user=bob).exists()
    done_by = AuditEntry.objects.filter(action__startswith="user.second_factor").order_by("sequence")
    assert {(entry.action, entry.actor_name) for entry in done_by} == {
        ("user.second_factor_add", "bob"),
        ("user.second_factor_remove", "alice"),
    }


def test_changing_the_password_keeps_this_session_and_ends_the_others(client: Client, bob: User) -> None:
    other = Client()
    sign_in(client, bob)
    sign_in(other, bob)
    form = {"oldpassword": password_of(bob), "password1": "another-good-one-7", "password2": "another-good-one-7"}
    assert client.post("/accounts/password/change/", {**form, "password2": "typo"}).status_code == 422
    assert client.post("/accounts/password/change/", form).status_code == 302
    assert client.get("/team/").status_code == 200
    assert other.get("/team/").status_code == 302
    assert AuditEntry.objects.filter(action="user.password", actor_name="bob").count() == 1


def test_the_forgotten_password_page_says_who_can_help_where_no_mail_goes_out(client: Client, db: None) -> None:
    assert "manage.py resetlink" in client.get("/accounts/password/reset/").content.decode()


def test_with_a_mail_server_a_link_is_mailed_and_strangers_learn_nothing(
    client: Client, bob: User, settings: Any, mailoutbox: list[Any]
) -> None:
    settings.EMAIL_ENABLED = True
    known = client.post("/accounts/password/reset/", {"email": bob.email})
    unknown = client.post("/accounts/password/reset/", {"email": "eve@lab.example"})
    assert known.status_code == unknown.status_code == 200
    assert known.content.decode().replace(bob.email, "X") == unknown.content.decode().replace("eve@lab.example", "X")
    assert [mail.to for mail in mailoutbox] == [[bob.email]]
    assert f"{settings.PUBLIC_URL}/reset/" in mailoutbox[0].body


def test_the_login_page_keeps_where_one_was_going(client: Client, bob: User) -> None:
    answer = client.post(
        "/accounts/login/", {"login": bob.email, "password": password_of(bob), "next": "/jobs/?state=failed"}
    )
    assert answer.headers["Location"] == "/jobs/?state=failed"
    elsewhere = Client().post(
        "/accounts/login/", {"login": bob.email, "password": password_of(bob), "next": "https://evil.example/"}
    )
    assert elsewhere.headers["Location"] == "/"
