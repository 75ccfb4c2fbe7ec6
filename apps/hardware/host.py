"""The machine around the cards: processor load and memory, through psutil."""

from __future__ import annotations

import psutil

from apps.hardware.protocol import HostReading


class HostMeter:
    """Callable that reads the host; processor load is the mean since the previous call."""

    def __init__(self) -> None:
        self._called_before = False

    def __call__(self) -> HostReading:
        percent = psutil.cpu_percent(interval=None)
        memory = psutil.virtual_memory()
        # psutil's first answer is a meaningless 0.0: there is no earlier call to compare with.
        cpu_percent = percent if self._called_before else None
        self._called_before = True
        return HostReading(
            cpu_percent=cpu_percent,
            # total - available is what `free` and people mean by used; psutil's `used` leaves out shared pages
            memory_used_bytes=memory.total - memory.available,
            memory_total_bytes=memory.total,
        )
