"""Speeds are kept as a few sums per number of requests at once, and the plan shows them."""

from __future__ import annotations

from typing import Any

import pytest
from django.test import Client

from apps.deployments.history import bucket, looked, measured
from apps.deployments.models import Deployment, Throughput
from apps.profiles.advice import PAIRS
from apps.profiles.selectors import profile_get
from apps.profiles.services import load_shipped


@pytest.fixture
def pairs(rig: Any) -> Deployment:
    load_shipped()
    version = profile_get("qwen25-coder-32b-2xtp2").current
    return Deployment.objects.create(rig=rig, version=version, served_name="x", status="ready", simulated=True)


def test_requests_at_once_fall_into_four_groups() -> None:
    assert [bucket(n) for n in (None, 0, 1, 1.0, 2, 4, 5, 16, 17, 400)] == [None, None, 1, 1, 2, 2, 5, 5, 17, 17]


def test_a_look_counts_only_under_one_load(pairs: Deployment) -> None:
    looked(pairs.pk, 50.0, 1, 1)
    looked(pairs.pk, 70.0, 1, 1)
    looked(pairs.pk, 400.0, 1, 8)  # the load changed while it was looked at
    looked(pairs.pk, None, 1, 1)
    looked(pairs.pk, 0.0, 1, 1)
    looked(pairs.pk, 900.0, 20, 31)
    rows = {
        t.concurrency: (t.looks, t.tokens_per_second_sum, t.tokens_per_second_max) for t in Throughput.objects.all()
    }
    assert rows == {1: (2, 120.0, 70.0), 17: (1, 900.0, 900.0)}


def test_the_plan_shows_what_this_rig_measured(client: Client, pairs: Deployment, rig: Any, charlie: Any) -> None:
    for _ in range(3):
        looked(pairs.pk, 60.0, 1, 1)
    (row,) = measured(pairs.version.model, rig)
    assert (row.layout, row.concurrency, row.tokens_per_second, row.looks) == (PAIRS, 1, 60.0, 3)
    client.force_login(charlie)
    told = client.get("/api/v1/profiles/qwen25-coder-32b-tp4/plan").json()["advice"]
    assert [o["layout"] for o in told["options"]] == ["1 × TP4", "2 × TP2", "4 × TP1"]
    assert told["options"][1]["measured"] == [{"concurrency": 1, "tokens_per_second": 60.0, "looks": 3}]
    assert told["many_users"]["basis"] == "published"
    page = client.get("/profiles/qwen25-coder-32b-tp4/").content.decode()
    assert "One fast user or many?" in page
    assert "1 at once: 60 tokens/s (simulated)" in page
    assert "club-3090, docs/MULTI_CARD.md" in page
    rig.hardware_source = "nvml"
    rig.save()
    assert measured(pairs.version.model, rig) == [], "a simulation says nothing about real cards"
