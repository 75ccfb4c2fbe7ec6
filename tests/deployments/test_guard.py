"""Power caps of profiles, the budget of the supply, and cards that are too hot or gone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.utils import timezone

from apps.audit.models import AuditEntry
from apps.common.actors import COMMAND_LINE
from apps.common.errors import Invalid
from apps.deployments import guard, power
from apps.deployments.guard import HOT_SECONDS, LOST_SECONDS, danger
from apps.deployments.models import Deployment, GpuReservation, PowerCap, Replica, Status
from apps.deployments.plan import plan
from apps.deployments.policies.models import Pin
from apps.deployments.power import Change, changes, over_budget
from apps.hardware.client import HardwareClient
from apps.hardware.protocol import Refused
from apps.hardware.server import HardwareServer
from apps.hardware.simulated import SimulatedDriver, SimulatedRig
from apps.installs.models import EngineInstall
from apps.installs.selectors import install_for
from apps.jobs.models import Job
from apps.profiles.services import profile_update
from apps.rigs.services import inventory_sync
from apps.telemetry.frames import FrameBuilder, parse
from tests.factories.profiles import simulated_profile

pytestmark = pytest.mark.django_db


@pytest.fixture
def cards(settings: Any, tmp_path: Path) -> Iterator[HardwareServer]:
    """A simulated rig behind the sampler's socket, as the worker reaches it."""
    settings.SAMPLER_SOCKET = tmp_path / "s.sock"
    with HardwareServer(SimulatedDriver(SimulatedRig()), settings.SAMPLER_SOCKET) as server:
        yield server


@pytest.fixture
def frames(cards: HardwareServer, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the pages and the guard see is what the cards report now, as often as it is asked for."""

    def now() -> Any:
        reading = cards._driver.read()
        return parse({**FrameBuilder().build(reading), "at": time.time()})

    monkeypatch.setattr(power, "latest", lambda _: now())
    monkeypatch.setattr(guard, "recent", lambda _, count: [now()] * count)
    return now


@pytest.fixture
def quad(rig: Any, cards: HardwareServer) -> Any:
    """The rig whose cards are those of the simulation."""
    rig.gpus.all().delete()
    inventory_sync(rig, cards.inventory())
    return rig


def serve(rig: Any, slug: str, indexes: tuple[int, ...], watts: int | None) -> Deployment:
    profile = simulated_profile(slug, tp=len(indexes))
    if watts is not None:
        profile_update(profile, actor=COMMAND_LINE, power_limit_watts=watts)
    version = profile.current
    deployment = Deployment.objects.create(rig=rig, version=version, served_name=slug, status=Status.READY)
    replica = Replica.objects.create(
        deployment=deployment, index=0, launch_id=slug, host="127.0.0.1", port=28100 + len(slug), base_url="http://x"
    )
    for gpu in rig.gpus.filter(index__in=indexes, present=True):
        GpuReservation.objects.create(rig=rig, gpu=gpu, slot=slug, replica=replica)
    return deployment


def limits(cards: HardwareServer) -> list[float | None]:
    cards._last = None
    return [g.power_limit_watts for g in cards.read().gpus]


def end(deployment: Deployment) -> None:
    Deployment.objects.filter(pk=deployment.pk).update(status=Status.STOPPED)
    GpuReservation.objects.filter(replica__deployment=deployment).update(released_at="2026-01-01T00:00:00Z")


# -- pure --


def test_what_is_done_follows_from_what_is_wanted_and_what_the_card_reports() -> None:
    assert changes({1: 280.0}, {1: 350.0}, {}) == [Change(1, 280.0)]
    assert changes({1: 280.0}, {1: 280.4}, {1: (280.0, 350.0, "")}) == []  # in force
    assert changes({1: 250.0}, {1: 280.0}, {1: (280.0, 350.0, "")}) == [Change(1, 250.0)]
    assert changes({1: 280.0}, {1: 350.0}, {1: (280.0, 350.0, "")}) == [Change(1, 280.0)]  # the machine was restarted
    assert changes({1: 280.0}, {1: 350.0}, {1: (280.0, 350.0, "no")}) == []  # refused: not asked again
    assert changes({1: 250.0}, {1: 350.0}, {1: (280.0, 350.0, "no")}) == [Change(1, 250.0)]
    assert changes({}, {1: 280.0}, {1: (280.0, 350.0, "")}) == [Change(1, 350.0, restore=True)]
    assert changes({}, {1: 350.0}, {1: (280.0, 350.0, "no")}) == [Change(1, 0.0, restore=True)]  # nothing to put back
    assert changes({1: 280.0}, {1: None}, {}) == []  # a card that does not tell is left alone
    assert changes({}, {1: None}, {1: (280.0, 350.0, "")}) == []


def test_a_card_is_in_danger_only_when_it_stays_so(quad: Any) -> None:
    card = quad.gpus.get(index=2, present=True)
    hot, cool, silent = ({"temperature_celsius": t} for t in (96.0, 70.0, None))
    lost = {"lost": 1}
    assert danger(card, [cool, *[hot] * HOT_SECONDS]).sentence.startswith(
        "GPU 2 has been at 96 °C, over its critical 95"
    )  # type: ignore[union-attr]
    assert danger(card, [*[hot] * (HOT_SECONDS - 1), cool]) is None
    assert danger(card, [hot] * (HOT_SECONDS - 1)) is None
    assert danger(card, [*[hot] * (HOT_SECONDS - 1), silent]) is None
    seen = danger(card, [cool, *[lost] * LOST_SECONDS])
    assert seen is not None
    assert "fell off the bus" in seen.sentence
    assert danger(card, [lost, lost, cool]) is None
    card.temperature_slowdown_celsius = None
    assert danger(card, [{"temperature_celsius": 120.0}] * HOT_SECONDS) is None  # nobody knows its limit


def test_the_budget_counts_all_cards_and_the_rest_of_the_machine() -> None:
    assert over_budget(1600, [280.0] * 4) == ""
    told = over_budget(1600, [350.0] * 4)
    assert "1400 W together" in told
    assert "85% of the 1600 W supply" in told
    assert "cap each of the 4 cards at 280 W" in told
    assert over_budget(1600, [None, None]) == ""


# -- on simulated cards --


def test_a_cap_is_in_force_while_the_profile_runs_and_put_back_after(
    quad: Any, cards: HardwareServer, frames: Any
) -> None:
    first = serve(quad, "capped", (0, 1), 260)
    power.keep_caps()
    assert limits(cards) == [260.0, 260.0, 350.0, 350.0]
    power.keep_caps()
    assert AuditEntry.objects.filter(action="power_cap.set").count() == 2  # once per card, not per tick
    cards._driver.set_power_limit(cards.inventory().gpus[0].uuid, 350.0)  # somebody, or a reboot
    power.keep_caps()
    assert limits(cards)[0] == 260.0
    second = serve(quad, "lower", (1,), 200)  # beside it on one card: the lower cap holds
    power.keep_caps()
    assert limits(cards) == [260.0, 200.0, 350.0, 350.0]
    end(second)
    power.keep_caps()
    assert limits(cards)[1] == 260.0
    end(first)
    power.keep_caps()
    assert limits(cards) == [350.0] * 4
    assert not PowerCap.objects.exists()
    assert AuditEntry.objects.filter(action="power_cap.restore").count() == 2


def test_a_refusal_is_kept_told_by_the_plan_and_not_asked_for_again(
    quad: Any, cards: HardwareServer, frames: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def refuse(self: Any, uuid: str, watts: float) -> Refused:
        asked.append(watts)
        return Refused("The driver lets only root set power limits.")

    monkeypatch.setattr(SimulatedDriver, "set_power_limit", refuse)
    deployment = serve(quad, "capped", (0,), 260)
    power.keep_caps()
    power.keep_caps()
    assert asked == [260.0]
    assert any("only root set power limits" in w for w in plan(deployment.version, quad).warnings)
    end(deployment)
    power.keep_caps()
    assert asked == [260.0]
    assert not PowerCap.objects.exists()


def test_the_sampler_refuses_what_is_no_limit_and_cards_that_are_not_there(
    cards: HardwareServer, settings: Any
) -> None:
    client = HardwareClient(settings.SAMPLER_SOCKET)
    uuid = cards.inventory().gpus[0].uuid
    assert client.set_power_limit(uuid, 300.0) is None
    assert isinstance(client.set_power_limit(uuid, 20.0), Refused)
    assert isinstance(client.set_power_limit("GPU-none", 300.0), Refused)
    client.fault("lost", 0)
    assert "off the bus" in str(client.set_power_limit(uuid, 300.0))
    client.close()


def test_what_uses_a_card_that_is_gone_is_stopped_with_the_reason_and_the_rest_serves_on(
    quad: Any, cards: HardwareServer, frames: Any
) -> None:
    lost = serve(quad, "on-the-lost-pair", (2, 3), None)
    serve(quad, "beside-it", (0, 1), None)
    guard.guard()
    assert not Job.objects.exists()
    cards._driver.rig.fault("lost", 3)  # type: ignore[attr-defined]
    guard.guard()
    guard.guard()
    job = Job.objects.get()
    assert (job.kind, job.params, job.user_name) == ("stop", {"deployment_id": lost.pk}, "panel")
    assert job.reason.startswith("GPU 3 fell off the bus")


def test_a_pin_does_not_keep_an_engine_on_a_card_that_is_gone(
    quad: Any, cards: HardwareServer, frames: Any, alice: Any
) -> None:
    pinned = serve(quad, "pinned", (2, 3), None)
    until = timezone.now() + timedelta(hours=2)
    Pin.objects.create(rig=quad, profile=pinned.version.profile, until=until, user_pk=alice.pk, user_name="alice")
    cards._driver.rig.fault("lost", 3)  # type: ignore[attr-defined]
    guard.guard()
    assert Job.objects.get().params == {"deployment_id": pinned.pk}
    assert AuditEntry.objects.filter(action="pin.override").count() == 1


# -- the profile --


def test_a_cap_and_an_engine_version_belong_to_the_version_and_are_checked(quad: Any) -> None:
    profile = simulated_profile("capped", tp=2)
    changed = profile_update(profile, actor=COMMAND_LINE, power_limit_watts=280, engine_version="0.32.0")
    assert (changed.current.number, changed.current.power_limit_watts) == (2, 280)
    for bad in (5, 5000, True, "280"):
        with pytest.raises(Invalid):
            profile_update(profile, actor=COMMAND_LINE, power_limit_watts=bad)


def test_the_plan_warns_of_the_supply_only_where_a_cap_was_meant_to_help(quad: Any) -> None:
    profile = simulated_profile("capped", tp=4)
    assert not any("supply" in w for w in plan(profile.current, quad).warnings)
    profile_update(profile, actor=COMMAND_LINE, power_limit_watts=330)
    assert any("1600 W supply; cap each of the 4 cards at 280 W" in w for w in plan(profile.current, quad).warnings)
    profile_update(profile, actor=COMMAND_LINE, power_limit_watts=280)
    assert not any("supply" in w for w in plan(profile.current, quad).warnings)


def test_the_verified_engine_version_is_taken_and_another_is_warned_of(quad: Any) -> None:
    for version in ("0.31.0", "0.33.0"):
        EngineInstall.objects.create(
            rig_name=quad.slug, engine="vllm", name=f"vllm-{version}", version=version, command=["/x/vllm", "serve"]
        )
    assert install_for(quad.slug, "vllm").version == "0.33.0"  # type: ignore[union-attr]
    assert install_for(quad.slug, "vllm", "0.31.0").version == "0.31.0"  # type: ignore[union-attr]
    quad.hardware_source = "nvml"
    profile = simulated_profile("pinned", tp=1)
    profile_update(profile, actor=COMMAND_LINE, engine="vllm", options={})
    profile_update(profile, actor=COMMAND_LINE, engine_version="0.32.0")
    warned = [w for w in plan(profile.current, quad).warnings if "Verified with" in w]
    assert warned == ["Verified with vLLM 0.32.0, which is not installed on bench-01; 0.33.0 would start it."]
    profile_update(profile, actor=COMMAND_LINE, engine_version="0.31.0")
    assert not [w for w in plan(profile.current, quad).warnings if "Verified with" in w]
