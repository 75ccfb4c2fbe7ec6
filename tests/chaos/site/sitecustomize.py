"""Loaded by every Python process of a panel under test (by ``PYTHONPATH``): its clock follows a file.

The file holds the offset in seconds. time-machine steps what ``time.time`` and ``datetime.now`` say, as ``date -s``
would;
the monotonic clock goes on, as it does then. No part of the product knows of this.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path

LOOK_SECONDS = 0.1


def follow(path: Path) -> None:
    import datetime

    import time_machine

    travel, offset = None, 0.0
    while True:
        with contextlib.suppress(OSError, ValueError):
            wanted = float(path.read_text())
            if wanted != offset:
                if travel is not None:
                    travel.stop()
                    travel = None
                offset = wanted
                if offset:
                    now = datetime.datetime.now(datetime.UTC)
                    travel = time_machine.travel(now + datetime.timedelta(seconds=offset), tick=True)
                    travel.start()
        time.sleep(LOOK_SECONDS)


if clock := os.environ.get("CHAOS_CLOCK"):
    threading.Thread(target=follow, args=(Path(clock),), daemon=True, name="clock").start()
