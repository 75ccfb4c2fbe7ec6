"""The suite is checked itself: with any one guard of the product taken out, its invariants must cry.

Each case is one adversarial schedule, of the kind that the random rounds come upon, made certain: it runs once with the
guard in place, where nothing may be found, and once without it. The guards are taken out by monkeypatching here; the
product has no switch for it.
"""

from __future__ import annotations

import secrets
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from django.conf import settings
from django.db import connection, connections
from django.utils import timezone

from apps.common.actors import actor_of
from apps.common.identity import process_key
from apps.deployments import launching, routes, status, switch_forward
from apps.deployments.models import Deployment, GatewayProcess, GpuReservation, Replica, RestartPolicy, Status
from apps.deployments.reconcile import reconcile
from apps.deployments.services import stop_request, switch_request
from apps.deployments.status import deployment_transition
from apps.gateway.routes import RouteCache
from apps.jobs import runner as job_runner
from apps.jobs.models import Job
from apps.jobs.runner import JobContext, job_claim
from apps.runners import shim
from apps.runners.process import ProcessRunner
from apps.runners.protocol import LaunchSpec
from tests.chaos import invariants
from tests.deployments.test_switch import eventually, run
from tests.factories.profiles import simulated_profile

GUARDED = pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "without the guard"])


def query(sql: str) -> list[invariants.Row]:
    with connection.cursor() as cursor:
        cursor.execute(sql)
        names = [column[0] for column in cursor.description]
        return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]


def found() -> list[str]:
    return invariants.problems(query, invariants.engine_processes(str(settings.DATA_DIR).encode()))


def judge(guarded: bool, problems: list[str]) -> None:
    if guarded:
        assert problems == []
    else:
        assert problems, "the guard is gone and nobody noticed"


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str, Any], None]:
    return lambda where, name, instead: monkeypatch.setattr(where, name, instead)


@pytest.fixture(autouse=True)
def no_engine_is_left(sim_rig: Any) -> Iterator[None]:
    """Also those that only the lost guard let live."""
    yield
    for replica in Replica.objects.all():
        handle = launching.runner().recover(replica.launch_id)
        if handle is not None:
            launching.runner().stop(handle)


@GUARDED
def test_the_lease(sim_rig: Any, alice: Any, guarded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen worker whose job was taken over wakes up in the middle of a step and must touch nothing more."""
    run(switch_request(profile=simulated_profile("old"), actor=actor_of(alice)))
    job = switch_request(profile=simulated_profile("new"), actor=actor_of(alice))
    first = job_claim(job.pk)
    assert first is not None
    asleep, awake = threading.Event(), threading.Event()
    honest = switch_forward.wait_for_memory

    def freeze(*args: Any) -> str:
        if not asleep.is_set():
            asleep.set()
            awake.wait(60)
        return honest(*args)

    monkeypatch.setattr(switch_forward, "wait_for_memory", freeze)
    if not guarded:

        def update_whoever_holds_it(self: JobContext, **values: Any) -> None:
            Job.objects.filter(pk=self.job.pk).update(**values)

        monkeypatch.setattr(JobContext, "_update", update_whoever_holds_it)
        monkeypatch.setattr(JobContext, "check", lambda self: None)
        honest_finish = job_runner.job_finish
        monkeypatch.setattr(
            job_runner, "job_finish", lambda job, state, result, where=None: honest_finish(job, state, result)
        )

    def work() -> None:
        with suppress(Exception):
            first.run()
        connections.close_all()

    thread = threading.Thread(target=work)
    thread.start()
    assert asleep.wait(60)
    Job.objects.filter(pk=job.pk).update(lease_owner="elsewhere:1:tx-1:y", lease_until=timezone.now())
    second = job_claim(job.pk)
    assert second is not None
    second.run()
    # A person stops it, and only then the first one wakes.
    run(stop_request(deployment=Deployment.objects.get(served_name="new"), actor=actor_of(alice)))
    awake.set()
    thread.join(60)
    told = found()
    late = Job.objects.get(pk=job.pk).steps.filter(started_at__gt=Job.objects.order_by("-pk")[0].finished_at)
    told += [f"step {step.name} was begun by a worker that had lost its job" for step in late]
    judge(guarded, told)


@GUARDED
def test_the_conditional_update(
    sim_rig: Any, alice: Any, guarded: bool, without: Callable[[Any, str, Any], None]
) -> None:
    """The reconciler has seen an engine dead and is slow to say so, while somebody stops the deployment."""
    run(switch_request(profile=simulated_profile("old"), actor=actor_of(alice)))
    stale = Deployment.objects.get()
    run(stop_request(deployment=Deployment.objects.get(), actor=actor_of(alice)))
    if not guarded:

        def claim(obj: Any, table: Any, to: str, *, field: str = "status", where: Any = None, **values: Any) -> bool:
            type(obj)._default_manager.filter(pk=obj.pk).update(**{field: to}, **values)
            return True

        without(status, "claim", claim)
    deployment_transition(stale, Status.DEGRADED, "one of its replicas is gone")
    judge(guarded, found())


@GUARDED
def test_the_route_epoch(sim_rig: Any, alice: Any, guarded: bool, without: Callable[[Any, str, Any], None]) -> None:
    """A gateway that is slow to learn of a hold must have applied it before the old engine goes."""
    run(switch_request(profile=simulated_profile("old"), actor=actor_of(alice)))
    cache = RouteCache()
    cache.apply(routes.route_table())
    routes.gateway_seen(process_key(), epoch=cache.epoch or 0, in_flight={})
    if not guarded:
        without(routes, "all_acknowledged", lambda epoch: True)
    old = Deployment.objects.get()
    lost: list[str] = []
    honest = launching.stop_processes

    def stop(deployment: Deployment) -> str:
        entry = cache.entry("old")
        if deployment.pk == old.pk and entry is not None and entry.targets:
            lost.append("a request still goes to an engine that is being stopped")
        stopping.set()
        return honest(deployment)

    without(launching, "stop_processes", stop)

    def learn() -> None:
        """The gateway looks late: after a second where it is waited for, else not before it is too late."""
        stopping.wait(1.0 if guarded else 60.0)
        while not done.wait(0.1):
            cache.apply(routes.route_table())
            GatewayProcess.objects.update(acknowledged_epoch=cache.epoch, seen_at=timezone.now())
        connections.close_all()

    stopping, done = threading.Event(), threading.Event()
    thread = threading.Thread(target=learn)
    job = switch_request(profile=simulated_profile("new"), actor=actor_of(alice))
    thread.start()
    run(job)
    done.set()
    thread.join(60)
    judge(guarded, [*found(), *lost])


@GUARDED
def test_the_reservation_constraint(sim_rig: Any, alice: Any, guarded: bool) -> None:
    """Two starts on the same cards that both made their plan while the cards were free."""
    first, second = simulated_profile("first"), simulated_profile("second")
    if not guarded:
        drop_constraints()
    try:
        for profile in (first, second):
            deployment = Deployment.objects.create(
                rig=sim_rig, version=profile.current, served_name=profile.slug, simulated=True, started_by_name="alice"
            )
            with suppress(Exception):
                reserve_all_cards(deployment)
        told = invariants.one_owner_per_card(query, {})
        judge(guarded, told)
    finally:
        GpuReservation.objects.all().delete()
        if not guarded:
            put_constraints_back()


@GUARDED
def test_the_identity_of_a_handle(
    sim_rig: Any, alice: Any, guarded: bool, without: Callable[[Any, str, Any], None]
) -> None:
    """The number of an engine that died was given to a stranger's process: it must not count as the engine."""
    profile = simulated_profile("old")
    RestartPolicy.objects.create(profile=profile, restarts=0, probe_every_seconds=0)
    run(switch_request(profile=profile, actor=actor_of(alice)))
    replica = Replica.objects.get()
    handle = launching.handle_of(replica)
    assert handle is not None
    launching.stop_processes(Deployment.objects.get())
    stranger = launching.runner().launch(  # another engine, in the place that the old one's number names
        LaunchSpec(f"stranger-{secrets.token_hex(3)}", (sys.executable, "-c", "import time; time.sleep(600)"))
    )
    eventually(lambda: launching.runner().observe(stranger).pids, "the stranger lives")
    reused = replace(handle, engine_pid=stranger.engine_pid, pid=stranger.pid)
    Replica.objects.filter(pk=replica.pk).update(handle=reused.to_dict())
    if not guarded:

        def identified(self: ProcessRunner, handle: Any, pid: int, *_: Any) -> Any:
            return shim.read_stat(pid)

        without(ProcessRunner, "_identified", identified)
    try:
        reconcile()
        told = found()
        deployment = Deployment.objects.get()
        if deployment.status == Status.READY:
            told.append("a stranger's process passes for the engine")
        if not launching.runner().observe(stranger).pids:
            told.append("a stranger's process was killed")
        judge(guarded, told)
    finally:
        launching.runner().stop(stranger)


def reserve_all_cards(deployment: Deployment) -> None:
    replica = Replica.objects.create(
        deployment=deployment,
        index=0,
        launch_id=f"x{deployment.pk}",
        host="127.0.0.1",
        port=1000 + deployment.pk,
        base_url="http://127.0.0.1:1",
        engine_key="re-x",
    )
    for gpu in deployment.rig.gpus.all():
        GpuReservation.objects.create(rig=deployment.rig, gpu=gpu, replica=replica)


def _card_constraint() -> Any:
    return next(c for c in GpuReservation._meta.constraints if c.name == "one_live_reservation_per_gpu_slot")


def drop_constraints() -> None:
    with connection.schema_editor() as editor:
        editor.remove_constraint(GpuReservation, _card_constraint())


def put_constraints_back() -> None:
    with connection.schema_editor() as editor:
        editor.add_constraint(GpuReservation, _card_constraint())
