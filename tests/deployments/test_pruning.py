"""Folders of launches that ended long ago go; what runs, what is new and what nobody knows stays."""

from __future__ import annotations

import os
import shutil
import time
from datetime import timedelta
from typing import Any

import pytest
from django.conf import settings
from django.utils import timezone

from apps.common.actors import actor_of
from apps.deployments import launching, pruning
from apps.deployments.models import Deployment, Replica, Status
from apps.deployments.pruning import prune_launches
from apps.deployments.services import switch_request
from apps.jobs.models import JobState
from apps.jobs.signals import hourly
from apps.runners.protocol import ProcessState
from tests.deployments.test_replica_restarts import noticed, replica, serve_twins
from tests.deployments.test_switch import run, serving
from tests.factories.profiles import simulated_profile


def folder_of(name: str) -> Any:
    return settings.ENGINES_DIR / Replica.objects.get(deployment__served_name=name).launch_id


def age(folder: Any, days: float) -> None:
    """As if nothing had been written there for so long."""
    at = time.time() - days * 86400
    for path in (*folder.iterdir(), folder):
        os.utime(path, (at, at))


@pytest.fixture
def three(sim_rig: Any, alice: Any) -> None:
    """Two that have ended, the later one with evidence, and one that serves."""
    run(switch_request(profile=simulated_profile("old"), actor=actor_of(alice)))
    run(switch_request(profile=simulated_profile("broken", fail_phase="weights"), actor=actor_of(alice)))
    run(switch_request(profile=simulated_profile("new"), actor=actor_of(alice)))


def ended_days_ago(days: float) -> None:
    at = timezone.now() - timedelta(days=days)
    Replica.objects.filter(released_at__isnull=False).update(released_at=at)


def test_only_what_ended_long_ago_goes(three: None) -> None:
    Deployment.objects.filter(served_name="old").exclude(pk=Deployment.objects.order_by("pk")[0].pk).delete()
    assert prune_launches(settings.RIG_NAME) == 0
    ended_days_ago(15)
    stranger = settings.ENGINES_DIR / "d999-r0-abcdef"
    stranger.mkdir()
    serving_folder = folder_of("new")
    hourly.send(sender=None, rig_name=settings.RIG_NAME)
    assert not folder_of("old").exists()
    assert not folder_of("broken").exists()
    assert serving_folder.exists()
    assert stranger.exists()
    stranger.rmdir()
    assert serving() == ["new"]
    broken = Deployment.objects.get(served_name="broken")
    assert broken.status == Status.FAILED
    assert broken.evidence
    assert "out of memory" in broken.evidence["log_tail"].lower()


def test_only_so_many_are_kept(three: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "KEEP_NEWEST", 1)
    ended = list(Replica.objects.filter(released_at__isnull=False).order_by("pk"))
    assert prune_launches(settings.RIG_NAME) == len(ended) - 1
    assert (settings.ENGINES_DIR / ended[-1].launch_id).exists()


def test_an_engine_that_lives_on_without_its_row_knowing_keeps_its_folder(three: None) -> None:
    replica = Replica.objects.get(deployment__served_name="new")
    Deployment.objects.filter(served_name="new").update(status=Status.STOPPED)
    ended_days_ago(15)
    Replica.objects.filter(pk=replica.pk).update(released_at=timezone.now() - timedelta(days=15))
    prune_launches(settings.RIG_NAME)
    assert folder_of("new").exists()
    assert launching.observe(replica).pids


def died_and_started_again(alice: Any) -> tuple[Any, Any]:
    """The folder of a replica's first launch and of the one that took its place."""
    serve_twins(alice)
    first = settings.ENGINES_DIR / replica(1).launch_id
    assert run(noticed()).state == JobState.SUCCEEDED
    return first, settings.ENGINES_DIR / replica(1).launch_id


def test_the_whole_log_of_a_replica_that_crashed_stays_readable_for_days(sim_rig: Any, alice: Any) -> None:
    first, second = died_and_started_again(alice)
    assert first != second
    assert "Application startup complete" in (first / "log").read_text()
    assert prune_launches(settings.RIG_NAME) == 0
    age(first, days=15)
    assert prune_launches(settings.RIG_NAME) == 1
    assert not first.exists()
    assert second.exists()
    assert serving() == ["twins"]


def test_a_launch_that_a_replica_left_behind_counts_as_one_that_ended(
    sim_rig: Any, alice: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruning, "KEEP_NEWEST", 1)
    first, second = died_and_started_again(alice)
    assert run(noticed()).state == JobState.SUCCEEDED
    assert prune_launches(settings.RIG_NAME) == 1
    assert not first.exists()
    assert second.exists(), "the newest of those that ended"


def test_one_that_lives_on_or_that_was_never_a_replicas_keeps_its_folder(sim_rig: Any, alice: Any) -> None:
    serve_twins(alice)
    lost = replica(1)
    lives = settings.ENGINES_DIR / lost.launch_id
    handle = launching.handle_of(lost)
    assert handle is not None
    # As after a backup was restored that was made while another launch ran.
    Replica.objects.filter(pk=lost.pk).update(launch_id=f"d{lost.deployment_id}-r1-ffffff", handle=None)
    strays = [settings.ENGINES_DIR / name for name in (f"d{lost.deployment_id}-r7-abcdef", f"d{lost.deployment_id}-x")]
    for folder in strays:
        shutil.copytree(lives, folder)
    for folder in (lives, *strays):
        age(folder, days=15)
    try:
        assert prune_launches(settings.RIG_NAME) == 0
        assert launching.runner().observe(handle).state == ProcessState.RUNNING
        assert all(folder.exists() for folder in (lives, *strays))
    finally:
        launching.runner().stop(handle)
        for folder in strays:
            shutil.rmtree(folder)


def test_what_never_began_goes_too_and_takes_nobodys_place(three: None, monkeypatch: pytest.MonkeyPatch) -> None:
    serves = Replica.objects.get(deployment__served_name="new")
    marks = [f"d{serves.deployment_id}-r0-{n:06x}" for n in range(3)]
    for launch_id in marks:
        launching.runner().withdraw(launch_id)
    assert prune_launches(settings.RIG_NAME) == 0
    monkeypatch.setattr(pruning, "KEEP_NEWEST", 1)
    newest = Replica.objects.filter(released_at__isnull=False).latest("released_at")
    assert prune_launches(settings.RIG_NAME) == Replica.objects.filter(released_at__isnull=False).count() - 1
    assert (settings.ENGINES_DIR / newest.launch_id).exists()
    assert all((settings.ENGINES_DIR / launch_id).exists() for launch_id in marks), "somebody may wake up yet"
    for launch_id in marks:
        age(settings.ENGINES_DIR / launch_id, days=15)
    assert prune_launches(settings.RIG_NAME) == len(marks)
    assert not any((settings.ENGINES_DIR / launch_id).exists() for launch_id in marks)


def test_another_rigs_launches_are_its_own_matter(three: None) -> None:
    ended_days_ago(15)
    assert prune_launches("elsewhere") == 0
