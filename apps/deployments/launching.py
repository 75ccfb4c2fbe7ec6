"""Starts, watches and stops the engines of one deployment. Every act here may be done twice."""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import psutil
from django.conf import settings
from django.db import IntegrityError, transaction
from django.utils.crypto import salted_hmac

from apps.common.identity import birth_mark
from apps.deployments.engine_http import doors, probe_health
from apps.deployments.equipment import engine_adapter, engine_install
from apps.deployments.memory import free_memory
from apps.deployments.models import CPU_SLOT, SERVING, WHOLE_CARD, Deployment, GpuReservation, Replica
from apps.deployments.plan import Plan, launches, slot_of
from apps.deployments.stalls import Stall
from apps.engines.protocol import (
    Cause,
    ChecksItsStart,
    CompilesPerKey,
    Diagnosis,
    ReadinessState,
    SharesOneAddress,
)
from apps.jobs.handlers import JobFailed
from apps.profiles.models import Device
from apps.runners.protocol import Handle, LaunchSpec, Observation, ProcessState, Runner, RunnerError
from apps.runners.registry import choose_runner

LOG_TAIL_BYTES = 6000
LOG_KEEP_BYTES = 512 * 1024


@lru_cache(maxsize=1)
def runner() -> Runner:
    return choose_runner(settings.RUNNER, settings.ENGINES_DIR)


def port_is_free(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def free_ports(count: int) -> list[int]:
    """Ports of the engine range that nobody listens on and no live replica holds.

    Raises JobFailed when there are too few."""
    taken = set(Replica.objects.filter(released_at=None).values_list("port", flat=True))
    found = []
    for port in settings.ENGINE_PORTS:
        if port not in taken and port_is_free(settings.ENGINE_BIND, port):
            found.append(port)
            if len(found) == count:
                return found
    first, last = settings.ENGINE_PORTS.start, settings.ENGINE_PORTS.stop - 1
    raise JobFailed(f"All engine ports from {first} to {last} are taken; widen RIGPANEL_ENGINE_PORTS.")


def reserve(deployment: Deployment, the_plan: Plan) -> list[Replica]:
    """Make the replicas with their ports and cards, all or nothing; returns existing ones when run again.

    The database's constraints decide between two who want one card. Raises JobFailed."""
    existing = list(deployment.replicas.all())
    if existing:
        return existing
    ports = free_ports(len(the_plan.servers))
    shared = isinstance(engine_adapter(deployment.version, deployment.rig), SharesOneAddress)
    keys = [_engine_key(the_plan) for _ in ports]
    try:
        with transaction.atomic():
            for index, gpus in enumerate(the_plan.servers):
                door = 0 if shared else index
                replica = Replica.objects.create(
                    deployment=deployment,
                    index=index,
                    launch_id=_launch_id(deployment, index),
                    host=settings.ENGINE_BIND,
                    port=ports[index],
                    base_url=f"http://{settings.ENGINE_ADVERTISE}:{ports[door]}",
                    engine_key=keys[door],
                )
                for gpu_id in gpus:
                    GpuReservation.objects.create(rig=the_plan.rig, gpu_id=gpu_id, slot=WHOLE_CARD, replica=replica)
            if the_plan.version.device == Device.CPU:
                GpuReservation.objects.create(
                    rig=the_plan.rig, gpu=None, slot=CPU_SLOT, replica=deployment.replicas.get(index=0)
                )
    except IntegrityError:
        raise JobFailed("Another deployment took one of these cards or ports in this moment; try again.") from None
    return list(deployment.replicas.all())


def _launch_id(deployment: Deployment, index: int) -> str:
    return f"d{deployment.pk}-r{index}-{secrets.token_hex(3)}"


def renew(replica: Replica, the_plan: Plan) -> None:
    """Make a replica ready for another launch on its cards and port; its old one must have been stopped.

    With a new key: what remembers the old engine is refused by the new one. The old launch's folder stays for whoever
    wants its whole log (``pruning``)."""
    Replica.objects.filter(pk=replica.pk).update(
        launch_id=_launch_id(replica.deployment, replica.index),
        engine_key=_engine_key(the_plan),
        handle=None,
        argv=None,
        start_check=None,
        members=[],
        healthy=False,
    )
    replica.refresh_from_db()


def _engine_key(the_plan: Plan) -> str:
    """Random for each launch; where the engine would compile anew for it, the profile version's own. Either way no
    other model's engine accepts it."""
    version, rig = the_plan.version, the_plan.rig
    adapter = engine_adapter(version, rig)
    if isinstance(adapter, CompilesPerKey) and adapter.compiles_per_key(engine_install(version, rig).version):
        return f"re-{salted_hmac('rigpanel.engine-key', f'{rig.slug} {version.pk}', algorithm='sha256').hexdigest()}"
    return f"re-{secrets.token_urlsafe(24)}"


def launch(deployment: Deployment, the_plan: Plan, *, only: int | None = None) -> None:
    """Start every process and keep its handle with the replicas that it serves; ``only`` the one of this index. Raises
    JobFailed."""
    replicas = list(deployment.replicas.prefetch_related("reservations__gpu"))
    # As they were placed, not by index: ranks count along this order, and pairs may be 0-2 and 1-3.
    cards = [[x.gpu for x in sorted(r.reservations.all(), key=lambda x: x.pk) if x.gpu] for r in replicas]
    starting = [gpus for r, gpus in zip(replicas, cards, strict=True) if only in (None, r.index)]
    free = free_memory({gpu.uuid for gpus in starting for gpu in gpus})
    slots = tuple(
        slot_of(r.launch_id, r.host, r.port, r.engine_key, gpus, free) for r, gpus in zip(replicas, cards, strict=True)
    )
    for engine in launches(the_plan, slots):
        if only not in (None, engine.replica):
            continue
        spec = LaunchSpec(
            launch_id=engine.launch_id,
            argv=engine.argv,
            env=engine.env,
            secret_env=engine.secret_env,
            stop_signals=engine.stop_signals,
            ask_first_seconds=engine.ask_first_seconds,
        )
        try:
            handle = runner().launch(spec)
        except RunnerError as error:
            raise JobFailed(str(error), cause="engine_missing") from None
        served = Replica.objects.filter(deployment=deployment, base_url=replicas[engine.replica].base_url)
        served.update(handle=handle.to_dict(), argv=list(engine.argv))


def handle_of(replica: Replica) -> Handle | None:
    """The handle on the row, or what the runner finds under the launch id when the row was not written."""
    if replica.handle:
        return Handle.from_dict(replica.handle)
    return runner().recover(replica.launch_id)


def observe(replica: Replica) -> Observation:
    handle = handle_of(replica)
    return runner().observe(handle) if handle else Observation(ProcessState.LOST)


def members_of(seen: Observation) -> list[list[object]]:
    """Who the engine consists of, as ``Replica.members`` keeps it."""
    return [[pid, birth_mark(pid)] for pid in seen.pids]


def log_tail(replica: Replica, max_bytes: int = LOG_TAIL_BYTES) -> str:
    handle = handle_of(replica)
    return runner().logs(handle, -max_bytes, max_bytes).text if handle else ""


def stop_processes(deployment: Deployment) -> str:
    """Stop all of a deployment's engines; returns a sentence. Raises JobFailed if one survives everything."""
    return stop_replicas(doors(deployment.replicas.all()))


def stop_replicas(replicas: Iterable[Replica]) -> str:
    """``stop_processes`` of these alone, which have an address each. One that did not begin yet does not begin later:
    a worker may be just starting it, or what a killed one left behind."""
    ends = []
    for replica in replicas:
        handle = handle_of(replica) or runner().withdraw(replica.launch_id)
        if handle is None:
            continue
        try:
            seen = runner().stop(handle)
        except RunnerError as error:
            raise JobFailed(str(error)) from None
        ends.append("exit code unknown" if seen.exit_code is None else f"exit code {seen.exit_code}")
    return (
        f"{len(ends)} engine process{'es' if len(ends) != 1 else ''} stopped ({', '.join(ends)})"
        if ends
        else "nothing ran"
    )


@dataclass
class ReplicaWatch:
    """What was read so far of one starting replica; ``unfinished`` is its log's last, incomplete line."""

    replica: Replica
    label: str
    offset: int = 0
    text: str = ""
    unfinished: str = ""
    ready: bool = False
    phase: str = ""
    fraction: float = 0.0
    stall: Stall = field(default_factory=Stall)


def wait_ready(
    deployment: Deployment,
    only: Sequence[Replica] | None = None,
    *,
    pause: Callable[[float], None],
    tell: Callable[[float, str], None],
    write_log: Callable[[str], None],
) -> None:
    """Follow log and health of every replica, or of those in ``only``, until all are ready.

    ``pause`` waits and raises when the job must stop; ``tell`` gets fraction and phase; ``write_log`` gets new
    engine output. Raises JobFailed with the diagnosis when one ends, fails, takes too long or gets nowhere.
    """
    engine = engine_adapter(deployment.version, deployment.rig)
    replicas = doors(deployment.replicas.all()) if only is None else only
    watches = [ReplicaWatch(r, f"[{r.index}] " if len(replicas) > 1 else "") for r in replicas]
    begun = time.monotonic()
    while True:
        for watch in watches:
            if watch.ready:
                continue
            handle = handle_of(watch.replica)
            if handle is None:
                raise JobFailed(f"Replica {watch.replica.index} was never started.")
            seen = runner().observe(handle)
            _read_log(watch, handle, write_log)
            if seen.state != ProcessState.RUNNING:
                _read_log(watch, handle, write_log)
                raise failed_start(deployment, engine.diagnose(watch.text, seen.exit_code), seen.exit_code, watch.text)
            readiness = engine.readiness(watch.text, probe_health(watch.replica, engine.health_path))
            if readiness.state == ReadinessState.FAILED:
                code = _exit_code_soon(handle, pause)
                _read_log(watch, handle, write_log)
                raise failed_start(deployment, engine.diagnose(watch.text, code), code, watch.text)
            watch.phase, watch.fraction = f"{readiness.phase} {readiness.count}".rstrip(), readiness.fraction
            # A stranger on the port may answer too; ours then ends with "address in use" and is diagnosed.
            if readiness.state == ReadinessState.READY and _listens(seen.pids, watch.replica.port):
                watch.ready = True
                served = Replica.objects.filter(deployment=deployment, base_url=watch.replica.base_url)
                # One that joins others who serve gets requests once it has answered one.
                served.update(healthy=deployment.status not in SERVING, members=members_of(seen))
                _read_log(watch, handle, write_log)  # also what it said between our last look and its answer
                if isinstance(engine, ChecksItsStart):
                    _check_start(engine, watch, write_log)
            elif stuck := watch.stall.look(seen.pids, watch.offset):
                raise failed_start(deployment, _hung(f"In the phase {watch.phase!r} {stuck}.", watch), None, watch.text)
        slowest = min(watches, key=lambda w: (w.ready, w.fraction))
        ready = sum(w.ready for w in watches)
        tell(
            sum(1.0 if w.ready else w.fraction for w in watches) / len(watches),
            slowest.phase if len(watches) == 1 else f"{slowest.phase} ({ready} of {len(watches)} replicas ready)",
        )
        if ready == len(watches):
            return
        waited = time.monotonic() - begun
        if waited > engine.start_timeout_seconds:
            why = f"It was not ready after {waited:.0f} s; it hung in the phase {slowest.phase!r}."
            raise failed_start(deployment, _hung(why, slowest), None, slowest.text)
        pause(0.05 if waited < 20 else 0.25)


def _hung(why: str, watch: ReplicaWatch) -> Diagnosis:
    return Diagnosis(Cause.TIMEOUT, why, tuple(watch.text.splitlines()[-5:]))


def _discard(path: Path) -> None:
    """Only what lies in the panel's own cache: the path stood in an engine's log."""
    cache = Path(settings.DATA_DIR, "cache").resolve()
    if path.resolve().is_relative_to(cache):
        path.unlink(missing_ok=True)


def _check_start(engine: ChecksItsStart, watch: ReplicaWatch, write_log: Callable[[str], None]) -> None:
    """Keep what the start's log shows; an engine that answers may still not be what was asked for."""
    replica = Replica.objects.get(pk=watch.replica.pk)
    found = engine.check_start(watch.text, replica.argv or ())
    replica.start_check = {"warnings": list(found.warnings), "facts": dict(found.facts)}
    replica.save(update_fields=["start_check"])
    for path in found.discard:
        _discard(Path(path))
    for warning in found.warnings:
        write_log(f"{watch.label}Warning: {warning}")


def _listens(pids: Sequence[int], port: int) -> bool:
    """Whether one of these processes listens on ``port``; True where the system does not let us look."""
    looked = False
    for pid in pids:
        try:
            connections = psutil.Process(pid).net_connections(kind="tcp")
        except psutil.NoSuchProcess:
            continue
        except psutil.Error:
            return True
        looked = True
        if any(c.status == psutil.CONN_LISTEN and c.laddr.port == port for c in connections):
            return True
    return not looked


def _exit_code_soon(handle: Handle, pause: Callable[[float], None]) -> int | None:
    """An engine that logged its last error usually ends by itself; its exit code belongs to the evidence."""
    deadline = time.monotonic() + 10.0
    while time.monotonic() < deadline:
        seen = runner().observe(handle)
        if seen.state != ProcessState.RUNNING:
            return seen.exit_code
        pause(0.1)
    return None


def _read_log(watch: ReplicaWatch, handle: Handle, write_log: Callable[[str], None]) -> None:
    """Take what is new; whole lines go to ``write_log``, with the replica's number where there are several."""
    chunk = runner().logs(handle, watch.offset)
    if chunk.next_offset == watch.offset:
        return
    watch.offset = chunk.next_offset
    watch.text = (watch.text + chunk.text)[-LOG_KEEP_BYTES:]
    *lines, watch.unfinished = (watch.unfinished + chunk.text).split("\n")
    if lines:
        write_log("\n".join(watch.label + line for line in lines if line.strip()))


def failed_start(deployment: Deployment, diagnosis: Diagnosis, exit_code: int | None, text: str) -> JobFailed:
    serves = deployment.status in SERVING  # then it is one replica that joins the others
    name = f"The replica of {deployment.profile_name}" if serves else deployment.profile_name
    return JobFailed(
        f"{name} did not start: {diagnosis.summary}",
        cause=str(diagnosis.cause),
        evidence=list(diagnosis.evidence),
        exit_code=exit_code,
        suggestion=diagnosis.suggestion,
        suggested_options=dict(diagnosis.suggested_options),
        log_tail=text[-LOG_TAIL_BYTES:],
    )
