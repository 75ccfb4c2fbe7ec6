"""Pins, requests and residency: who may switch when, and the sentence where they may not."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from django.core.management import call_command
from django.test import Client
from django.utils import timezone

from apps.audit.models import AuditEntry
from apps.common.actors import COMMAND_LINE, actor_of
from apps.common.errors import Conflict, Invalid, NotAllowed
from apps.common.roles import Role
from apps.dashboard.live import draw
from apps.deployments.draining import cut_asked_by
from apps.deployments.models import Deployment, GpuReservation, Replica, Status
from apps.deployments.policies import services
from apps.deployments.policies.decide import Asker, InTheWay, PinFact, clock, may_switch
from apps.deployments.policies.models import Pin, SwitchRequest
from apps.deployments.policies.selectors import pins_in_force
from apps.deployments.services import cut_request, stop_request, switch_request
from apps.deployments.status import deployment_transition
from apps.jobs.models import Job
from apps.profiles.models import Profile
from tests.deployments.conftest import PLANNED, Begun
from tests.factories.profiles import simulated_profile

BERLIN = ZoneInfo("Europe/Berlin")
NOW = datetime(2026, 11, 26, 12, 0, tzinfo=UTC)
SLEEPS = InTheWay(7, "Coder", None, asleep=True)
PIN = PinFact(1, 7, "Coder", 50, "alice", NOW + timedelta(hours=5), "exam")


def decided(**changes: Any) -> Any:
    given: dict[str, Any] = {
        "asker": Asker.OPERATOR,
        "asker_pk": 51,
        "in_the_way": [InTheWay(7, "Coder", NOW - timedelta(seconds=40))],
        "target_profile_id": 8,
        "pins": [],
        "minimum_residency_seconds": 0,
        "now": NOW,
        "zone": BERLIN,
    }
    return may_switch(**{**given, **changes})


# -- the pure decision ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "allowed", "words"),
    [
        ({}, True, ""),
        ({"pins": [PIN]}, False, "Not switched: Coder is pinned by alice until 18:00 (exam)."),
        ({"pins": [PIN], "asker_pk": 50}, True, ""),
        ({"pins": [PIN], "override": True}, True, ""),
        ({"pins": [PIN], "override": True, "asker": Asker.MEMBER}, False, "pinned by alice"),
        ({"pins": [PIN], "asker": Asker.AUTOMATIC, "asker_pk": None}, False, "pinned by alice"),
        ({"pins": [PIN], "asker": Asker.CLOCK, "asker_pk": None}, False, "pinned by alice"),
        ({"pins": [PIN], "target_profile_id": 7}, True, ""),
        ({"pins": [PIN], "target_profile_id": None}, False, "Not stopped: Coder is pinned"),
        ({"pins": [PIN], "in_the_way": [InTheWay(9, "Other", NOW)]}, True, ""),
        ({"pins": [PIN], "now": NOW + timedelta(hours=6)}, True, ""),
        (
            {"pins": [PinFact(2, 7, "Coder", None, "command line", NOW + timedelta(1), "")], "asker_pk": None},
            False,
            "by command",
        ),
        ({"minimum_residency_seconds": 60}, True, ""),
        ({"minimum_residency_seconds": 60, "asker": Asker.MEMBER}, False, "has served for 40 s only"),
        ({"minimum_residency_seconds": 60, "asker": Asker.AUTOMATIC}, False, "(until 13:00)"),
        ({"minimum_residency_seconds": 30, "asker": Asker.MEMBER}, True, ""),
        ({"minimum_residency_seconds": 60, "asker": Asker.MEMBER, "target_profile_id": 7}, True, ""),
        (
            {"minimum_residency_seconds": 60, "asker": Asker.MEMBER, "in_the_way": [InTheWay(7, "Coder", None)]},
            True,
            "",
        ),
        # The clock was set back by two hours meanwhile: nobody can tell for how long it has served.
        (
            {
                "minimum_residency_seconds": 60,
                "asker": Asker.MEMBER,
                "in_the_way": [InTheWay(7, "Coder", NOW + timedelta(hours=2))],
            },
            True,
            "",
        ),
        ({"asker": Asker.RESTART}, False, "Not restarted: Coder runs in its place."),
        ({"asker": Asker.RESTART, "override": True, "pins": [PIN]}, False, "Coder runs in its place."),
        ({"asker": Asker.RESTART, "in_the_way": [SLEEPS]}, True, ""),
        ({"asker": Asker.RESTART, "in_the_way": [SLEEPS], "pins": [PIN]}, False, "Not restarted: Coder is pinned by"),
        (
            {"asker": Asker.RESTART, "in_the_way": [SLEEPS, InTheWay(9, "Other", None)]},
            False,
            "Other runs in its place.",
        ),
    ],
)
def test_who_may_switch(changes: dict[str, Any], allowed: bool, words: str) -> None:
    verdict = decided(**changes)
    assert verdict.allowed is allowed
    assert words in verdict.sentence


def test_only_an_operator_is_told_that_a_pin_may_be_passed_over() -> None:
    assert decided(pins=[PIN]).overridable
    assert not decided(pins=[PIN], asker=Asker.MEMBER).overridable
    assert decided(pins=[PIN], override=True).overridden == (PIN,)
    assert decided(override=True).overridden == ()


def test_times_are_told_in_the_rigs_zone_through_summer_time() -> None:
    summer = datetime(2026, 7, 1, 12, tzinfo=UTC)
    assert clock(summer + timedelta(hours=1), summer, BERLIN) == "15:00"
    assert clock(NOW + timedelta(hours=1), NOW, BERLIN) == "14:00"
    assert clock(NOW + timedelta(days=1), NOW, BERLIN) == "Fri 13:00"
    assert clock(NOW + timedelta(days=20), NOW, BERLIN) == "2026-12-16 13:00"


# -- in the panel ---------------------------------------------------------------------------------

pytestmark = pytest.mark.django_db


def serving(rig: Any, slug: str = "coder", by: Any = None, seconds_ago: float = 3600) -> Profile:
    """A deployment on all four cards that has been ready for so long."""
    profile = simulated_profile(slug)
    job = Job.objects.create(
        kind="switch", title="x", rig_name=rig.slug, queue="q", user_name="x", user_id=by.pk if by else None,
        state="succeeded",
    )  # fmt: skip
    deployment = Deployment.objects.create(
        rig=rig,
        version=profile.current,
        served_name=slug,
        status="ready",
        job_id=job.pk,
        ready_at=timezone.now() - timedelta(seconds=seconds_ago),
    )
    replica = Replica.objects.create(
        deployment=deployment,
        index=0,
        launch_id=slug,
        host="127.0.0.1",
        port=28100,
        base_url="http://x",
        engine_key="k",
    )
    for gpu in rig.gpus.all():
        GpuReservation.objects.create(rig=rig, gpu=gpu, replica=replica)
    return profile


def pin(rig: Any, profile: Profile, user: Any, hours: float = 2, reason: str = "exam") -> Pin:
    return services.pin_create(
        profile=profile,
        actor=actor_of(user),
        role=Role(user.role),
        until=timezone.now() + timedelta(hours=hours),
        reason=reason,
        rig=rig,
    )


def test_a_pin_keeps_others_from_replacing_and_is_passed_over_only_on_record(rig: Any, alice: Any, olivia: Any) -> None:
    coder, other = serving(rig), simulated_profile("other", members_may_switch=True)
    pin(rig, coder, alice)
    with pytest.raises(Conflict, match=r"Not switched: Coder is pinned by alice until .* \(exam\)") as caught:
        switch_request(profile=other, actor=actor_of(olivia), rig=rig)
    assert caught.value.code == "pinned"
    with pytest.raises(Conflict, match="pinned by alice"):
        stop_request(deployment=Deployment.objects.get(), actor=actor_of(olivia))
    assert not Job.objects.filter(state="queued").exists()
    switch_request(profile=other, actor=actor_of(olivia), rig=rig, override=True)
    entry = AuditEntry.objects.get(action="pin.override")
    assert (entry.actor_name, entry.object_name, entry.detail["pinned_by"]) == ("olivia", "Coder", "alice")


def test_a_pin_holds_against_one_that_sleeps_on_the_same_cards(rig: Any, alice: Any, olivia: Any) -> None:
    """It is woken where it sleeps, though two cards are free and the planner would lay it there."""
    coder, other = serving(rig), simulated_profile("other", tp=2)
    cards = list(rig.gpus.order_by("index")[:2])
    GpuReservation.objects.exclude(gpu__in=cards).delete()
    asleep = Deployment.objects.create(rig=rig, version=other.current, served_name="other", status="sleeping")
    replica = Replica.objects.create(
        deployment=asleep, index=0, launch_id="other", host="127.0.0.1", port=28101, base_url="http://y"
    )
    for gpu in cards:
        GpuReservation.objects.create(rig=rig, gpu=gpu, slot=f"sleep-{asleep.pk}", replica=replica)
    pin(rig, coder, alice)
    with pytest.raises(Conflict, match="Not switched: Coder is pinned by alice"):
        switch_request(profile=other, actor=actor_of(olivia), rig=rig)


def test_who_had_one_drain_cut_did_not_mean_the_next(rig: Any, olivia: Any) -> None:
    serving(rig)
    deployment = Deployment.objects.get()
    deployment_transition(deployment, Status.DRAINING)
    cut_request(deployment=deployment, actor=actor_of(olivia))
    assert cut_asked_by([deployment.pk]) == actor_of(olivia).name
    deployment.refresh_from_db()
    deployment_transition(deployment, Status.READY, "the switch was given up")
    deployment_transition(deployment, Status.DRAINING)
    assert cut_asked_by([deployment.pk]) == ""


def test_the_owner_of_a_pin_switches_without_being_asked(rig: Any, alice: Any) -> None:
    coder, other = serving(rig), simulated_profile("other")
    pin(rig, coder, alice)
    assert switch_request(profile=other, actor=actor_of(alice), rig=rig).pk
    assert not AuditEntry.objects.filter(action="pin.override").exists()


def test_a_pin_that_is_over_or_released_binds_nobody(rig: Any, alice: Any, olivia: Any) -> None:
    coder, other = serving(rig), simulated_profile("other")
    old = pin(rig, coder, alice)
    Pin.objects.filter(pk=old.pk).update(until=timezone.now() - timedelta(seconds=1))
    assert not pins_in_force(rig)
    assert switch_request(profile=other, actor=actor_of(olivia), rig=rig).pk
    again = pin(rig, coder, olivia)  # the old one's place is free
    services.pin_release(again, actor=actor_of(alice), role=Role.OWNER)
    assert not pins_in_force(rig)


def test_members_pin_their_own_for_a_day_at_most(rig: Any, bob: Any, alice: Any) -> None:
    mine, others = serving(rig, by=bob), simulated_profile("others")
    with pytest.raises(NotAllowed, match="what they have started"):
        pin(rig, others, bob)
    with pytest.raises(Invalid, match="24 hours"):
        pin(rig, mine, bob, hours=25)
    with pytest.raises(Invalid, match="future"):
        pin(rig, mine, bob, hours=-1)
    made = pin(rig, mine, bob)
    with pytest.raises(Conflict, match="already pinned by bob"):
        pin(rig, mine, alice)
    pin(rig, mine, bob, hours=3)
    assert pins_in_force(rig).count() == 1
    assert Pin.objects.get(pk=made.pk).released_at is not None


def test_a_model_stays_for_a_minimum_time_for_all_but_operators(rig: Any, bob: Any, olivia: Any) -> None:
    serving(rig, seconds_ago=10)
    other = simulated_profile("other", members_may_switch=True)
    for asker in (Asker.MEMBER, Asker.AUTOMATIC, Asker.CLOCK):
        with pytest.raises(Conflict, match="each model stays at least 1 min") as caught:
            switch_request(profile=other, actor=actor_of(bob), rig=rig, asker=asker)
        assert caught.value.code == "resident"
    services.rig_policy_set(rig=rig, actor=actor_of(olivia), minimum_residency_seconds=0)
    assert switch_request(profile=other, actor=actor_of(bob), rig=rig, asker=Asker.MEMBER).pk


def test_an_approved_request_is_a_switch_in_both_names_and_answers_all_who_wait(
    rig: Any, bob: Any, olivia: Any, charlie: Any
) -> None:
    profile = simulated_profile("coder")
    first = services.request_create(profile=profile, actor=actor_of(bob), reason="a demo", rig=rig)
    assert services.request_create(profile=profile, actor=actor_of(bob), reason="again", rig=rig).pk == first.pk
    services.request_create(profile=profile, actor=actor_of(charlie), rig=rig)
    job = services.request_approve(first, actor=actor_of(olivia))
    assert (job.user_name, job.reason) == ("olivia", "asked for by bob, charlie: a demo")
    assert {r.state for r in SwitchRequest.objects.all()} == {"approved"}
    assert {r.job_id for r in SwitchRequest.objects.all()} == {job.pk}
    with pytest.raises(Conflict, match="approved by olivia already"):
        services.request_decline(first, actor=actor_of(olivia))


def test_a_request_whose_switch_is_refused_goes_on_waiting(rig: Any, alice: Any, bob: Any, olivia: Any) -> None:
    pin(rig, serving(rig), alice)
    wanted = services.request_create(profile=simulated_profile("other"), actor=actor_of(bob), rig=rig)
    with pytest.raises(Conflict, match="pinned by alice"):
        services.request_approve(wanted, actor=actor_of(olivia))
    wanted.refresh_from_db()
    assert wanted.state == "waiting"


def test_requests_are_declined_withdrawn_and_expire(rig: Any, bob: Any, olivia: Any, charlie: Any) -> None:
    made = [services.request_create(profile=simulated_profile(f"p{n}"), actor=actor_of(bob), rig=rig) for n in range(3)]
    services.request_decline(made[0], actor=actor_of(olivia), answer="after lunch\n")
    with pytest.raises(NotAllowed, match="bob's"):
        services.request_withdraw(made[1], actor=actor_of(charlie))
    services.request_withdraw(made[1], actor=actor_of(bob))
    SwitchRequest.objects.filter(pk=made[2].pk).update(created_at=timezone.now() - timedelta(days=2))
    assert services.requests_expire(rig) == 1
    states = dict(SwitchRequest.objects.values_list("profile__slug", "state"))
    assert states == {"p0": "declined", "p1": "withdrawn", "p2": "expired"}
    assert SwitchRequest.objects.get(profile__slug="p0").answer == "after lunch"


def test_the_page_asks_an_operator_and_refuses_a_member(
    client: Client, rig: Any, alice: Any, olivia: Any, bob: Any
) -> None:
    pin(rig, serving(rig), alice)
    simulated_profile("other", members_may_switch=True)
    client.force_login(bob)
    answer = client.post("/deployments/switch/", {"profile": "other"})
    assert answer.status_code == 409
    assert "pinned by alice" in answer.content.decode()
    client.force_login(olivia)
    page = client.post("/deployments/switch/", {"profile": "other"}).content.decode()
    assert "Going on passes over the pin" in page
    assert not Job.objects.filter(state="queued").exists()
    about = f"pin-{Pin.objects.get().pk}"
    assert f'name="about" value="{about}"' in page
    yes = {"profile": "other", "confirmed": "1", "about": about}
    assert client.post("/deployments/switch/", yes).status_code == 302
    assert Job.objects.filter(state="queued").exists()


def test_a_yes_does_not_pass_over_a_pin_that_was_made_after_the_question(
    client: Client, rig: Any, alice: Any, olivia: Any
) -> None:
    coder = serving(rig)
    pin(rig, coder, alice)
    simulated_profile("other")
    client.force_login(olivia)
    yes = {"profile": "other", "confirmed": "1", "about": f"pin-{Pin.objects.get().pk}"}
    pin(rig, coder, alice, reason="another exam")
    page = client.post("/deployments/switch/", yes).content.decode()
    assert "another exam" in page
    assert not Job.objects.filter(state="queued").exists()
    assert f'name="about" value="pin-{Pin.objects.latest("pk").pk}"' in page
    assert page.count('name="about"') == 1
    deployment = Deployment.objects.get()
    assert "another exam" in client.post(f"/deployments/{deployment.pk}/stop/", yes).content.decode()
    wanted = services.request_create(profile=Profile.objects.get(slug="other"), actor=actor_of(olivia), rig=rig)
    assert "another exam" in client.post(f"/policies/requests/{wanted.pk}/approve/", yes).content.decode()
    assert not Job.objects.filter(state="queued").exists()
    assert not AuditEntry.objects.filter(action="pin.override").exists()


def test_a_yes_about_running_answers_alone_passes_over_no_pin(
    client: Client, rig: Any, alice: Any, olivia: Any
) -> None:
    pin(rig, serving(rig), alice)
    simulated_profile("other")
    client.force_login(olivia)
    page = client.post("/deployments/switch/", {"profile": "other", "confirmed": "1"}).content.decode()
    assert "pinned by alice" in page
    assert not Job.objects.filter(state="queued").exists()


# -- when it begins -------------------------------------------------------------------------------


def test_a_queued_switch_stops_nothing_that_was_pinned_meanwhile(
    rig: Any, alice: Any, olivia: Any, begun: Begun
) -> None:
    coder, other = serving(rig), simulated_profile("other")
    job = switch_request(profile=other, actor=actor_of(olivia), rig=rig)
    pin(rig, coder, alice)
    job = begun(job)
    assert job.state == "failed"
    assert job.summary.startswith("Not switched: Coder is pinned by alice until ")
    assert Deployment.objects.get(version__profile=coder).status == Status.READY


def test_a_queued_switch_asks_minimum_residency_again_for_whom_it_binds(
    rig: Any, bob: Any, olivia: Any, begun: Begun
) -> None:
    serving(rig)
    other = simulated_profile("other", members_may_switch=True)
    job = switch_request(profile=other, actor=actor_of(bob), rig=rig, asker=Asker.MEMBER)
    Deployment.objects.update(ready_at=timezone.now())
    assert "has served for" in begun(job).summary


def test_a_pin_that_was_passed_over_at_the_click_is_passed_over_at_the_start(
    rig: Any, alice: Any, olivia: Any, begun: Begun
) -> None:
    pin(rig, serving(rig), alice)
    job = begun(switch_request(profile=simulated_profile("other"), actor=actor_of(olivia), rig=rig, override=True))
    assert PLANNED in job.summary


def test_an_operators_click_on_what_a_member_queued_counts_as_the_operators(
    rig: Any, bob: Any, olivia: Any, begun: Begun
) -> None:
    serving(rig)
    other = simulated_profile("other", members_may_switch=True)
    job = switch_request(profile=other, actor=actor_of(bob), rig=rig, asker=Asker.MEMBER)
    Deployment.objects.update(ready_at=timezone.now())
    assert switch_request(profile=other, actor=actor_of(olivia), rig=rig).pk == job.pk
    assert PLANNED in begun(job).summary


def test_pins_and_requests_by_page_and_home(client: Client, rig: Any, bob: Any, olivia: Any, charlie: Any) -> None:
    serving(rig, by=bob)
    simulated_profile("other")
    client.force_login(bob)
    assert client.post("/policies/pins/", {"profile": "coder", "hours": "2", "reason": "exam"}).status_code == 302
    assert client.post("/policies/pins/", {"profile": "coder", "hours": ""}).status_code == 422
    assert client.post("/policies/requests/", {"profile": "other", "reason": "a demo"}).status_code == 302
    assert client.post("/policies/rig/", {}).status_code == 403
    page = client.get("/policies/").content.decode()
    assert "exam" in page
    assert "Withdraw" in page
    assert "Approve" not in page
    assert "Request" in draw("home.switch", bob)
    assert "asks for" in draw("home.policies", olivia)
    assert "Approve" in draw("home.policies", olivia)
    assert "asks for" not in draw("home.policies", charlie)
    client.force_login(olivia)
    wanted = SwitchRequest.objects.get()
    asked = client.post(f"/policies/requests/{wanted.pk}/approve/").content.decode()
    assert "pinned by bob" in asked
    yes = {"confirmed": "1", "about": f"pin-{Pin.objects.get().pk}"}
    assert client.post(f"/policies/requests/{wanted.pk}/approve/", yes).status_code == 302
    assert Job.objects.filter(state="queued", user_name="olivia").exists()
    rules = {"minimum_residency_seconds": 5, "idle_action": "nothing", "idle_after_minutes": 30}
    assert client.post("/policies/rig/", {**rules, "time_zone": "Nowhere"}).status_code == 422
    assert client.post("/policies/rig/", {**rules, "time_zone": "Europe/Berlin"}).status_code == 302


def test_pins_and_requests_by_the_api(client: Client, rig: Any, olivia: Any, bob: Any) -> None:
    serving(rig)
    simulated_profile("other")

    def post(path: str, body: dict[str, Any]) -> Any:
        return client.post(f"/api/v1{path}", json.dumps(body), content_type="application/json")

    client.force_login(olivia)
    until = (timezone.now() + timedelta(hours=1)).isoformat()
    made = post("/pins", {"profile": "coder", "until": until, "reason": "exam"})
    assert made.status_code == 201, made.content
    assert post("/pins", {"profile": "coder", "until": "2030-01-01T00:00:00"}).status_code == 422  # no offset
    assert client.get("/api/v1/pins").json()["items"][0]["pinned_by"] == "olivia"
    client.force_login(bob)
    wanted = post("/requests", {"profile": "other"}).json()
    assert wanted["state"] == "waiting"
    assert client.delete(f"/api/v1/pins/{made.json()['id']}").status_code == 403
    assert post("/switch", {"profile": "other", "override": True}).status_code == 403
    client.force_login(olivia)
    job = post(f"/requests/{wanted['id']}/approve", {})
    assert job.status_code == 202, job.content
    assert client.delete(f"/api/v1/pins/{made.json()['id']}").status_code == 204
    assert client.get("/api/v1/pins").json()["count"] == 0
    put = client.put("/api/v1/rigs/bench-01/policy", {"time_zone": "Europe/Berlin"}, content_type="application/json")
    assert (put.json()["time_zone"], put.json()["minimum_residency_seconds"]) == ("Europe/Berlin", 60)


def test_the_command_line_is_bound_and_may_pass_over(rig: Any, alice: Any, settings: Any, capsys: Any) -> None:
    settings.RIG_NAME = rig.slug
    pin(rig, serving(rig), alice)
    simulated_profile("other")
    with pytest.raises(SystemExit):
        call_command("switch", "other")
    assert "pinned by alice" in capsys.readouterr().err
    with pytest.raises(SystemExit) as done:
        call_command("switch", "other", "--override")
    assert done.value.code in (0, None)
    assert COMMAND_LINE.user_pk is None


# -- loading by request ---------------------------------------------------------------------------


def test_operators_say_on_the_profiles_page_and_over_the_api_whose_requests_may_load_it(
    client: Client, olivia: Any, bob: Any, rig: Any
) -> None:
    profile = simulated_profile("coder")
    client.force_login(olivia)
    page = client.get("/profiles/coder/").content.decode()
    assert "nobody&#x27;s: it is loaded by a switch" in page or "nobody's: it is loaded by a switch" in page
    assert client.post("/profiles/coder/loading/", {"by": "members"}, follow=True).status_code == 200
    assert "everybody's who may use the gateway" in client.get("/profiles/coder/").content.decode()
    assert client.get("/api/v1/profiles/coder/loading").json() == {"by": "members", "least_role": "member"}
    assert client.post("/profiles/coder/loading/", {"by": "everybody"}).status_code == 422
    entry = AuditEntry.objects.get(action="profile.loading")
    assert entry.detail == {"by": ["marked", "members"]}
    assert profile.versions.count() == 1, "no new version"
    client.force_login(bob)
    page = client.get("/profiles/coder/").content.decode()
    assert "everybody's who may use the gateway" in page
    assert "/profiles/coder/loading/" not in page
    assert client.post("/profiles/coder/loading/", {"by": "nobody"}).status_code == 403
