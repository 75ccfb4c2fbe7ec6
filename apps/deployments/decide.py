"""What to do about one deployment, from what was asked and what is seen. Pure: no clock, no database, no process.

``reconcile`` gathers the observation and carries the decision out; every rule stands here, and every combination in a
table of its test.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from apps.deployments.models import COMING_UP, Desired, Status
from apps.runners.protocol import ProcessState

WATCHED = frozenset({Status.READY, Status.DEGRADED, Status.SLEEPING})
HALFWAY = COMING_UP | {Status.DRAINING, Status.STOPPING}


class Act(StrEnum):
    LEAVE = "leave"
    DEGRADE = "degrade"  # take the replicas named out of the traffic, serve on with the others
    LOSE = "lose"  # nothing of it answers any more: stop what is left of it, note the evidence, failed
    END = "end"  # left half-way by a job that has ended: stop it
    RESTART = "restart"
    RENEW = "renew"  # start one replica again while the others serve
    WAIT = "wait"  # restart later
    GIVE_UP = "give up"  # it stays failed; ``why`` tells what was tried. Of a replica: until ``at``
    DROP = "drop"  # nobody wants it back any more


@dataclass(frozen=True, slots=True)
class ReplicaSeen:
    """``probes_failed``: one-token probes in a row without an answer. ``members_gone``: a process of the engine that
    was there when it became ready is not there now (a tensor parallel worker, say). ``restarts``: when it alone was
    restarted before; ``tried_at``: when the last of them ended, ``cancelled`` by whom, if somebody did. ``paused``: why
    its cards are not to be loaded now."""

    index: int
    state: ProcessState
    healthy: bool = True
    exit_code: int | None = None
    probes_failed: int = 0
    members_gone: bool = False
    restarts: tuple[datetime, ...] = ()
    tried_at: datetime | None = None
    cancelled: str = ""
    paused: str = ""


@dataclass(frozen=True, slots=True)
class Observation:
    """``busy``: a job that moves engines is at work on the rig. ``restarts``: when this profile was restarted before.
    ``ended_at``: when it ended, or the last try to start it again. ``replaced``: a later deployment of the same
    profile, or under the same name, exists. ``hindered``: why it is not to be started by itself now: a card of it
    pauses, say, or another runs in its place. ``instead``: who was asked for since and runs in its place. ``archived``:
    its profile was, which nobody may switch to any more. ``renewing``:
    a job starts a replica of it again. ``looks_after_itself``: the engine starts its replicas again by itself."""

    replicas: tuple[ReplicaSeen, ...] = ()
    busy: bool = False
    ended_at: datetime | None = None
    restarts: tuple[datetime, ...] = ()
    replaced: bool = False
    archived: bool = False
    hindered: str = ""
    instead: str = ""
    renewing: bool = False
    looks_after_itself: bool = False


@dataclass(frozen=True, slots=True)
class Policy:
    """See ``models.RestartPolicy``, whose plain values these are."""

    restarts: int = 3
    window_seconds: float = 600.0
    backoff_seconds: float = 10.0
    probe_failures: int = 3


@dataclass(frozen=True, slots=True)
class Decision:
    """``replicas`` are indices of those that are to blame, the first one the most telling."""

    act: Act
    why: str = ""
    replicas: tuple[int, ...] = ()
    at: datetime | None = None


LEAVE = Decision(Act.LEAVE)


def decide(desired: str, status: str, seen: Observation, policy: Policy, now: datetime) -> Decision:
    if status in WATCHED:
        return _watched(desired, status, seen, policy, now)
    if status in HALFWAY:
        # Its job may be another than the one that made it (a stop, a later switch): while any runs, it is left alone.
        return LEAVE if seen.busy else Decision(Act.END, "It was left half-way by a job that has ended.")
    if status == Status.FAILED and desired == Desired.SERVING:
        return _failed(seen, policy, now)
    return LEAVE


def _watched(desired: str, status: str, seen: Observation, policy: Policy, now: datetime) -> Decision:
    blamed = [(r, why) for r in seen.replicas if (why := what_is_wrong(r, policy))]
    # A dead one tells more than one that does not answer: its exit code is the evidence.
    blamed.sort(key=lambda b: (b[0].state == ProcessState.RUNNING, b[0].index))
    indices, why = tuple(r.index for r, _ in blamed), blamed[0][1] if blamed else ""
    left = [r for r in seen.replicas if r.healthy and r.index not in indices]
    # A sleeper wakes whole or not at all; where the last one that served is gone, one that is coming up is waited for.
    if blamed and (status == Status.SLEEPING or (not left and not seen.renewing)):
        return Decision(Act.LOSE, why, indices)
    if blamed and (status == Status.READY or any(r.healthy for r, _ in blamed)):
        return Decision(Act.DEGRADE, why, indices)
    away = tuple(r.index for r in seen.replicas if not r.healthy)
    if status == Status.READY and away and not seen.looks_after_itself:
        return Decision(Act.DEGRADE, "was taken out of the traffic and gets no requests.", away)
    if status == Status.DEGRADED and desired == Desired.SERVING and not seen.busy and not seen.looks_after_itself:
        return _renewed(seen, policy, now)
    return LEAVE


def _renewed(seen: Observation, policy: Policy, now: datetime) -> Decision:
    """Known and told already: which replica is started again now, else what the first one waits for."""
    found = [_one_renewed(replica, policy, now) for replica in seen.replicas if not replica.healthy]
    due = [one for one in found if one.act == Act.RENEW]
    return next(iter([*due, *found]), LEAVE)


def _one_renewed(replica: ReplicaSeen, policy: Policy, now: datetime) -> Decision:
    me = (replica.index,)
    if policy.restarts <= 0:
        return LEAVE
    window = timedelta(seconds=policy.window_seconds)
    recent = sorted(at for at in replica.restarts if at > now - window)
    tried_at = replica.tried_at or now
    if replica.cancelled and now - window < tried_at <= now:
        why = f"Its restart was cancelled by {replica.cancelled}"
        return Decision(Act.GIVE_UP, why, me, at=tried_at + window)
    if len(recent) >= policy.restarts:
        why = f"It was restarted {len(recent)} times within {policy.window_seconds / 60:g} min and failed each time"
        return Decision(Act.GIVE_UP, why, me, at=recent[-policy.restarts] + window)
    attempt = f"restart {len(recent) + 1} of {policy.restarts}"
    if replica.paused:
        return Decision(Act.WAIT, f"{attempt} waits: {replica.paused}", me)
    left = _backoff(len(recent), policy, tried_at, now)
    if left:
        return Decision(Act.WAIT, f"{attempt} in {left.total_seconds():.0f} s", me, at=now + left)
    return Decision(Act.RENEW, attempt, me)


def what_is_wrong(replica: ReplicaSeen, policy: Policy) -> str:
    """The rest of a sentence that begins with the replica's name; empty when nothing is."""
    if replica.state == ProcessState.LOST:
        return "is gone without a trace: the machine restarted, or its process was killed with its shim."
    if replica.state != ProcessState.RUNNING:
        if replica.exit_code is None:
            return "ended; its exit code was not recorded."
        if replica.exit_code < 0:
            return f"was killed by signal {-replica.exit_code} while it served."
        return f"ended by itself with exit code {replica.exit_code} while it served."
    if replica.members_gone and replica.probes_failed:
        return "is half dead: a process of it is gone and it does not answer a test request."
    if policy.probe_failures and replica.probes_failed >= policy.probe_failures:
        return f"hangs: {replica.probes_failed} test requests in a row got no answer."
    return ""


def _failed(seen: Observation, policy: Policy, now: datetime) -> Decision:
    if seen.replaced:
        return Decision(Act.DROP, "A later start of the same model has taken its place.")
    if policy.restarts <= 0:
        return Decision(Act.DROP, "Restarts are off for this profile.")
    if seen.archived:
        return Decision(Act.GIVE_UP, "Its profile was archived.")
    if seen.busy:
        return LEAVE
    if seen.instead:
        # As if it had still run: then that would have stopped it.
        return Decision(Act.GIVE_UP, f"{seen.instead} was asked for since and runs in its place.")
    # Times in the future are from before the clock was set; they count, so that the budget holds.
    window = timedelta(seconds=policy.window_seconds)
    recent = [at for at in seen.restarts if at > now - window]
    if len(recent) >= policy.restarts:
        minutes = policy.window_seconds / 60
        return Decision(
            Act.GIVE_UP, f"It was restarted {len(recent)} times within {minutes:g} min and failed each time."
        )
    attempt = f"restart {len(recent) + 1} of {policy.restarts}"
    if seen.hindered:
        return Decision(Act.WAIT, f"{attempt} waits: {seen.hindered}")
    left = _backoff(len(recent), policy, seen.ended_at or now, now)
    if left:
        return Decision(Act.WAIT, f"{attempt} in {left.total_seconds():.0f} s", at=now + left)
    return Decision(Act.RESTART, attempt)


def _backoff(tries: int, policy: Policy, ended_at: datetime, now: datetime) -> timedelta:
    """What is left of the wait after so many tries, the last of which ended then; nothing where the clock was set."""
    delay = timedelta(seconds=policy.backoff_seconds * 2 ** (tries - 1)) if tries else timedelta()
    left = ended_at + delay - now
    return left if timedelta() < left <= delay else timedelta()
