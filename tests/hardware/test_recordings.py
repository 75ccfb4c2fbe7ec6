"""Recordings: what is written plays back, what is broken says where."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from apps.hardware.codec import inventory_from_dict, reading_from_dict, to_dict
from apps.hardware.protocol import HardwareError, HostReading
from apps.hardware.record import main
from apps.hardware.replay import ReplayDriver, load_recording, record
from apps.hardware.simulated import SimulatedDriver, SimulatedRig


class Story:
    """A simulated rig recorded with a clock that only its sleeps move."""

    def __init__(self) -> None:
        self.time = 5000.0
        rig = SimulatedRig(now=lambda: self.time, host=lambda: HostReading(1.5, 2, 3))
        self.driver = SimulatedDriver(rig)

    def sleep(self, seconds: float) -> None:
        self.time += seconds

    def record(self, path: Path, seconds: float, interval: float) -> int:
        return record(self.driver, path, seconds, interval, sleep=self.sleep, clock=lambda: self.time)


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    path = tmp_path / "rig.jsonl"
    assert Story().record(path, seconds=4, interval=2) == 3
    return path


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def test_a_recording_holds_the_inventory_and_a_reading_per_interval(recording: Path) -> None:
    inventory, readings = load_recording(recording)
    assert len(inventory.gpus) == 4
    assert [reading.at for reading in readings] == [5000, 5002, 5004]


def test_it_plays_at_its_pace_and_starts_again_at_its_end(recording: Path) -> None:
    now = [90_000.0]
    _, recorded = load_recording(recording)
    driver = ReplayDriver(recording, now=lambda: now[0])
    played = []
    for _ in range(8):
        reading = driver.read()
        assert reading.at == now[0]
        played.append([other.gpus for other in recorded].index(reading.gpus))
        now[0] += 1
    assert played == [0, 0, 1, 1, 2, 2, 0, 0]


def test_a_recording_of_one_reading_stands_still(tmp_path: Path) -> None:
    path = tmp_path / "one.jsonl"
    assert Story().record(path, seconds=0, interval=1) == 1
    driver = ReplayDriver(path)
    assert driver.read().gpus == driver.read().gpus


def test_a_replay_calls_itself_a_replay_whatever_was_recorded(recording: Path) -> None:
    assert load_recording(recording)[0].source == "simulated"
    assert ReplayDriver(recording).inventory().source == "replay"


@pytest.mark.parametrize(
    ("number", "damage"),
    [
        (1, lambda line: "not json"),
        (1, lambda line: "[]"),
        (1, lambda line: line.replace('"rigpanel_recording":1', '"rigpanel_recording":99')),
        (1, lambda line: line.replace('"gpus":[', '"gpus":["card",')),
        (3, lambda line: line[: len(line) // 2]),
        (3, lambda line: line.replace('"lost":false', '"lost":"no"', 1)),
        (3, lambda line: line.replace('"at":5002.0', '"at":NaN')),
        (3, lambda line: line.replace('"uuid":"GPU-', '"uuid":"GPU-x', 1)),
        (4, lambda line: line.replace('"at":5004.0', '"at":1.0')),
        (2, lambda line: "[" * 100_000),
    ],
)
def test_a_broken_line_is_named_by_its_number(recording: Path, number: int, damage: object) -> None:
    content = lines(recording)
    damaged = damage(content[number - 1])  # type: ignore[operator]
    assert damaged != content[number - 1]
    content[number - 1] = damaged
    recording.write_text("\n".join(content))
    with pytest.raises(HardwareError, match=rf"rig\.jsonl is broken in line {number}: "):
        ReplayDriver(recording)


def test_bytes_that_are_not_text_are_refused(recording: Path) -> None:
    recording.write_bytes(recording.read_bytes() + b"\xff\xfe\n")
    with pytest.raises(HardwareError, match="not UTF-8"):
        ReplayDriver(recording)


@pytest.mark.parametrize("keep", [0, 1])
def test_a_recording_without_readings_is_refused(recording: Path, keep: int) -> None:
    recording.write_text("\n".join(lines(recording)[:keep]))
    with pytest.raises(HardwareError, match="holds no readings"):
        ReplayDriver(recording)


def test_a_missing_recording_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HardwareError, match="No such file"):
        ReplayDriver(tmp_path / "nowhere.jsonl")


def test_a_recording_of_an_older_release_lacks_keys_and_one_of_a_newer_has_more(recording: Path) -> None:
    content = lines(recording)
    reading = json.loads(content[1])
    for gpu in reading["gpus"]:
        del gpu["pcie_replays"]
        gpu["number_of_leds"] = 12
    content[1] = json.dumps(reading)
    recording.write_text("\n".join(content))
    assert load_recording(recording)[1][0].gpus[0].pcie_replays is None


def test_unknown_values_stay_unknown_on_their_way_through_json() -> None:
    rig = SimulatedRig(gpu_count=2, pairs=(), host=lambda: HostReading(None, None, None))
    rig.fault("lost", 1)
    reading, inventory = rig.read(), rig.inventory()
    assert reading_from_dict(json.loads(json.dumps(to_dict(reading)))) == reading
    assert inventory_from_dict(json.loads(json.dumps(to_dict(inventory)))) == inventory
    assert to_dict(reading)["gpus"][1]["power_watts"] is None


@pytest.mark.parametrize("value", [True, "12", 1.5, [], {}])
def test_a_value_of_the_wrong_type_is_named_by_its_path(value: object) -> None:
    data = to_dict(SimulatedRig().read())
    data["gpus"][2]["memory_used_bytes"] = value
    with pytest.raises(HardwareError, match=r"reading\.gpus\[2\]\.memory_used_bytes should be a value of type int"):
        reading_from_dict(data)


def test_a_required_value_that_is_missing_is_named_by_its_path() -> None:
    data = to_dict(SimulatedRig().read())
    del data["gpus"][0]["uuid"]
    with pytest.raises(HardwareError, match=r"reading\.gpus\[0\]\.uuid is missing"):
        reading_from_dict(data)


def test_the_command_records_a_rig(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "sim.jsonl"
    assert main(["--driver", "simulated", "--seconds", "0.1", "--interval", "0.1", str(path)]) == 0
    assert "2 readings of simulated" in capsys.readouterr().out
    assert len(ReplayDriver(path).inventory().gpus) == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--driver", "crystal-ball", "x.jsonl"], "names no driver"),
        (["--driver", "simulated", "--interval", "0", "x.jsonl"], "above 0"),
        (["--driver", "simulated", "--seconds", "0", "nowhere/x.jsonl"], "cannot be written"),
    ],
)
def test_the_command_says_in_a_sentence_why_it_could_not(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    assert words in capsys.readouterr().err
