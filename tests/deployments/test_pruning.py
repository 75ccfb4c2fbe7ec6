"""Folders of launches that ended long ago go; what runs, what is new and what nobody knows stays."""

from __future__ import annotations

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
from apps.jobs.signals import hourly
from tests.deployments.test_switch import run, serving
from tests.factories.profiles import simulated_profile


def folder_of(name: str) -> Any:
    return settings.ENGINES_DIR / Replica.objects.get(deployment__served_name=name).launch_id


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


def test_another_rigs_launches_are_its_own_matter(three: None) -> None:
    ended_days_ago(15)
    assert prune_launches("elsewhere") == 0
