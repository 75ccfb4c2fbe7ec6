"""What goes wrong, drawn from a seed before anything happens."""

from __future__ import annotations

import contextlib
import random
import resource
import signal
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import redis
from celery import Celery

from apps.runners.processes import send_signal
from apps.runners.shim import ProcessStat, read_stat
from tests.panel import command_line

if TYPE_CHECKING:
    from tests.chaos.world import World

NAMES = ("web", "control", "beat", "sampler", "store", "gateway", "verify")
QUEUE = "rig.bench-01.control"
ACCIDENTS = {
    "kill": 5.0,
    "restart": 1.5,
    "freeze": 3.0,
    "engine": 3.0,
    "freeze engine": 1.0,
    "end engine": 0.7,
    "shim": 1.0,
    "freeze shim": 0.5,
    "disk": 2.0,
    "clock": 2.0,
    "duplicate": 2.0,
    "drop": 1.5,
    "supervisor": 0.3,
    "restart all": 0.3,
}


def draw(world: World, dice: random.Random) -> Callable[[], None]:
    kinds = {kind: weight for kind, weight in ACCIDENTS.items() if kind != "clock" or world.owns_panel}
    kind = dice.choices(list(kinds), list(kinds.values()))[0]
    name = dice.choice(NAMES)
    seconds = dice.choice((0.3, 1.0, 3.0))
    step = dice.choice((-7200, -60, 90, 86400))
    pick = dice.random()

    def act() -> None:
        if kind in ("kill", "restart"):
            signal_process(world, name, signal.SIGKILL if kind == "kill" else signal.SIGTERM)
        elif kind == "freeze":
            freeze(world, name, seconds)
        elif kind in ("engine", "freeze engine", "end engine"):
            numbers = {"engine": signal.SIGKILL, "freeze engine": signal.SIGSTOP, "end engine": signal.SIGTERM}
            signal_engine(world, pick, numbers[kind])
        elif kind in ("shim", "freeze shim"):
            signal_shim(world, pick, signal.SIGKILL if kind == "shim" else signal.SIGSTOP)
        elif kind == "disk":
            fill_disk(world, seconds)
        elif kind == "clock":
            world.clock.write_text(str(step))
            world.history.note(f"the clock is set by {step:+d} s")
        elif kind == "duplicate":
            send_again(world)
        elif kind == "drop":
            lose_messages(world, seconds)
        elif kind in ("supervisor", "restart all"):
            signal_process(world, "supervisor", signal.SIGKILL if kind == "supervisor" else signal.SIGTERM)
            if world.panel.process is not None:
                world.panel.process.wait(60)

    return act


def process_of(world: World, name: str) -> ProcessStat | None:
    pid = world.panel.pid(name)
    return read_stat(pid) if pid else None


def signal_process(world: World, name: str, number: signal.Signals) -> None:
    stat = process_of(world, name)
    if stat is not None:
        send_signal(stat, number)
        world.history.note(f"{number.name} to {name} ({stat.pid})")


def freeze(world: World, name: str, seconds: float) -> None:
    stat = process_of(world, name)
    if stat is None:
        return
    send_signal(stat, signal.SIGSTOP)
    world.frozen.append(stat)
    world.history.note(f"{name} ({stat.pid}) is frozen for {seconds} s")
    threading.Timer(seconds, lambda: send_signal(stat, signal.SIGCONT)).start()


def signal_engine(world: World, pick: float, number: signal.Signals) -> None:
    engines = world.panel.engines()
    if engines:
        stat = engines[int(pick * len(engines))]
        send_signal(stat, number)
        if number == signal.SIGSTOP and pick < 0.5:  # the other half stays frozen: the panel must find it
            world.frozen.append(stat)
        world.history.note(f"{number.name} to engine {stat.pid}: {' '.join(command_line(stat.pid))[:90]}")


def signal_shim(world: World, pick: float, number: signal.Signals) -> None:
    shims = world.shims()
    if shims:
        stat = shims[int(pick * len(shims))]
        send_signal(stat, number)
        if number == signal.SIGSTOP:
            world.frozen.append(stat)
        world.history.note(f"{number.name} to the shim {stat.pid}")


def fill_disk(world: World, seconds: float) -> None:
    """Files cannot grow: a quota for a moment, which root and users alike can impose on their own processes."""
    for name in ("control", "web", "gateway"):
        stat = process_of(world, name)
        if stat is not None:
            with contextlib.suppress(OSError, ValueError):
                _, hard = resource.prlimit(stat.pid, resource.RLIMIT_FSIZE)
                resource.prlimit(stat.pid, resource.RLIMIT_FSIZE, (4096, hard))
                world.limited.append(stat.pid)
    world.history.note(f"the disk is full for {seconds} s")
    threading.Timer(seconds, free_disk, (world,)).start()


def free_disk(world: World) -> None:
    while world.limited:
        pid = world.limited.pop()
        with contextlib.suppress(OSError, ValueError):
            _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))


def send_again(world: World) -> None:
    """The newest jobs' messages once more, and a few ticks at once, as a broker that delivers twice would."""
    try:
        newest = [int(r["id"]) for r in world.query("SELECT id FROM jobs_job ORDER BY id DESC LIMIT 3")]
        with Celery("again", broker=f"redis+socket://{store_socket(world)}", fixups=[]) as app:
            for job in newest:
                app.send_task("jobs.run", args=[job], queue=QUEUE, retry=False, ignore_result=True)
            for _ in range(3):
                app.send_task("jobs.tick", queue=QUEUE, retry=False, ignore_result=True)
        world.history.note(f"messages of jobs {newest} are sent again")
    except Exception as error:  # whatever the broker's client raises
        world.history.note(f"messages sent again: the store is away ({error})")


def lose_messages(world: World, seconds: float) -> None:
    """The worker takes nothing for a moment, and whatever is sent meanwhile is lost."""
    freeze(world, "control", seconds)
    client = redis.Redis(unix_socket_path=store_socket(world), socket_timeout=2)

    def lose() -> None:
        lost, until = 0, time.monotonic() + seconds
        with contextlib.suppress(redis.RedisError):
            while time.monotonic() < until:
                lost += bool(client.delete(QUEUE))
                time.sleep(0.02)
        client.close()
        world.history.note(f"{lost} times messages were lost")

    threading.Thread(target=lose, daemon=True).start()


def store_socket(world: World) -> str:
    return str(world.panel.data / "run" / "store.sock")
