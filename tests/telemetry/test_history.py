"""Stored means: rolled up, pruned, and read as lines."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from apps.common.errors import Invalid
from apps.rigs.models import Rig
from apps.telemetry.models import Sample
from apps.telemetry.selectors import history
from apps.telemetry.services import COARSE_SECONDS, FINE_SECONDS, on_hourly, prune, roll_up, samples_store

pytestmark = pytest.mark.django_db
UUID = "GPU-bench-01-0"


def fine(rig: Rig, first: datetime, watts: list[float | None], uuid: str = UUID) -> None:
    rows = [
        {
            "gpu_uuid": uuid,
            "at": first + timedelta(seconds=10 * i),
            "seconds": FINE_SECONDS,
            "power_watts": w,
            "energy_joules": 10.0,
        }
        for i, w in enumerate(watts)
    ]
    samples_store(rig.pk, rows)


def on_the_hour(hours_ago: int) -> datetime:
    return datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - timedelta(hours=hours_ago)


def test_history_is_one_grid_for_all_cards_with_gaps_as_none(rig: Rig) -> None:
    start = on_the_hour(2)
    fine(rig, start, [100.0, 110.0, None, 130.0])
    found = history(rig, "power", start=start, end=start + timedelta(seconds=50), points=100)
    assert found.step_seconds == 10
    assert len(found.times) == 5
    assert found.series[0].values == (100.0, 110.0, None, 130.0, None)
    assert found.series[3].values == (None,) * 5
    assert [s.gpu for s in found.series] == [0, 1, 2, 3]


def test_fewer_points_are_means_of_more_time(rig: Rig) -> None:
    start = on_the_hour(2)
    fine(rig, start, [100.0, 200.0, 300.0, 500.0])
    found = history(rig, "power", start=start, end=start + timedelta(seconds=40), points=2, gpu=0)
    assert found.step_seconds == 20
    assert found.series[0].values == (150.0, 400.0)


def test_energy_is_summed_not_averaged(rig: Rig) -> None:
    start = on_the_hour(2)
    fine(rig, start, [1.0] * 4)
    found = history(rig, "energy", start=start, end=start + timedelta(seconds=40), points=2, gpu=0)
    assert found.series[0].values == (20.0, 20.0)


def test_rolling_up_twice_makes_each_five_minutes_once(rig: Rig) -> None:
    start = on_the_hour(3)
    fine(rig, start, [100.0] * 30 + [200.0] * 30)
    assert roll_up(rig) == 2
    assert roll_up(rig) == 0
    rows = Sample.objects.filter(seconds=COARSE_SECONDS).order_by("at")
    assert [r.power_watts for r in rows] == [100.0, 200.0]
    assert [r.energy_joules for r in rows] == [300.0, 300.0]


def test_rolling_up_passes_over_hours_in_which_the_rig_was_off(rig: Rig) -> None:
    fine(rig, on_the_hour(30), [100.0] * 30)
    fine(rig, on_the_hour(3), [200.0] * 30)
    assert roll_up(rig) == 2


def test_a_long_range_joins_rolled_up_means_and_the_newest_fine_ones(rig: Rig) -> None:
    old, new = on_the_hour(20), datetime.now(UTC) - timedelta(minutes=4)
    fine(rig, old, [100.0] * 30)
    roll_up(rig)
    fine(rig, new, [300.0] * 6)
    found = history(rig, "power", start=old, end=datetime.now(UTC), points=2000, gpu=0)
    assert found.step_seconds == COARSE_SECONDS
    known = [v for v in found.series[0].values if v is not None]
    assert known[0] == 100.0
    assert known[-1] == 300.0


def test_pruning_keeps_fine_means_two_days_and_coarse_ones_ninety(rig: Rig) -> None:
    now = datetime.now(UTC)
    fine(rig, now - timedelta(days=3), [1.0])
    fine(rig, now - timedelta(days=1), [1.0])
    for days in (100, 80):
        samples_store(rig.pk, [{"gpu_uuid": UUID, "at": now - timedelta(days=days), "seconds": COARSE_SECONDS}])
    assert prune(now) == 2
    assert Sample.objects.count() == 2


def test_the_clock_rolls_up_and_prunes_this_rig(rig: Rig) -> None:
    fine(rig, on_the_hour(3), [100.0] * 30)
    on_hourly(None, rig_name=rig.slug)
    on_hourly(None, rig_name="another")
    assert Sample.objects.filter(seconds=COARSE_SECONDS).count() == 1


@pytest.mark.parametrize(
    ("change", "field"),
    [({"metric": "mood"}, "metric"), ({"gpu": 9}, "gpu"), ({"points": 1}, "points"), ({"end": -1}, "end")],
)
def test_a_question_that_makes_no_sense_is_answered_with_its_field(rig: Rig, change: dict, field: str) -> None:
    start = on_the_hour(2)
    asked = {"metric": "power", "gpu": None, "points": 10} | change
    end = start - timedelta(hours=1) if change.get("end") else start + timedelta(hours=1)
    asked.pop("end", None)
    metric = asked.pop("metric")
    with pytest.raises(Invalid) as caught:
        history(rig, metric, start=start, end=end, **asked)
    assert field in caught.value.fields
