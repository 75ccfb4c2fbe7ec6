"""What the readers of the environment accept; what they refuse is in tests/processes/test_preflight.py."""

from __future__ import annotations

import pytest
from django.http import HttpRequest, HttpResponse
from django.test import RequestFactory

from apps.common.middleware import TrustedProxyMiddleware
from apps.hardware.detect import choose_driver
from apps.runners import registry
from rigpanel.environment import ConfigError, env_choice, env_database, env_email, env_networks

HARDWARE = ("auto", "nvml", "simulated", "replay:FILE")


@pytest.mark.parametrize("word", [*HARDWARE, " nvml\n", "replay:/srv/a:b.jsonl"])
def test_every_word_for_the_hardware_names_a_driver(monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    monkeypatch.setenv("RIGPANEL_HARDWARE", word)
    assert env_choice("RIGPANEL_HARDWARE", "auto", *HARDWARE) == word.strip()
    assert choose_driver(word, ran_nvml_before=True)


@pytest.mark.parametrize("word", registry.SETTINGS)
def test_every_word_for_the_runner_is_accepted(monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    monkeypatch.setenv("RIGPANEL_RUNNER", word)
    assert env_choice("RIGPANEL_RUNNER", "auto", "auto", "process", "systemd") == word


def test_databases_and_mail_are_told_to_django(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RIGPANEL_DATABASE_URL", "postgresql://rig:p%40ss@store:5433/panel?sslmode=require")
    found = env_database("RIGPANEL_DATABASE_URL")
    assert found["ENGINE"] == "django.db.backends.postgresql"
    assert (found["NAME"], found["USER"], found["PASSWORD"]) == ("panel", "rig", "p@ss")
    assert (found["HOST"], found["PORT"], found["OPTIONS"]) == ("store", 5433, {"sslmode": "require"})
    monkeypatch.setenv("RIGPANEL_EMAIL_URL", "smtp+tls://rig:secret@mail.example:587")
    mail = env_email("RIGPANEL_EMAIL_URL")
    assert (mail["EMAIL_HOST"], mail["EMAIL_PORT"], mail["EMAIL_USE_TLS"]) == ("mail.example", 587, True)
    monkeypatch.setenv("RIGPANEL_DATABASE_URL", "")
    monkeypatch.setenv("RIGPANEL_EMAIL_URL", "")
    assert (env_database("RIGPANEL_DATABASE_URL"), env_email("RIGPANEL_EMAIL_URL")) == ({}, {})


def test_a_name_among_the_trusted_proxies_is_refused_wherever_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("proxy.local", "10.0.0.1, proxy.local", "proxy.local, 10.0.0.1"):
        monkeypatch.setenv("RIGPANEL_TRUSTED_PROXIES", value)
        with pytest.raises(ConfigError, match=r"proxy\.local"):
            env_networks("RIGPANEL_TRUSTED_PROXIES")


@pytest.mark.parametrize(
    ("peer", "seen", "scheme"),
    [
        ("10.0.0.7", "203.0.113.9", "https"),
        ("::ffff:10.0.0.7", "203.0.113.9", "https"),  # what a listener on :: says for the same proxy
        ("192.0.2.1", "192.0.2.1", None),
    ],
)
def test_the_web_believes_forwarded_headers_of_trusted_proxies_alone(
    monkeypatch: pytest.MonkeyPatch, settings: object, peer: str, seen: str, scheme: str | None
) -> None:
    monkeypatch.setenv("RIGPANEL_TRUSTED_PROXIES", " 10.0.0.1/24 , ::1,")
    settings.TRUSTED_PROXIES = env_networks("RIGPANEL_TRUSTED_PROXIES")  # type: ignore[attr-defined]
    got: list[HttpRequest] = []

    def view(request: HttpRequest) -> HttpResponse:
        got.append(request)
        return HttpResponse()

    headers = {"X-Forwarded-For": "203.0.113.9", "X-Forwarded-Proto": "https"}
    TrustedProxyMiddleware(view)(RequestFactory().get("/", headers=headers, REMOTE_ADDR=peer))
    assert got[0].META["REMOTE_ADDR"] == seen
    assert got[0].META.get("HTTP_X_FORWARDED_PROTO") == scheme
