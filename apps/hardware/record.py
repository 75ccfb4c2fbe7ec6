"""Record a rig to a file: ``python -m apps.hardware.record --seconds 60 rig.jsonl``.

The file plays back with ``RIGPANEL_HARDWARE=replay:rig.jsonl``. It holds card names, UUIDs and the
names of processes on the cards, nothing else of the machine.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from apps.hardware.detect import choose_driver, open_driver
from apps.hardware.protocol import HardwareError
from apps.hardware.replay import record


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 recorded, 1 the hardware or the file said no, 2 wrong usage."""
    parser = argparse.ArgumentParser(prog="python -m apps.hardware.record", description="Record a rig to a file.")
    parser.add_argument("file", help="where to write; an existing file is replaced")
    parser.add_argument("--driver", default="nvml", help="nvml (default), simulated, auto or replay:FILE")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long (default 60)")
    parser.add_argument("--interval", type=float, default=1.0, help="seconds between readings (default 1)")
    options = parser.parse_args(arguments)
    try:
        driver = open_driver(choose_driver(options.driver, ran_nvml_before=False))
        try:
            count = record(driver, options.file, options.seconds, options.interval)
        finally:
            driver.close()
    except HardwareError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write(f"Stopped; what was read until now is in {options.file}.\n")
        return 0
    sys.stdout.write(f"{count} readings of {driver.source} are in {options.file}.\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
