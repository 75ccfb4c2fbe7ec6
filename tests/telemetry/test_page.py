"""The telemetry page and its data."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from django.test import Client

from apps.telemetry.services import samples_store

pytestmark = pytest.mark.django_db


def test_the_page_says_in_numbers_what_the_charts_draw(client: Client, rig: Any, charlie: Any) -> None:
    client.force_login(charlie)
    html = client.get("/telemetry/").content.decode()
    assert html.count("data-metric=") == 6
    assert "GPU 3" in html
    assert "not reported" in html


def test_an_alert_links_to_one_metric_of_one_card(client: Client, rig: Any, charlie: Any) -> None:
    client.force_login(charlie)
    html = client.get("/telemetry/?metric=temperature&gpu=2&range=24h").content.decode()
    assert html.count("data-metric=") == 1
    assert 'data-gpu="2"' in html
    assert 'data-range="24h"' in html


def test_the_charts_get_times_and_values_with_null_for_gaps(client: Client, rig: Any, charlie: Any) -> None:
    start = datetime.now(UTC).replace(second=0, microsecond=0) - timedelta(minutes=5)
    samples_store(rig.pk, [{"gpu_uuid": "GPU-bench-01-1", "at": start, "seconds": 10, "power_watts": 222.0}])
    client.force_login(charlie)
    end = start + timedelta(seconds=20)
    data = client.get(
        "/telemetry/data/", {"metric": "power", "start": start.timestamp(), "end": end.timestamp()}
    ).json()
    assert data["times"] == [start.timestamp(), start.timestamp() + 10]
    assert [s["values"] for s in data["series"]] == [[None, None], [222.0, None], [None, None], [None, None]]


@pytest.mark.parametrize("query", ["metric=mood", "gpu=77"])
def test_a_wrong_question_is_answered_in_json(client: Client, rig: Any, charlie: Any, query: str) -> None:
    client.force_login(charlie)
    response = client.get(f"/telemetry/data/?{query}")
    assert response.status_code == 422
    assert response.json()["error"]["message"]


@pytest.mark.parametrize(
    "query", ["start=never&end=ever", "start=9&end=1", "range=always", "start=1e400&end=2", "gpu=-1"]
)
def test_a_range_that_makes_no_sense_is_the_usual_one(client: Client, rig: Any, charlie: Any, query: str) -> None:
    client.force_login(charlie)
    assert b'data-range="1h"' in client.get(f"/telemetry/?{query}").content
