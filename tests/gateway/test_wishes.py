"""Models that are asked for and not loaded: with the simulated engine, real switches and a worker."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from datetime import time, timedelta
from pathlib import Path
from typing import Any

import pytest
from django.db import connections
from django.utils import timezone

from apps.accounts.services import key_create, user_update
from apps.audit.models import AuditEntry
from apps.catalog.models import Weights
from apps.common.actors import PANEL, actor_of
from apps.common.roles import Role
from apps.deployments import launching, routes
from apps.deployments.models import Deployment, Desired, RestartPolicy, Status
from apps.deployments.policies.models import Pin, RigPolicy
from apps.deployments.policies.services import loading_set, slot_create
from apps.deployments.reconcile import reconcile
from apps.deployments.services import switch_request
from apps.gateway import wishes
from apps.gateway.menu import menu_read
from apps.gateway.wishes import Wish, granted
from apps.installs.models import EngineInstall
from apps.jobs.models import LIVE_STATES, Job, JobState
from apps.jobs.runner import job_claim
from apps.runners.protocol import ProcessState
from tests.deployments.conftest import sim_rig  # noqa: F401 - a fixture
from tests.factories.profiles import add_version, llama_cpp_profile, simulated_profile
from tests.gateway.helpers import LoopThread, chat, until
from tests.gateway.test_identity import slowly
from tests.gateway.test_models import states

pytestmark = pytest.mark.django_db(transaction=True)
CHAT = "/v1/chat/completions"


def run_queued() -> bool:
    """Runs the oldest waiting job here and now, as a worker would."""
    for job in Job.objects.filter(state=JobState.QUEUED).order_by("pk"):
        context = job_claim(job.pk)
        if context is not None:
            context.run()
            return True
    return False


@pytest.fixture
def worker(sim_rig: Any) -> Iterator[None]:  # noqa: F811
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            if not run_queued():
                stop.wait(0.05)
        connections.close_all()

    thread = threading.Thread(target=work)
    thread.start()
    yield
    stop.set()
    thread.join(60)


@pytest.fixture
def house(sim_rig: Any, loop_thread: LoopThread) -> Any:  # noqa: F811 - ``within`` wants one; engines are real here
    return sim_rig


@pytest.fixture
def key(bob: Any) -> str:
    return key_create(bob, name="laptop", actor=actor_of(bob))[1]


def test_a_request_loads_a_model_that_is_marked_for_members(
    worker: None, within: Callable[..., Any], key: str, bob: Any
) -> None:
    simulated_profile("coder", members_may_switch=True)
    gateway = within(comment_after_s=0.05, comment_every_s=0.1)
    assert states(gateway, key) == {"coder": "unloaded"}

    answer = gateway.ask("POST", CHAT, chat("coder", stream=True, max_tokens=3), key=key)

    assert answer.status == 200
    assert b": waiting for coder" in answer.body
    assert b"[DONE]" in answer.body
    job = Job.objects.get()
    assert (job.kind, job.user, job.reason) == ("switch", bob, wishes.REASON)
    assert states(gateway, key) == {"coder": "loaded"}


def test_a_request_for_a_model_in_its_restart_backoff_waits_and_is_answered(
    worker: None, within: Callable[..., Any], key: str, alice: Any
) -> None:
    profile = simulated_profile("coder")
    RestartPolicy.objects.create(profile=profile, restarts=3, backoff_seconds=2.0, probe_every_seconds=0.0)
    first = switch_request(profile=profile, actor=actor_of(alice))
    until(lambda: Job.objects.get(pk=first.pk).state == JobState.SUCCEEDED, "the model did not come up")

    def dies() -> None:
        replica = Deployment.objects.get(status=Status.READY).replicas.get()
        for pid in launching.observe(replica).pids:
            os.kill(pid, signal.SIGKILL)
        until(lambda: launching.observe(replica).state == ProcessState.EXITED, "the engine is gone")
        reconcile()

    dies()
    until(lambda: Deployment.objects.filter(status=Status.READY).exists(), "it was not started again")
    until(lambda: not Job.objects.filter(state__in=LIVE_STATES).exists(), "the restart did not end")
    dies()
    assert not Job.objects.filter(state__in=LIVE_STATES).exists()  # the second restart waits
    gateway = within(comment_after_s=0.05, comment_every_s=0.1)
    done = threading.Event()

    def ticks() -> None:
        while not done.wait(0.2):
            reconcile()
        connections.close_all()

    thread = threading.Thread(target=ticks)
    thread.start()
    try:
        answer = gateway.ask("POST", CHAT, chat("coder", stream=True, max_tokens=3), key=key)
    finally:
        done.set()
        thread.join(60)
    assert answer.status == 200
    assert b": waiting for coder, about" in answer.body
    assert b"[DONE]" in answer.body


def test_many_who_want_the_same_cause_one_switch(
    worker: None, within: Callable[..., Any], loop_thread: LoopThread, key: str, alice: Any
) -> None:
    simulated_profile("coder", members_may_switch=True)
    _, alices = key_create(alice, name="laptop", actor=PANEL)
    gateway = within()
    statuses: list[int] = []

    def ask(token: str) -> None:
        statuses.append(gateway.ask("POST", CHAT, chat("coder", max_tokens=2), key=token).status)

    threads = [threading.Thread(target=ask, args=(token,)) for token in (key, alices) * 8]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert statuses == [200] * 16
    assert Job.objects.count() == 1


def test_what_is_not_marked_is_not_loaded_by_a_request(
    sim_rig: Any,  # noqa: F811
    within: Callable[..., Any],
    key: str,
    alice: Any,
) -> None:
    simulated_profile("coder")
    _, alices = key_create(alice, name="laptop", actor=PANEL)
    gateway = within()
    for token in (key, alices):
        answer = gateway.ask("POST", CHAT, chat("coder"), key=token)
        assert (answer.status, answer.error["code"]) == (403, "model_not_loaded")
        assert "not marked" in answer.error["message"]
    unknown = gateway.ask("POST", CHAT, chat("nothing"), key=alices)
    assert (unknown.status, unknown.error["code"]) == (404, "model_not_found")
    assert "Available: coder" in unknown.error["message"]
    assert Job.objects.count() == 0


@pytest.mark.parametrize(
    ("by", "marked", "least"),
    [
        ("members", False, "member"),
        ("operators", False, "operator"),
        ("operators", True, "operator"),
        ("nobody", True, None),
        ("marked", True, "member"),
        ("marked", False, None),
    ],
)
def test_a_profile_says_whose_requests_may_load_it(
    sim_rig: Any,  # noqa: F811
    olivia: Any,
    bob: Any,
    by: str,
    marked: bool,
    least: str | None,
) -> None:
    profile = simulated_profile("coder", members_may_switch=marked)
    loading_set(profile=profile, actor=actor_of(olivia), by=by)
    of_bob, of_olivia = Wish("coder", bob.pk), Wish("coder", olivia.pk)
    assert granted(of_bob).forbidden is (least != "member")
    assert granted(of_olivia).forbidden is (least is None)
    if least == "operator":
        Job.objects.all().delete()
        assert "Only operators' requests may load it" in granted(of_bob).refused
    Job.objects.all().delete()
    pressed = granted(Wish("coder", bob.pk, explicit=True))
    assert pressed.forbidden is not (marked or least == "member"), "who may switch may press load, too"
    offered = menu_read().offer("coder", Role.MEMBER)
    assert (offered is not None) is (marked or least == "member")


def test_a_request_does_not_take_the_hours_that_the_calendar_gives_to_somebody_else(
    sim_rig: Any,  # noqa: F811
    alice: Any,
    bob: Any,
) -> None:
    simulated_profile("coder", members_may_switch=True)
    lesson = simulated_profile("lesson")
    switch_request(profile=lesson, actor=actor_of(alice), rig=sim_rig)
    assert run_queued()
    RigPolicy.objects.create(rig=sim_rig, minimum_residency_seconds=0)
    slot_create(rig=sim_rig, profile=lesson, actor=actor_of(alice), days=range(7), begin=time(0), end=time(0))
    refused = granted(Wish("coder", bob.pk)).refused
    assert "the calendar gives these hours to Lesson, until" in refused
    assert granted(Wish("coder", bob.pk, explicit=True)).job_id, "a person who presses load may"


def test_what_an_operator_clicked_a_moment_ago_is_waited_for_though_no_request_may_load_it(
    sim_rig: Any,  # noqa: F811
    bob: Any,
    olivia: Any,
) -> None:
    profile = simulated_profile("coder")  # not marked for members
    wish = Wish("coder", bob.pk)
    assert granted(wish).forbidden
    job = switch_request(profile=profile, actor=actor_of(olivia))  # queued: its route is not held yet
    assert granted(wish) == wishes.Answer(job_id=job.pk, eta_at=job.eta_at)
    assert Job.objects.count() == 1


def test_a_model_that_does_not_come_up_is_not_tried_again_and_again(
    worker: None, within: Callable[..., Any], key: str
) -> None:
    simulated_profile("broken", members_may_switch=True, fail_phase="weights")
    gateway = within()
    answer = gateway.ask("POST", CHAT, chat("broken"), key=key)
    assert (answer.status, answer.error["code"]) == (503, "model_not_loaded")
    assert "The last try to load it ended so" in answer.error["message"]
    assert int(answer.headers["retry-after"]) > 30
    assert gateway.ask("POST", CHAT, chat("broken"), key=key).status == 503
    assert Job.objects.count() == 1


def test_what_failed_a_moment_ago_is_tried_again_once_what_it_missed_has_come(sim_rig: Any, bob: Any) -> None:  # noqa: F811
    profile = simulated_profile("coder", members_may_switch=True, fail_phase="weights")
    wish = Wish("coder", bob.pk)
    assert granted(wish).job_id
    assert run_queued()
    assert "The last try to load it ended so" in granted(wish).refused
    install = Job.objects.create(
        kind="install", title="Install", rig_name=sim_rig.slug, queue="q", user_name="a", state=JobState.RUNNING
    )
    assert granted(wish).refused, "it has not ended yet"
    Job.objects.filter(pk=install.pk).update(state=JobState.SUCCEEDED, finished_at=timezone.now())
    assert granted(wish).job_id
    assert run_queued()
    assert granted(wish).refused
    add_version(profile, tp=4, replicas=1, model=profile.current.model)
    assert granted(wish).job_id, "what failed was another version"


def test_a_failure_before_the_clock_was_set_back_keeps_nobody_for_hours(sim_rig: Any, bob: Any) -> None:  # noqa: F811
    simulated_profile("coder", members_may_switch=True, fail_phase="weights")
    wish = Wish("coder", bob.pk)
    assert granted(wish).job_id
    assert run_queued()
    assert granted(wish).refused
    Job.objects.update(finished_at=timezone.now() + timedelta(hours=2))
    assert granted(wish).job_id


def test_what_has_just_been_installed_is_on_the_menu_at_once(sim_rig: Any, tmp_path: Path) -> None:  # noqa: F811
    profile = llama_cpp_profile("tiny")
    assert menu_read().offer("tiny", Role.OPERATOR) is None
    EngineInstall.objects.create(rig_name=sim_rig.slug, engine="llama_cpp", name="starter", state="ready")
    weights = tmp_path / "tiny.gguf"
    weights.touch()
    Weights.objects.create(model=profile.current.model, rig_name=sim_rig.slug, path=str(weights))
    assert menu_read().offer("tiny", Role.OPERATOR) is not None


def test_a_guest_behind_open_webuis_key_switches_in_their_own_name_and_passes_over_no_pin(
    sim_rig: Any,  # noqa: F811
    alice: Any,
) -> None:
    coder, other = simulated_profile("coder", members_may_switch=True), simulated_profile("other")
    switch_request(profile=other, actor=actor_of(alice), rig=sim_rig)
    assert run_queued()
    RigPolicy.objects.create(rig=sim_rig, minimum_residency_seconds=0)
    pin = Pin.objects.create(
        rig=sim_rig, profile=other, until=timezone.now() + timedelta(hours=1), user_pk=alice.pk, user_name="alice"
    )
    for explicit in (False, True):
        wish = Wish("coder", alice.pk, explicit=explicit, guest="dora@lab.example")
        assert "pinned by alice" in granted(wish).refused, "the owner of the key may, its guests may not"
    pin.delete()
    hers = granted(Wish("coder", alice.pk, guest="dora@lab.example"))
    job = Job.objects.get(pk=hers.job_id)
    assert (job.profile_slug, job.user, job.user_name) == (coder.slug, None, "dora@lab.example (Open WebUI)")
    assert AuditEntry.objects.filter(actor_name="dora@lab.example (Open WebUI)").exists()


def test_a_wish_supersedes_nothing(sim_rig: Any, alice: Any, bob: Any) -> None:  # noqa: F811
    first, second = (simulated_profile(slug, members_may_switch=True) for slug in ("first", "second"))
    job = switch_request(profile=first, actor=actor_of(alice))
    answer = granted(Wish("second", bob.pk))
    assert (answer.refused, answer.job_id) == ("", None)
    assert "Switch to First is under way" in answer.waits
    assert granted(Wish("first", bob.pk)).job_id == job.pk  # that is what is wanted
    assert run_queued()
    job.refresh_from_db()
    assert job.state == JobState.SUCCEEDED
    assert "each model stays at least" in granted(Wish("second", bob.pk)).waits
    RigPolicy.objects.update_or_create(rig=sim_rig, defaults={"minimum_residency_seconds": 0})
    pin = Pin.objects.create(
        rig=sim_rig, profile=first, user_pk=alice.pk, user_name="alice", until=timezone.now() + timedelta(hours=1)
    )
    assert "pinned by alice" in granted(Wish("second", bob.pk)).refused
    pin.delete()
    assert granted(Wish("second", bob.pk)).job_id is not None
    assert second.slug == "second"


def test_past_the_limit_who_waits_is_told_when(
    sim_rig: Any,  # noqa: F811
    within: Callable[..., Any],
    key: str,
) -> None:
    simulated_profile("coder", members_may_switch=True)
    gateway = within(wait_s=0.5)  # nobody runs the job
    answer = gateway.ask("POST", CHAT, chat("coder"), key=key)
    assert (answer.status, answer.error["code"]) == (503, "model_loading")
    assert int(answer.headers["retry-after"]) > 0


def test_open_webuis_buttons_load_and_unload(worker: None, within: Callable[..., Any], key: str, alice: Any) -> None:
    simulated_profile("coder")
    _, alices = key_create(alice, name="laptop", actor=PANEL)
    gateway = within()
    refused = gateway.ask("POST", "/models/load", {"model": "coder"}, key=key)
    assert refused.status == 403
    loaded = gateway.ask("POST", "/models/load", {"model": "coder"}, key=alices)
    assert (loaded.status, loaded.json) == (200, {"success": True})
    until(lambda: states(gateway, key).get("coder") == "loaded", "it was not loaded")
    again = gateway.ask("POST", "/models/load", {"model": "coder"}, key=alices)
    assert (again.status, again.error["code"]) == (400, "already_running")
    assert gateway.ask("POST", "/models/unload", {"model": "coder"}, key=key).status == 403
    assert gateway.ask("POST", "/models/unload", {"model": "coder"}, key=alices).json == {"success": True}
    until(lambda: Deployment.objects.get().status == Status.STOPPED, "it was not stopped")
    until(lambda: states(gateway, alices).get("coder") == "unloaded", "it was not unloaded")
    assert gateway.ask("POST", "/models/unload", {"model": "coder"}, key=alices).status == 400
    assert gateway.ask("POST", "/models/load", {"model": "nothing"}, key=alices).status == 404


@pytest.fixture
def olivias(olivia: Any) -> str:
    return key_create(olivia, name="laptop", actor=PANEL)[1]


def demoted(person: Any) -> None:
    """Only the database knows of it."""
    user_update(person, actor=PANEL, role=Role.MEMBER)


@pytest.mark.parametrize(("path", "why"), [(CHAT, "Only operators' requests"), ("/models/load", "not marked")])
def test_an_operator_who_is_demoted_while_the_body_comes_loads_nothing(
    sim_rig: Any,  # noqa: F811
    within: Callable[..., Any],
    alice: Any,
    olivia: Any,
    olivias: str,
    path: str,
    why: str,
) -> None:
    loading_set(profile=simulated_profile("coder"), actor=actor_of(alice), by="operators")
    gateway = within(poll_s=3600.0)  # it does not hear of it before the switch would be asked for
    answer = slowly(gateway, olivias, lambda: demoted(olivia), path=path)
    assert b"HTTP/1.1 403" in answer
    assert why.encode() in answer
    assert Job.objects.count() == 0


def test_an_operator_who_is_demoted_while_the_body_comes_stops_nothing(
    worker: None, within: Callable[..., Any], alice: Any, olivia: Any, olivias: str
) -> None:
    switch_request(profile=simulated_profile("coder"), actor=actor_of(alice))
    until(lambda: Deployment.objects.filter(status=Status.READY).exists(), "it does not serve")
    gateway = within()

    def told() -> None:
        demoted(olivia)
        until(lambda: gateway.gateway.keys.lookup(olivias).role == Role.MEMBER, "the gateway was not told")

    answer = slowly(gateway, olivias, told, path="/models/unload")
    assert b"HTTP/1.1 403" in answer
    assert b"Only operators and owners may stop a model." in answer
    assert Job.objects.filter(kind="stop").count() == 0


def test_an_operator_who_is_demoted_while_a_request_waits_causes_no_switch(
    sim_rig: Any,  # noqa: F811
    within: Callable[..., Any],
    olivia: Any,
    olivias: str,
    alice: Any,
) -> None:
    RigPolicy.objects.create(rig=sim_rig, minimum_residency_seconds=0)
    loading_set(profile=simulated_profile("coder"), actor=actor_of(olivia), by="operators")
    switch_request(profile=simulated_profile("other"), actor=actor_of(alice))  # waits for a worker
    gateway = within()
    answers: list[Any] = []
    asking = threading.Thread(target=lambda: answers.append(gateway.ask("POST", CHAT, chat("coder"), key=olivias)))
    asking.start()
    wanted = gateway.gateway.wishes._wanted
    until(lambda: any(w.answer and w.answer.waits for w in list(wanted.values())), "the request does not wait")

    demoted(olivia)
    assert run_queued()
    asking.join(60)

    assert (answers[0].status, answers[0].error["code"]) == (403, "model_not_loaded")
    assert "Only operators' requests may load it" in answers[0].error["message"]
    assert [job.profile_slug for job in Job.objects.all()] == ["other"]


def waits_for_its_restart(rig: Any) -> Deployment:
    version = simulated_profile("coder").current
    return Deployment.objects.create(rig=rig, version=version, served_name="coder", status=Status.FAILED)


def test_what_died_is_loading_while_requests_wait_for_its_restart_and_unloaded_while_that_waits_for_a_card(
    sim_rig: Any,  # noqa: F811
) -> None:
    failed = waits_for_its_restart(sim_rig)
    dozer = simulated_profile("dozer").current
    asleep = Deployment.objects.create(rig=sim_rig, version=dozer, served_name="dozer", status=Status.SLEEPING)
    routes.wait_for_restart(failed, None)
    menu = menu_read()
    assert (menu.state("coder"), menu.whatever_serves(), menu.names(Role.MEMBER)) == (
        "loading", "coder", ["coder", "dozer"],
    )  # fmt: skip
    routes.end_wait_for_restart(failed)
    menu = menu_read()
    assert (menu.state("coder"), menu.whatever_serves(), menu.names(Role.MEMBER)) == ("unloaded", "dozer", ["dozer"])
    asleep.delete()
    assert menu_read().whatever_serves() == "coder"  # better that a request is told what this waits for than nothing
    failed.delete()
    assert menu_read().whatever_serves() is None


def test_what_waits_for_a_card_can_be_loaded_and_unloaded(
    sim_rig: Any,  # noqa: F811
    within: Callable[..., Any],
    alice: Any,
) -> None:
    failed = waits_for_its_restart(sim_rig)
    token = key_create(alice, name="laptop", actor=PANEL)[1]
    gateway = within()
    assert states(gateway, token) == {"coder": "unloaded"}
    assert gateway.ask("POST", "/models/load", {"model": "coder"}, key=token).json == {"success": True}
    assert Job.objects.get(kind="switch").params["version_id"] == failed.version_id
    assert gateway.ask("POST", "/models/unload", {"model": "coder"}, key=token).json == {"success": True}
    assert Job.objects.get(kind="stop").params == {"deployment_id": failed.pk}


def test_unload_ends_what_waits_for_its_restart(sim_rig: Any, alice: Any) -> None:  # noqa: F811
    failed = waits_for_its_restart(sim_rig)
    wish = Wish("coder", alice.pk, explicit=True)
    Deployment.objects.update(desired=Desired.STOPPED)
    assert wishes.unloaded(wish).forbidden
    Deployment.objects.update(desired=Desired.SERVING)
    job = Job.objects.get(pk=wishes.unloaded(wish).job_id)
    assert (job.kind, job.params, job.user) == ("stop", {"deployment_id": failed.pk}, alice)
