"""The sampler against simulated cards, a real Valkey and the test database."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from django.db import connection

from apps.common.store import last_heartbeat
from apps.hardware.client import HardwareClient
from apps.rigs.models import Gpu, Link, Rig
from apps.telemetry import selectors
from apps.telemetry.frames import looked_at
from apps.telemetry.models import Sample
from apps.telemetry.sampler import Sampler

pytestmark = pytest.mark.django_db(transaction=True)
DEADLINE_SECONDS = 30


def wait_for(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not (answer := condition()):
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.05)
    return answer


@pytest.fixture
def socket_path() -> Iterator[Path]:
    folder = tempfile.mkdtemp(prefix="rp-s-", dir="/tmp")
    yield Path(folder) / "sampler.sock"
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def start(socket_path: Path, live_store: Any) -> Iterator[Callable[..., Sampler]]:
    """Start samplers in threads; they end with the test."""
    running: list[tuple[Sampler, threading.Thread]] = []

    def begin(hardware: str = "simulated", rig_name: str = "bench-01") -> Sampler:
        sampler = Sampler(rig_name, hardware, socket_path)

        def run() -> None:
            try:
                sampler.run()
            finally:
                connection.close()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        running.append((sampler, thread))
        return sampler

    yield begin
    for sampler, thread in running:
        sampler.end()
        thread.join(timeout=DEADLINE_SECONDS)
        assert not thread.is_alive()


def test_it_makes_the_rig_its_cards_and_bridges_and_says_that_it_lives(start) -> None:
    start()
    wait_for(lambda: Link.objects.count() == 2)
    rig = Rig.objects.get(slug="bench-01")
    assert rig.hardware_source == "simulated"
    assert not rig.ran_nvml
    assert [g.index for g in rig.gpus.order_by("index")] == [0, 1, 2, 3]
    wait_for(lambda: last_heartbeat("sampler", "bench-01"))


def test_live_frames_reach_the_store_and_make_a_minute_of_history(start) -> None:
    start()
    frame = wait_for(lambda: selectors.latest("bench-01"))
    assert selectors.is_live(frame)
    assert len(frame.gpus) == 4
    assert all(g["temperature_celsius"] for g in frame.gpus.values())
    wait_for(lambda: len(selectors.recent("bench-01")) >= 3)


def test_it_reads_faster_while_somebody_looks(start) -> None:
    sampler = start()
    wait_for(lambda: selectors.latest("bench-01"))
    assert not sampler._watched
    looked_at("bench-01")
    wait_for(lambda: sampler._watched)


def test_a_card_that_falls_off_the_bus_keeps_its_row_and_comes_back(start, socket_path: Path) -> None:
    start()
    wait_for(lambda: Gpu.objects.filter(present=True).count() == 4)
    client = HardwareClient(socket_path)
    client.fault("lost", 2)
    wait_for(lambda: Gpu.objects.filter(present=False).count() == 1)
    gone = Gpu.objects.get(present=False)
    assert gone.index == 2
    assert gone.name
    client.fault("clear", 2)
    wait_for(lambda: Gpu.objects.filter(present=True).count() == 4)
    client.close()


def test_a_missing_driver_is_an_error_in_words_and_never_four_healthy_fakes(start, live_store: Any) -> None:
    Rig.objects.create(slug="bench-01", ran_nvml=True)
    start("auto")
    rig = wait_for(lambda: Rig.objects.filter(slug="bench-01").exclude(hardware_error="").first())
    assert rig.hardware_source == "nvml"
    assert rig.gpus.count() == 0
    assert selectors.latest("bench-01") is None


def test_a_wrong_setting_is_said_on_the_rig(start) -> None:
    start("quantum")
    rig = wait_for(lambda: Rig.objects.exclude(hardware_error="").first())
    assert "RIGPANEL_HARDWARE" in rig.hardware_error


def test_means_are_stored_when_it_ends(start) -> None:
    sampler = start()
    wait_for(lambda: sampler._pending or Sample.objects.exists())
    sampler.end()
    wait_for(lambda: Sample.objects.count() >= 4)
    sample = Sample.objects.first()
    assert sample is not None
    assert sample.seconds == 10
    assert sample.power_watts


def test_it_goes_on_when_the_store_comes_back(start, live_store: Any) -> None:
    start()
    before = wait_for(lambda: selectors.latest("bench-01"))
    live_store.stop()
    try:
        assert selectors.latest("bench-01") is None
    finally:
        live_store.start()
    after = wait_for(lambda: selectors.latest("bench-01"))
    assert after.at > before.at


def test_a_second_sampler_waits_for_the_first_and_does_not_touch_the_rig(start) -> None:
    first = start()
    wait_for(lambda: selectors.latest("bench-01"))
    second = start()
    wait_for(lambda: "socket" in second._away)
    assert Rig.objects.get().hardware_error == ""
    first.end()
    wait_for(lambda: second._server is not None)


def test_it_ends_soon_even_while_a_reading_hangs(start, socket_path: Path) -> None:
    sampler = start()
    wait_for(lambda: selectors.latest("bench-01"))
    client = HardwareClient(socket_path)
    client.fault("hang", seconds=300)
    client.close()
    time.sleep(1.2)  # into a reading that hangs
    sampler.end()
    wait_for(sampler._ended.is_set)
