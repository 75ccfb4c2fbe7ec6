"""Recordings of a rig: made from any driver, played back as one.

A recording is lines of JSON: first ``{"rigpanel_recording": 1, "inventory": {...}}``, then one
reading per line. It plays at the pace at which it was made and starts again at its end.
Counters (energy, bytes) then start again too, as they do when a driver is loaded anew.
"""

from __future__ import annotations

import bisect
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

from apps.hardware.codec import inventory_from_dict, reading_from_dict, to_dict
from apps.hardware.protocol import GpuDriver, HardwareError, Inventory, Reading, Refused

_FORMAT = 1


class ReplayDriver:
    """Plays the recording at ``path``; raises HardwareError with the line number if it is broken."""

    source = "replay"

    def __init__(self, path: str | Path, *, now: Callable[[], float] = time.time) -> None:
        self._inventory, self._readings = load_recording(path)
        self._times = [reading.at for reading in self._readings]
        self._now = now
        self._started_at: float | None = None

    def inventory(self) -> Inventory:
        return dataclasses.replace(self._inventory, source="replay")

    def read(self) -> Reading:
        """The recorded reading that is due, with the present time as its ``at``."""
        now = self._now()
        if self._started_at is None or now < self._started_at:
            self._started_at = now
        return dataclasses.replace(self._due(now - self._started_at), at=now)

    def set_power_limit(self, gpu_uuid: str, watts: float) -> Refused | None:
        return Refused("These cards are a recording; nothing can be set.")

    def close(self) -> None:
        """Nothing to release: the file was read when the driver was made."""

    def _due(self, elapsed: float) -> Reading:
        first, last = self._readings[0].at, self._readings[-1].at
        # The last reading stays as long as the mean interval, so that the loop has no jump in pace.
        length = (last - first) * len(self._readings) / max(1, len(self._readings) - 1)
        if length <= 0:
            return self._readings[0]
        position = first + elapsed % length
        return self._readings[bisect.bisect_right(self._times, position) - 1]


def load_recording(path: str | Path) -> tuple[Inventory, tuple[Reading, ...]]:
    """Read and check a whole recording; raises HardwareError that names the first bad line."""
    inventory: Inventory | None = None
    readings: list[Reading] = []
    try:
        with Path(path).open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    if inventory is None:
                        inventory = _header(json.loads(line))
                    else:
                        readings.append(_checked(reading_from_dict(json.loads(line)), inventory, readings))
                except (ValueError, RecursionError) as error:
                    raise HardwareError(f"The recording {path} is broken in line {number}: not JSON.") from error
                except HardwareError as error:
                    raise HardwareError(f"The recording {path} is broken in line {number}: {error}") from error
    except OSError as error:
        raise HardwareError(f"The recording {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        line_number = 1 if inventory is None else len(readings) + 2
        raise HardwareError(f"The recording {path} is broken near line {line_number}: not UTF-8 text.") from error
    if inventory is None or not readings:
        raise HardwareError(f"The recording {path} holds no readings; make one with python -m apps.hardware.record.")
    return inventory, tuple(readings)


def record(
    driver: GpuDriver,
    path: str | Path,
    seconds: float,
    interval: float,
    *,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Write ``driver``'s inventory and then a reading every ``interval`` for ``seconds``; return their number.

    At least one reading is written. What was written before an interruption stays usable. Raises
    HardwareError from the driver or when the file cannot be written.
    """
    if interval <= 0:
        raise HardwareError("The interval between readings must be above 0 seconds.")
    inventory = driver.inventory()
    count = 0
    try:
        with Path(path).open("w", encoding="utf-8") as file:
            _write_line(file.write, {"rigpanel_recording": _FORMAT, "inventory": to_dict(inventory)})
            started_at = clock()
            while True:
                _write_line(file.write, to_dict(driver.read()))
                file.flush()
                count += 1
                if count * interval > seconds:
                    return count
                sleep(max(0.0, started_at + count * interval - clock()))
    except OSError as error:
        raise HardwareError(f"The recording {path} cannot be written: {error.strerror}.") from error


def _write_line(write: Callable[[str], object], data: dict[str, object]) -> None:
    write(json.dumps(data, separators=(",", ":")) + "\n")


def _header(data: object) -> Inventory:
    if not isinstance(data, dict) or data.get("rigpanel_recording") != _FORMAT:
        raise HardwareError(f'a recording starts with {{"rigpanel_recording": {_FORMAT}, "inventory": ...}}.')
    return inventory_from_dict(data.get("inventory"))


def _checked(reading: Reading, inventory: Inventory, earlier: list[Reading]) -> Reading:
    if [gpu.uuid for gpu in reading.gpus] != [gpu.uuid for gpu in inventory.gpus]:
        raise HardwareError("its cards are not those of the inventory.")
    if earlier and reading.at < earlier[-1].at:
        raise HardwareError("it is older than the reading before it.")
    return reading
