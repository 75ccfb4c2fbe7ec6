"""What the rig's own operating system says of processors, for binding engines to them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from django.conf import settings

from apps.profiles.binding import NumaHost
from apps.rigs.models import Rig

NODES = Path("/sys/devices/system/node")
NODE = re.compile(r"node(\d+)\Z")
CPU_LIST = re.compile(r"[0-9,-]+\Z")


def numa_host(rig: Rig, nodes: Path = NODES) -> NumaHost | None:
    """None where ``rig`` is another machine, is only simulated, or its kernel lists no nodes."""
    if rig.slug != settings.RIG_NAME or rig.is_simulated:
        return None
    found = {}
    try:
        for folder in nodes.iterdir():
            match = NODE.match(folder.name)
            if match:
                text = (folder / "cpulist").read_text().strip()
                found[int(match[1])] = text if CPU_LIST.match(text) else ""
    except OSError:
        return None
    return NumaHost(found, numactl=shutil.which("numactl") is not None) if found else None
