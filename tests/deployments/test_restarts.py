"""Engines that die or hang: started again, within a budget, and never in the way of what people ask for."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterator
from copy import copy
from datetime import timedelta
from typing import Any

import pytest
from django.db import connection
from django.utils import timezone

from apps.audit.models import AuditEntry
from apps.common.actors import actor_of
from apps.common.models import Epoch
from apps.deployments import launching, probing, restarting, switch_forward
from apps.deployments import reconcile as reconcile_module
from apps.deployments.models import LIVE, CardPause, Deployment, GpuReservation, RestartPolicy, Route, Status
from apps.deployments.pauses import pause_card
from apps.deployments.reconcile import reconcile
from apps.deployments.selectors import empty_because
from apps.deployments.services import stop_request, switch_request
from apps.deployments.strays import find_strays, without_secrets
from apps.engines.llama_cpp.adapter import LlamaCppAdapter
from apps.gateway.menu import menu_read
from apps.jobs.estimates import typical_seconds
from apps.jobs.handlers import JobFailed
from apps.jobs.models import LIVE_STATES, Job, JobState
from apps.jobs.runner import job_claim
from apps.jobs.services import job_cancel
from apps.profiles.models import Profile
from apps.rigs.models import Gpu
from apps.runners.processes import all_processes, send_signal
from apps.runners.protocol import Handle, Observation, RunnerError
from tests.deployments.test_switch import engine_pids, eventually, run, serving
from tests.factories.profiles import simulated_profile


@pytest.fixture
def coder(sim_rig: Any, alice: Any) -> Profile:
    """A profile that serves."""
    profile = simulated_profile("coder", tp=2)
    RestartPolicy.objects.create(profile=profile, restarts=2, backoff_seconds=0.0, probe_every_seconds=0.0)
    job = run(switch_request(profile=profile, actor=actor_of(alice)))
    assert job.state == JobState.SUCCEEDED, job.result
    return profile


def kill_engine(slug: str = "coder") -> None:
    deployment = Deployment.objects.get(version__profile__slug=slug, status__in=LIVE)
    pids = {p for r in deployment.replicas.all() for p in launching.observe(r).pids}
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: not pids & engine_pids(), "the engine is gone")


def restart() -> Job:
    return Job.objects.get(state__in=LIVE_STATES)


def test_what_died_is_started_again_and_requests_wait_for_it(coder: Profile) -> None:
    kill_engine()
    reconcile()
    died = Deployment.objects.get(status=Status.FAILED)
    assert "signal 9" in died.status_reason
    job = restart()
    assert job.user_name == "panel"
    assert "restart 1 of 2" in job.reason
    assert [(r.served_name, r.state, r.held_by_job_id) for r in Route.objects.all()] == [("coder", "held", job.pk)]
    reconcile()  # again, while it waits: nothing more happens
    assert run(job).state == JobState.SUCCEEDED, job.result
    assert serving() == ["coder"]
    assert [(r.served_name, r.state) for r in Route.objects.all()] == [("coder", "open")]
    assert died.evidence
    assert died.evidence["exit_code"] == -9


def test_whether_it_may_be_restarted_is_looked_at_with_no_write_open(
    coder: Profile, alice: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan reads files and the store, for which no other writer waits."""
    run(switch_request(profile=simulated_profile("beside", tp=2), actor=actor_of(alice)))
    looked: list[tuple[bool, list[tuple[str, str]]]] = []
    really = restarting.switch_verdict

    def look(*args: Any, **more: Any) -> Any:
        routes = sorted((r.served_name, r.state) for r in Route.objects.all())
        looked.append((connection.in_atomic_block, routes))
        return really(*args, **more)

    monkeypatch.setattr(restarting, "switch_verdict", look)
    kill_engine()
    reconcile()
    assert looked == [(False, [("beside", "open"), ("coder", "held")])]  # and its requests wait already
    assert ("coder", "held", restart().pk) in waits()


def test_after_its_budget_it_stays_failed_and_says_why(coder: Profile) -> None:
    for _ in range(2):
        kill_engine()
        reconcile()
        assert run(restart()).state == JobState.SUCCEEDED
    kill_engine()
    reconcile()
    assert not Job.objects.filter(state__in=LIVE_STATES).exists()
    last = Deployment.objects.order_by("-pk").first()
    assert last is not None
    assert last.status == Status.FAILED
    assert "restarted 2 times within 10 min" in last.status_reason
    assert AuditEntry.objects.filter(action="deployment.given_up").count() == 1
    assert not Route.objects.exists()


def test_a_restart_that_fails_counts_too(coder: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise JobFailed("Coder did not start: no.", cause="unknown")

    monkeypatch.setattr(switch_forward, "wait_for_deployment", refuse)
    kill_engine()
    for _ in range(2):
        reconcile()
        job = run(restart())
        assert job.state == JobState.FAILED
        assert "Nothing else was touched." in job.summary
    reconcile()
    last = Deployment.objects.order_by("-pk").first()
    assert last is not None
    assert "restarted 2 times" in last.status_reason
    assert not Job.objects.filter(state__in=LIVE_STATES).exists()
    assert empty_because(last.rig).startswith("Coder: Coder did not start")


def waits() -> list[tuple[str, str, int | None]]:
    return [(r.served_name, r.state, r.held_by_job_id) for r in Route.objects.all()]


def test_requests_wait_through_the_backoff_with_an_honest_eta(coder: Profile, alice: Any) -> None:
    RestartPolicy.objects.update(backoff_seconds=1000)
    kill_engine()
    reconcile()
    assert run(restart()).state == JobState.SUCCEEDED
    kill_engine()
    reconcile()  # waits for a quarter of an hour
    assert not Job.objects.filter(state__in=LIVE_STATES).exists()
    assert waits() == [("coder", "held", None)]
    died = Deployment.objects.get(status=Status.FAILED, desired="serving")
    assert died.ended_at is not None
    loads = typical_seconds("switch", "coder", died.rig.slug)
    assert loads
    eta_at = Route.objects.get().eta_at
    assert eta_at is not None
    assert abs(eta_at - died.ended_at - timedelta(seconds=1000 + loads)) < timedelta(milliseconds=1)
    assert menu_read().state("coder") == "loading"
    epoch = Epoch.current("routes")
    reconcile()
    assert Epoch.current("routes") == epoch  # nothing new, and no gateway is bothered
    RestartPolicy.objects.update(backoff_seconds=0)
    reconcile()
    job = restart()
    assert waits() == [("coder", "held", job.pk)]
    assert Route.objects.get().eta_at is not None
    assert run(job).state == JobState.SUCCEEDED
    assert waits() == [("coder", "open", None)]


def test_requests_go_on_waiting_when_a_restart_fails_and_another_is_due(
    coder: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    RestartPolicy.objects.update(backoff_seconds=1000)

    def refuse(*_: Any) -> None:
        raise JobFailed("Coder did not start: no.", cause="unknown")

    monkeypatch.setattr(switch_forward, "wait_for_deployment", refuse)
    kill_engine()
    reconcile()
    assert run(restart()).state == JobState.FAILED
    assert waits() == [("coder", "held", None)]  # at once: nobody is turned away until the next tick
    reconcile()
    assert waits() == [("coder", "held", None)]
    assert Route.objects.get().eta_at is not None


def test_whoever_stops_what_waits_for_its_restart_lets_its_requests_go(coder: Profile, alice: Any) -> None:
    RestartPolicy.objects.update(backoff_seconds=1000)
    kill_engine()
    reconcile()
    assert run(restart()).state == JobState.SUCCEEDED
    kill_engine()
    reconcile()
    died = Deployment.objects.get(status=Status.FAILED, desired="serving")
    assert run(stop_request(deployment=died, actor=actor_of(alice))).state == JobState.SUCCEEDED
    assert waits() == []


def test_requests_do_not_wait_for_what_is_no_longer_wanted(coder: Profile) -> None:
    RestartPolicy.objects.update(backoff_seconds=1000)
    kill_engine()
    reconcile()
    assert run(restart()).state == JobState.SUCCEEDED
    kill_engine()
    reconcile()
    assert waits()
    Deployment.objects.filter(status=Status.FAILED).update(desired="stopped")  # whatever did it
    reconcile()
    assert waits() == []


def test_a_new_switch_to_it_keeps_its_own_hold(coder: Profile, alice: Any) -> None:
    RestartPolicy.objects.update(backoff_seconds=1000)
    kill_engine()
    reconcile()
    assert run(restart()).state == JobState.SUCCEEDED
    kill_engine()
    reconcile()
    job = switch_request(profile=coder, actor=actor_of(alice))
    context = job_claim(job.pk)
    assert context is not None
    looked: list[list[tuple[str, str, int | None]]] = []
    start = switch_forward.start_deployment

    def look(*args: Any) -> str:
        reconcile()  # the one that failed is let go: a later start has taken its place
        looked.append(waits())
        return start(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(switch_forward, "start_deployment", look)
        context.run()
    assert looked == [[("coder", "held", job.pk)]]
    assert waits() == [("coder", "open", None)]


def test_a_switch_that_a_person_asks_for_supersedes_a_restart_and_brings_it_back_beside(
    coder: Profile, alice: Any
) -> None:
    kill_engine()
    reconcile()
    waiting = restart()
    job = run(switch_request(profile=simulated_profile("other", tp=2), actor=actor_of(alice)))
    waiting.refresh_from_db()
    assert waiting.state == JobState.CANCELLED
    assert job.state == JobState.SUCCEEDED
    assert serving() == ["coder", "other"]


def queued_restart() -> Job:
    kill_engine()
    reconcile()
    return restart()


def test_an_operators_click_on_what_waits_to_be_restarted_passes_over_what_the_restart_may_not(
    coder: Profile, olivia: Any
) -> None:
    waiting = queued_restart()
    for gpu in Gpu.objects.all():
        pause_card(gpu, "was stopped for heat", "hot")
    job = switch_request(profile=coder, actor=actor_of(olivia), override=True)
    assert switch_request(profile=coder, actor=actor_of(olivia), override=True) == job  # a double click
    reconcile()
    assert waits() == [("coder", "held", job.pk)]  # whoever waited for the restart waits on
    waiting.refresh_from_db()
    assert (waiting.state, waiting.superseded_by) == (JobState.CANCELLED, job)
    job = run(job)
    assert job.state == JobState.SUCCEEDED, job.summary
    assert serving() == ["coder"]


def test_it_replaces_what_runs_in_its_place_by_now_as_a_restart_does_not(
    coder: Profile, alice: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_engine()
    wide = switch_request(profile=simulated_profile("wide", tp=4), actor=actor_of(alice))
    with monkeypatch.context() as patch:
        patch.setattr(restarting, "engines_busy", lambda _: False)  # it looked in the moment before that click
        reconcile()
    assert run(wide).state == JobState.SUCCEEDED
    assert restart().title == "Restart Coder"
    assert run(switch_request(profile=coder, actor=actor_of(alice))).state == JobState.SUCCEEDED
    assert serving() == ["coder"]


def test_a_click_in_the_place_of_a_restart_that_fails_or_is_cancelled_does_not_load_it_once_more(
    coder: Profile, alice: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise JobFailed("Coder did not start: no.", cause="unknown")

    queued_restart()
    with monkeypatch.context() as patch:
        patch.setattr(switch_forward, "wait_for_deployment", refuse)
        failed = run(switch_request(profile=coder, actor=actor_of(alice)))
    assert failed.summary == "Coder did not start: no. Nothing served before, so nothing was brought back."
    assert run(switch_request(profile=coder, actor=actor_of(alice))).state == JobState.SUCCEEDED
    queued_restart()
    job = switch_request(profile=coder, actor=actor_of(alice))
    job_cancel(job, actor=actor_of(alice))
    assert run(job).state == JobState.CANCELLED
    assert Deployment.objects.count() == 3
    assert not Deployment.objects.filter(status__in=LIVE).exists()


def test_a_click_in_the_place_of_a_restart_that_is_refused_gives_the_wish_back(coder: Profile, olivia: Any) -> None:
    queued_restart()
    job = switch_request(profile=coder, actor=actor_of(olivia))
    for gpu in Gpu.objects.all():
        pause_card(gpu, "was stopped for heat", "hot")
    assert run(job).summary.startswith("Not switched: GPU 0 was stopped for heat")
    CardPause.objects.all().delete()
    reconcile()
    assert run(restart()).state == JobState.SUCCEEDED
    assert serving() == ["coder"]


def test_what_a_restart_owes_goes_on_from_the_click_in_its_place_to_the_next_one(coder: Profile, alice: Any) -> None:
    queued_restart()
    switch_request(profile=coder, actor=actor_of(alice))
    job = run(switch_request(profile=simulated_profile("other", tp=2), actor=actor_of(alice)))
    assert "Brought back Coder." in job.summary
    assert serving() == ["coder", "other"]


def test_a_restart_takes_no_card_from_what_runs_now(coder: Profile, alice: Any) -> None:
    kill_engine()
    reconcile()
    waiting = restart()
    job = run(switch_request(profile=simulated_profile("wide", tp=4), actor=actor_of(alice)))
    waiting.refresh_from_db()
    assert waiting.state == JobState.CANCELLED
    assert serving() == ["wide"]
    assert "Coder was not brought back: it does not fit beside what runs now." in job.summary
    reconcile()
    assert not Job.objects.filter(state__in=LIVE_STATES).exists()


def test_what_is_asked_for_while_it_waits_for_its_restart_ends_the_wait(coder: Profile, alice: Any) -> None:
    RestartPolicy.objects.update(backoff_seconds=1000)
    assert run(queued_restart()).state == JobState.SUCCEEDED
    kill_engine()
    reconcile()
    died = Deployment.objects.get(status=Status.FAILED, desired="serving")
    run(switch_request(profile=simulated_profile("wide", tp=4), actor=actor_of(alice)))
    reconcile()
    died.refresh_from_db()
    assert died.desired == "stopped"
    assert died.status_reason.endswith("Wide was asked for since and runs in its place.")
    assert serving() == ["wide"]
    run(stop_request(deployment=Deployment.objects.get(status=Status.READY), actor=actor_of(alice)))
    reconcile()
    assert not Job.objects.filter(state__in=LIVE_STATES).exists()


@pytest.mark.parametrize(("tp", "alone"), [(4, False), (2, True)])
def test_what_was_asked_for_in_its_place_or_alone_ends_the_wish_though_it_is_gone_by_the_next_look(
    coder: Profile, alice: Any, tp: int, alone: bool
) -> None:
    RestartPolicy.objects.update(backoff_seconds=1000)
    assert run(queued_restart()).state == JobState.SUCCEEDED
    kill_engine()
    reconcile()
    died = Deployment.objects.get(status=Status.FAILED, desired="serving")
    assert waits() == [("coder", "held", None)]
    job = run(switch_request(profile=simulated_profile("other", tp=tp), actor=actor_of(alice), exclusive=alone))
    assert "Coder, which had died, is not started again." in [line.text for line in job.log_lines.all()]
    assert waits() == [("other", "open", None)]
    run(stop_request(deployment=Deployment.objects.get(status=Status.READY), actor=actor_of(alice)))
    RestartPolicy.objects.update(backoff_seconds=0)
    reconcile()
    assert not Job.objects.filter(state__in=LIVE_STATES).exists()
    died.refresh_from_db()
    how = "is to run alone" if alone else "runs in its place"
    assert died.status_reason.endswith(f"Other was asked for since and {how}.")


def test_what_is_asked_for_beside_it_leaves_it_its_wish(coder: Profile, alice: Any) -> None:
    RestartPolicy.objects.update(backoff_seconds=1000)
    assert run(queued_restart()).state == JobState.SUCCEEDED
    kill_engine()
    reconcile()
    run(switch_request(profile=simulated_profile("other", tp=2), actor=actor_of(alice)))
    RestartPolicy.objects.update(backoff_seconds=0)
    reconcile()
    assert run(restart()).state == JobState.SUCCEEDED
    assert serving() == ["coder", "other"]


def test_a_cancelled_restart_is_not_tried_again(coder: Profile, alice: Any) -> None:
    kill_engine()
    reconcile()
    job_cancel(restart(), actor=actor_of(alice))
    reconcile()
    assert not Job.objects.filter(state__in=LIVE_STATES).exists()
    assert not Route.objects.exists()


def test_one_that_waits_for_its_restart_can_be_stopped(coder: Profile, alice: Any) -> None:
    RestartPolicy.objects.update(backoff_seconds=1000)
    kill_engine()
    reconcile()
    assert run(restart()).state == JobState.SUCCEEDED
    kill_engine()
    reconcile()  # waits for a quarter of an hour
    assert not Job.objects.filter(state__in=LIVE_STATES).exists()
    died = Deployment.objects.filter(status=Status.FAILED, desired="serving").get()
    assert run(stop_request(deployment=died, actor=actor_of(alice))).state == JobState.SUCCEEDED
    RestartPolicy.objects.update(backoff_seconds=0)
    reconcile()
    assert not Job.objects.filter(state__in=LIVE_STATES).exists()


SURVIVED = "Processes 4711 of launch d1-r0 survived every signal, SIGKILL included."


@pytest.fixture
def stuck(sim_rig: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """While it is on, what is left of an engine survives everything, as in a driver that hangs; ``tried`` counts."""
    monkeypatch.setattr(reconcile_module, "_not_before", {})
    really = launching.runner().stop

    class Stuck:
        on, tried = True, 0

        def stop(self, handle: Handle) -> Observation:
            self.tried += 1
            if self.on:
                raise RunnerError(SURVIVED)
            return really(handle)

    found = Stuck()
    monkeypatch.setattr(launching.runner(), "stop", found.stop)
    yield found
    found.on = False


def test_what_survives_being_killed_stops_with_a_sentence_and_is_tried_again_after_a_while(
    coder: Profile, stuck: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_engine()
    for _ in range(3):
        reconcile()
    died = Deployment.objects.get()
    assert (died.status, died.desired) == (Status.STOPPING, "serving")
    assert died.status_reason == f"Coder was killed by signal 9 while it served. {SURVIVED}"
    assert (died.evidence or {})["exit_code"] == -9
    assert GpuReservation.objects.filter(released_at=None).count() == 2  # who knows what it still holds
    assert not Route.objects.exists()
    assert stuck.tried == 1
    monkeypatch.setattr(reconcile_module, "AGAIN_SECONDS", 0.0)
    reconcile_module._not_before.clear()
    for _ in range(2):
        reconcile()
    assert stuck.tried == 3
    stuck.on = False
    reconcile()
    died.refresh_from_db()
    assert (died.status, died.status_reason) == (Status.FAILED, "Coder was killed by signal 9 while it served.")
    assert AuditEntry.objects.filter(action="deployment.lost").count() == 1
    reconcile()
    assert run(restart()).state == JobState.SUCCEEDED
    assert serving() == ["coder"]


def test_what_is_left_half_way_and_survives_being_killed_says_so_too(coder: Profile, stuck: Any) -> None:
    Deployment.objects.update(status=Status.LOADING)  # as rows restored from a backup may say
    for _ in range(3):
        reconcile()
    left = Deployment.objects.get()
    assert left.status == Status.STOPPING
    assert left.status_reason == f"It was left half-way by a job that has ended. {SURVIVED}"
    assert stuck.tried == 1
    reconcile_module._not_before.clear()
    stuck.on = False
    reconcile()
    left.refresh_from_db()
    assert left.status == Status.FAILED
    assert left.status_reason == "It was left half-way by a job that has ended. Its engine was stopped."


def test_while_one_is_being_ended_the_next_tick_leaves_it_alone_and_looks_at_the_others(
    coder: Profile, stuck: Any, alice: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its ladder of signals takes half a minute, in which fifteen ticks come."""
    run(switch_request(profile=simulated_profile("other", tp=2), actor=actor_of(alice)))
    kill_engine()
    kill_engine("other")
    stuck.on = False
    slow, seen = stuck.stop, list[tuple[str, str]]()

    def stop(handle: Handle) -> Observation:
        if stuck.tried == 0:
            stuck.tried = 1
            reconcile()
            seen.extend(Deployment.objects.order_by("served_name").values_list("served_name", "status"))
        return slow(handle)

    monkeypatch.setattr(launching.runner(), "stop", stop)
    reconcile()
    assert sorted(seen) in (
        [("coder", "ready"), ("other", "failed")],
        [("coder", "failed"), ("other", "ready")],
    )
    assert stuck.tried == 3  # the first, the other in between, and the first goes on
    assert set(Deployment.objects.values_list("status", flat=True)) == {"failed"}


def test_a_frozen_engine_is_found_out_by_probes_and_started_again(coder: Profile) -> None:
    RestartPolicy.objects.update(probe_every_seconds=0.05, probe_limit_seconds=0.5, probe_failures=2)
    everybody = all_processes()
    frozen = engine_pids()
    for pid in frozen:
        send_signal(everybody[pid], signal.SIGSTOP)

    def noticed() -> bool:
        reconcile()
        return Deployment.objects.filter(status=Status.FAILED).exists()

    eventually(noticed, "the hanging engine is given up")
    died = Deployment.objects.get(status=Status.FAILED)
    assert "hangs: 2 test requests in a row got no answer" in died.status_reason
    assert not frozen & engine_pids()
    RestartPolicy.objects.update(probe_every_seconds=0)
    assert run(restart()).state == JobState.SUCCEEDED
    assert serving() == ["coder"]


def test_a_healthy_engine_is_left_alone_by_probes(coder: Profile) -> None:
    RestartPolicy.objects.update(probe_every_seconds=0.01, probe_limit_seconds=20, probe_failures=1)
    replica = Deployment.objects.get().replicas.get()
    reconcile()
    eventually(lambda: reconcile() or probing._known[probing._key(replica)].next_at > 0, "a probe came back")
    assert Deployment.objects.get().status == Status.READY


def test_a_full_llama_cpp_in_the_middle_of_long_answers_is_not_asked_and_does_not_hang(
    coder: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counts an answer's tokens when that has ended: with every slot busy for minutes, a test request waits and the
    count of tokens stands still, while it is at work."""
    RestartPolicy.objects.update(probe_every_seconds=0.01, probe_failures=1)
    replica = Deployment.objects.get().replicas.get()
    steps = itertools.count(100)
    asked: list[str] = []

    def metrics(*_: Any, **__: Any) -> tuple[int, str]:
        text = "llamacpp:tokens_predicted_total 0\nllamacpp:requests_processing 1\nllamacpp:n_decode_total "
        return 200, f"{text}{next(steps)}\n"

    monkeypatch.setattr(probing, "ask", metrics)
    monkeypatch.setattr(probing, "one_token", lambda *_, **__: asked.append("") or (200, ""))
    policy = RestartPolicy.objects.get()

    def looked(times: int) -> bool:
        assert probing.probe(replica, "coder", LlamaCppAdapter(), policy) == 0
        return next(copy(steps)) >= 100 + times

    eventually(lambda: looked(1), "a first look")  # has nothing to compare with
    eventually(lambda: looked(4), "more looks")
    assert len(asked) <= 1


def test_a_member_that_is_gone_is_asked_after_at_once_and_forgotten_when_the_engine_answers(coder: Profile) -> None:
    RestartPolicy.objects.update(probe_every_seconds=1000, probe_limit_seconds=20)
    replica = Deployment.objects.get().replicas.get()
    honest = list(replica.members)
    assert honest
    replica.members = [*honest, [2**22 - 3, "tgone-1"]]
    replica.save()

    def forgotten() -> bool:
        reconcile()
        replica.refresh_from_db()
        return replica.members == honest

    eventually(forgotten, "the engine answered, so whoever is there is the whole engine")
    assert Deployment.objects.get().status == Status.READY


def test_an_engine_that_lost_a_member_and_does_not_answer_is_half_dead(
    coder: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    RestartPolicy.objects.update(probe_every_seconds=1000, probe_limit_seconds=20)
    replica = Deployment.objects.get().replicas.get()
    replica.members = [*replica.members, [2**22 - 3, "tgone-1"]]
    replica.save()
    monkeypatch.setattr(probing, "one_token", lambda *_, **__: (None, "timed out"))

    def noticed() -> bool:
        reconcile()
        return Deployment.objects.filter(status=Status.FAILED).exists()

    eventually(noticed, "the half dead engine is given up")
    assert "half dead" in Deployment.objects.get(status=Status.FAILED).status_reason


def test_a_process_of_a_stranger_on_a_card_is_named_and_left_alone(sim_rig: Any, alice: Any) -> None:
    """The simulated cards take a hold from anybody, as real ones do."""
    rig = sim_rig
    job = run(switch_request(profile=simulated_profile("coder", tp=2), actor=actor_of(alice)))
    assert job.state == JobState.SUCCEEDED
    assert find_strays(rig) == []
    deployment = Deployment.objects.get()
    # The panel forgets an engine, as after a backup was restored.
    deployment.replicas.update(released_at=timezone.now())
    found = find_strays(rig)
    pids = engine_pids()
    assert {s.pid for s in found} <= pids
    assert found
    assert all(s.kind == "stray engine" and s.gpus == (0, 1) for s in found if s.gpus)
    assert any("apps.engines.simulated.server" in s.command and s.user for s in found)
    reconcile()
    assert engine_pids() == pids


def test_other_peoples_secrets_are_not_shown() -> None:
    argv = ["python", "serve.py", "--api-key", "sk-1", "--port", "8000", "--hf-token=hf_1", "DB_PASSWORD=x"]
    shown = without_secrets(argv)
    assert shown == ["python", "serve.py", "--api-key", "…", "--port", "8000", "--hf-token=…", "DB_PASSWORD=…"]
    assert without_secrets(["vllm", "serve", "--api-key", "k1", "k2", "--port", "1"])[2:] == [
        *("--api-key", "…", "…"),
        *("--port", "1"),
    ]
    assert without_secrets(["sh", "-c", "vllm serve --api-key k1 --port 1"])[2] == "vllm serve --api-key … --port 1"
    assert without_secrets(["curl", "-H", "Authorization: Bearer k1"])[2] == "Authorization: Bearer …"
    assert without_secrets(["run", "hf_abcdefghijkl"]) == ["run", "…"]
