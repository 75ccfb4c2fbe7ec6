"""What holds cards, or looks like an engine of ours, without being one that the panel runs. Shown, and left alone.

The rig's worker looks (pages may be served elsewhere) and leaves what it found in the store for a moment.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import redis
import structlog
from django.conf import settings

from apps.common.realtime import page_changed
from apps.common.store import store
from apps.deployments import launching
from apps.deployments.models import Replica
from apps.hardware.client import HardwareClient
from apps.hardware.protocol import HardwareError
from apps.rigs.models import Rig
from apps.rigs.selectors import rig_here
from apps.runners.process import LAUNCH_MARKER
from apps.runners.processes import all_processes, is_alive, with_descendants

log = structlog.get_logger(__name__)
LOOK_SECONDS = 10.0
KEPT_SECONDS = 60
COMMAND_MAX = 300
STRAY_ENGINE, FOREIGN = "stray engine", "foreign"
# Other people's command lines are shown; what they should not have written there is not.
SECRET_FLAG = re.compile(r"(key|token|secret|password|passwd)", re.IGNORECASE)
TOKEN = re.compile(r"\b(?:sk|hf|rp|re|ghp|glpat)[-_][A-Za-z0-9_-]{8,}")  # keys by their usual beginnings
_last_look = 0.0


@dataclass(frozen=True, slots=True)
class Stray:
    """``kind``: an engine that this panel launched and no longer has on record, or a stranger on a card.
    ``gpus`` are indices; ``memory_used_bytes`` is the sum over them, None where the driver does not say."""

    kind: str
    pid: int
    user: str
    command: str
    gpus: tuple[int, ...] = ()
    memory_used_bytes: int | None = None


def look_for_strays(**_: Any) -> None:
    """Receiver of the rig's tick; looks every ten seconds, since it reads all of /proc."""
    global _last_look
    if time.monotonic() - _last_look < LOOK_SECONDS and _last_look:
        return
    _last_look = time.monotonic()
    rig = rig_here()
    found = [asdict(stray) for stray in find_strays(rig)]
    value = json.dumps(found)
    try:
        before = store().get(_key(rig.slug))
        store().set(_key(rig.slug), value, ex=KEPT_SECONDS)
    except redis.RedisError as error:
        log.debug("strays not kept", error=str(error))
        return
    if before is not None and before != value:
        page_changed("rig", rig=rig.pk)


def strays(rig: Rig) -> list[Stray]:
    """What was found last; empty while nothing is known."""
    try:
        raw = store().get(_key(rig.slug))
    except redis.RedisError:
        return []
    return [Stray(**{**one, "gpus": tuple(one["gpus"])}) for one in json.loads(str(raw))] if raw else []


def find_strays(rig: Rig) -> list[Stray]:
    """Look now, on this machine."""
    processes = all_processes()
    ours = _our_pids(rig)
    launched = {
        pid: launch_id
        for pid, stat in processes.items()
        if pid not in ours and is_alive(stat) and (launch_id := _launch_of(pid))
    }
    on_cards = _on_cards(rig)
    found = []
    for pid in sorted(set(launched) | (set(on_cards) - ours)):
        gpus, memory = on_cards.get(pid, ((), None))
        user, command = _who(pid)
        kind = STRAY_ENGINE if pid in launched else FOREIGN
        found.append(Stray(kind, pid, user, command, tuple(sorted(gpus)), memory))
    return found


def _our_pids(rig: Rig) -> set[int]:
    """Processes of every replica that is not released, with their descendants."""
    pids = {
        pid
        for replica in Replica.objects.filter(deployment__rig=rig, released_at=None)
        for pid in launching.observe(replica).pids
    }
    return with_descendants(pids, all_processes())


def _launch_of(pid: int) -> str:
    """The launch that a process of *this* panel belongs to, by its environment; empty for all others."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            words = file.read().split(b"\0")
    except OSError:
        return ""
    mark = f"{LAUNCH_MARKER}=".encode()
    launch_id = next((w[len(mark) :].decode(errors="replace") for w in words if w.startswith(mark)), "")
    known = launch_id and "/" not in launch_id and (settings.ENGINES_DIR / launch_id / "started.json").exists()
    return launch_id if known else ""


def _on_cards(rig: Rig) -> dict[int, tuple[list[int], int | None]]:
    """Per process the cards it holds memory on, and how much in all."""
    index = {g.uuid: g.index for g in rig.gpus.all()}
    client = HardwareClient(settings.SAMPLER_SOCKET)
    try:
        reading = client.read()
    except HardwareError:
        return {}
    finally:
        client.close()
    found: dict[int, tuple[list[int], int | None]] = {}
    for gpu in reading.gpus:
        for process in gpu.processes or ():
            gpus, memory = found.get(process.pid, ([], None))
            used = process.memory_used_bytes
            total = memory if used is None else (memory or 0) + used
            found[process.pid] = ([*gpus, index.get(gpu.uuid, -1)], total)
    return found


def _who(pid: int) -> tuple[str, str]:
    try:
        process = psutil.Process(pid)
        return process.username(), " ".join(without_secrets(process.cmdline() or [process.name()]))[:COMMAND_MAX]
    except psutil.Error:
        return "", ""  # of another container, or gone in this moment


def without_secrets(argv: Iterable[str]) -> list[str]:
    """A command line for others to read. A secret flag hides every word up to the next flag (vLLM takes several keys);
    what a shell or a header holds is looked into word by word."""
    shown, hide = [], False
    for word in argv:
        if " " in word.strip():
            hide = False
            shown.append(" ".join(without_secrets(word.split())))
            continue
        flag, equals, _ = word.partition("=")
        secret = bool(SECRET_FLAG.search(flag))
        if hide and not word.startswith("-"):
            shown.append("…")
            continue
        hide = (word.startswith("-") and not equals and secret) or word.lower() == "bearer"
        shown.append(f"{flag}=…" if equals and secret else TOKEN.sub("…", word.replace("\x00", " ")))
    return shown


def _key(rig_name: str) -> str:
    return f"rigpanel:strays:{rig_name}"
