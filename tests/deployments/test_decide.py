"""Every combination of what was asked and what is seen, and what is to be done about it."""

from __future__ import annotations

import itertools
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from apps.deployments.decide import Act, Observation, Policy, ReplicaSeen, decide
from apps.deployments.models import Desired, Status
from apps.runners.protocol import ProcessState

NOW = datetime(2026, 3, 29, 2, 30, tzinfo=UTC)
POLICY = Policy(restarts=3, window_seconds=600, backoff_seconds=10, probe_failures=3)
RUNS = ReplicaSeen(0, ProcessState.RUNNING)
REPLICAS = {
    "none": (),
    "well": (RUNS,),
    "slow once": (ReplicaSeen(0, ProcessState.RUNNING, probes_failed=1),),
    "member gone": (ReplicaSeen(0, ProcessState.RUNNING, members_gone=True),),
    "half dead": (ReplicaSeen(0, ProcessState.RUNNING, members_gone=True, probes_failed=1),),
    "hangs": (ReplicaSeen(0, ProcessState.RUNNING, probes_failed=3),),
    "exited": (ReplicaSeen(0, ProcessState.EXITED, exit_code=1),),
    "lost": (ReplicaSeen(0, ProcessState.LOST),),
    "one of two": (RUNS, ReplicaSeen(1, ProcessState.EXITED, exit_code=-9)),
    "one of two, told": (RUNS, ReplicaSeen(1, ProcessState.EXITED, healthy=False, exit_code=-9)),
    "one of two hangs": (RUNS, ReplicaSeen(1, ProcessState.RUNNING, probes_failed=3)),
    "both": (ReplicaSeen(0, ProcessState.RUNNING, probes_failed=4), ReplicaSeen(1, ProcessState.EXITED, exit_code=1)),
}
ALL_DEAD = {"half dead", "hangs", "exited", "lost", "both"}
PARTLY = {"one of two", "one of two hangs"}
WATCHED = {Status.READY, Status.DEGRADED, Status.SLEEPING}
ENDED = {Status.STOPPED, Status.FAILED}


@pytest.mark.parametrize("hindered", ["", "GPU 1 was stopped for heat"])
@pytest.mark.parametrize("busy", [False, True])
@pytest.mark.parametrize("replicas", REPLICAS)
@pytest.mark.parametrize(("desired", "status"), list(itertools.product(Desired, Status)))
def test_every_combination(desired: Desired, status: Status, replicas: str, busy: bool, hindered: str) -> None:
    seen = Observation(replicas=REPLICAS[replicas], busy=busy, ended_at=NOW, hindered=hindered)
    found = decide(desired, status, seen, POLICY, NOW)
    if status in WATCHED:
        # Whatever was asked: an engine that died is told, and a job that is stopping it finds it gone.
        if replicas in ALL_DEAD or (status == Status.SLEEPING and replicas.startswith("one of two")):
            expected = Act.LOSE
        elif replicas in PARTLY or (replicas == "one of two, told" and status == Status.READY):
            expected = Act.DEGRADE
        elif replicas == "one of two, told" and (status, desired, busy) == (Status.DEGRADED, Desired.SERVING, False):
            expected = Act.RENEW
        else:
            expected = Act.LEAVE
    elif status in ENDED:
        wanted = status == Status.FAILED and desired == Desired.SERVING
        expected = (Act.WAIT if hindered else Act.RESTART) if wanted and not busy else Act.LEAVE
    else:
        expected = Act.LEAVE if busy else Act.END
    assert found.act == expected
    assert bool(found.why) == (found.act != Act.LEAVE)


@pytest.mark.parametrize(
    ("replicas", "words"),
    [
        ("exited", "ended by itself with exit code 1"),
        ("lost", "gone without a trace"),
        ("hangs", "3 test requests in a row"),
        ("half dead", "a process of it is gone"),
        ("one of two", "killed by signal 9"),
        ("both", "ended by itself with exit code 1"),  # the exit code tells more than the silence
    ],
)
def test_it_says_what_was_seen(replicas: str, words: str) -> None:
    found = decide(Desired.SERVING, Status.READY, Observation(replicas=REPLICAS[replicas]), POLICY, NOW)
    assert words in found.why
    assert found.replicas


def ago(*seconds: float) -> tuple[datetime, ...]:
    return tuple(NOW - timedelta(seconds=s) for s in seconds)


@pytest.mark.parametrize(
    ("what", "seen", "policy", "act"),
    [
        ("the first restart comes at once", Observation(ended_at=NOW), POLICY, Act.RESTART),
        ("the second waits", Observation(ended_at=NOW, restarts=ago(30)), POLICY, Act.WAIT),
        ("until the backoff is over", Observation(ended_at=ago(10.1)[0], restarts=ago(30)), POLICY, Act.RESTART),
        ("the third twice as long", Observation(ended_at=ago(10.1)[0], restarts=ago(30, 60)), POLICY, Act.WAIT),
        ("then it is enough", Observation(ended_at=ago(90)[0], restarts=ago(100, 200, 300)), POLICY, Act.GIVE_UP),
        ("what is long ago is forgotten", Observation(ended_at=NOW, restarts=ago(700, 800, 900)), POLICY, Act.RESTART),
        ("a clock set back opens no budget", Observation(ended_at=NOW, restarts=ago(-9, -8, -7)), POLICY, Act.GIVE_UP),
        ("nor makes it wait for hours", Observation(ended_at=ago(-3600)[0], restarts=ago(-3600)), POLICY, Act.RESTART),
        ("off is off", Observation(ended_at=NOW), Policy(restarts=0), Act.DROP),
        ("replaced is over", Observation(ended_at=NOW, replaced=True), POLICY, Act.DROP),
        ("replaced is over, busy or not", Observation(ended_at=NOW, replaced=True, busy=True), POLICY, Act.DROP),
        ("archived is over, busy or not", Observation(ended_at=NOW, archived=True, busy=True), POLICY, Act.GIVE_UP),
        ("no end on record", Observation(), POLICY, Act.RESTART),
        ("another was asked for since", Observation(instead="Other", hindered="Other runs"), POLICY, Act.GIVE_UP),
        ("not while a job moves engines", Observation(instead="Other", busy=True), POLICY, Act.LEAVE),
    ],
)
def test_restarts(what: str, seen: Observation, policy: Policy, act: Act) -> None:
    found = decide(Desired.SERVING, Status.FAILED, seen, policy, NOW)
    assert found.act == act, what
    if act == Act.WAIT:
        assert found.at is not None
        assert found.at > NOW


@pytest.mark.parametrize("tries", [ago(), ago(30), ago(30, 60)])
def test_what_is_hindered_waits_for_as_long_as_it_takes(tries: tuple[datetime, ...]) -> None:
    """It is not tried, so its budget stays whole, and nobody can say when it begins."""
    seen = Observation(ended_at=ago(90000)[0], restarts=tries, hindered="Other runs in its place")
    found = decide(Desired.SERVING, Status.FAILED, seen, POLICY, NOW)
    assert (found.act, found.at) == (Act.WAIT, None)
    assert found.why == f"restart {len(tries) + 1} of 3 waits: Other runs in its place"


AWAY = ReplicaSeen(1, ProcessState.EXITED, healthy=False, exit_code=-9, tried_at=NOW)


@pytest.mark.parametrize(
    ("what", "replica", "act"),
    [
        ("the first restart comes at once", AWAY, Act.RENEW),
        ("also of one that runs and that nobody looks after", replace(AWAY, state=ProcessState.RUNNING), Act.RENEW),
        ("the second waits", replace(AWAY, restarts=ago(30)), Act.WAIT),
        ("until the backoff is over", replace(AWAY, restarts=ago(30), tried_at=ago(10.1)[0]), Act.RENEW),
        ("a clock set back does not make it wait for hours", replace(AWAY, tried_at=ago(-3600)[0]), Act.RENEW),
        ("then it is enough for a while", replace(AWAY, restarts=ago(100, 200, 300)), Act.GIVE_UP),
        ("what is long ago is forgotten", replace(AWAY, restarts=ago(700, 800, 900)), Act.RENEW),
        ("somebody cancelled it", replace(AWAY, restarts=ago(30), cancelled="alice"), Act.GIVE_UP),
        ("long ago", replace(AWAY, tried_at=ago(700)[0], cancelled="alice"), Act.RENEW),
        ("its card pauses", replace(AWAY, paused="GPU 1 was stopped for heat"), Act.WAIT),
    ],
)
def test_restarts_of_one_replica(what: str, replica: ReplicaSeen, act: Act) -> None:
    found = decide(Desired.SERVING, Status.DEGRADED, Observation(replicas=(RUNS, replica)), POLICY, NOW)
    assert (found.act, found.replicas) == (act, (1,)), what
    if act == Act.GIVE_UP:
        assert found.at is not None
        assert found.at > NOW


def test_one_that_waits_does_not_keep_another_back() -> None:
    waits, due = replace(AWAY, restarts=ago(30)), replace(AWAY, index=2)
    found = decide(Desired.SERVING, Status.DEGRADED, Observation(replicas=(RUNS, waits, due)), POLICY, NOW)
    assert (found.act, found.replicas) == (Act.RENEW, (2,))


@pytest.mark.parametrize(
    ("what", "seen", "policy"),
    [
        ("restarts are off", Observation(replicas=(RUNS, AWAY)), replace(POLICY, restarts=0)),
        ("a job moves engines", Observation(replicas=(RUNS, AWAY), busy=True), POLICY),
        ("the engine does it itself", Observation(replicas=(RUNS, AWAY), looks_after_itself=True), POLICY),
        ("nobody is away", Observation(replicas=(RUNS,)), POLICY),
    ],
)
def test_no_replica_is_started_again_while(what: str, seen: Observation, policy: Policy) -> None:
    assert decide(Desired.SERVING, Status.DEGRADED, seen, policy, NOW).act == Act.LEAVE, what


def test_with_the_last_that_serves_gone_one_that_comes_up_is_waited_for() -> None:
    died, coming = replace(AWAY, healthy=True), replace(RUNS, healthy=False)
    seen = Observation(replicas=(coming, died), busy=True)
    assert decide(Desired.SERVING, Status.DEGRADED, seen, POLICY, NOW).act == Act.LOSE
    seen = replace(seen, renewing=True)
    assert decide(Desired.SERVING, Status.DEGRADED, seen, POLICY, NOW).act == Act.DEGRADE


def test_ready_is_what_gets_requests_on_every_replica() -> None:
    """A switch that was given up let it serve on, and did not know that one of them was away."""
    seen = Observation(replicas=(RUNS, replace(RUNS, index=1, healthy=False)))
    found = decide(Desired.SERVING, Status.READY, seen, POLICY, NOW)
    assert (found.act, found.replicas) == (Act.DEGRADE, (1,))
    told = replace(seen, looks_after_itself=True)
    assert decide(Desired.SERVING, Status.READY, told, POLICY, NOW).act == Act.LEAVE


def test_without_probes_nothing_hangs() -> None:
    seen = Observation(replicas=REPLICAS["hangs"])
    assert decide(Desired.SERVING, Status.READY, seen, Policy(probe_failures=0), NOW).act == Act.LEAVE
