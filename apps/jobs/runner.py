"""Runs one job on a worker: lease, heartbeat, steps, compensation, end."""

from __future__ import annotations

import secrets
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any

import structlog
from django.db import IntegrityError, OperationalError, close_old_connections, transaction
from django.db.models import Q
from django.utils import timezone

from apps.common.identity import process_key
from apps.common.realtime import page_changed
from apps.jobs.estimates import expected
from apps.jobs.handlers import JobCancelled, JobFailed, LeaseLost, Step, handler_for
from apps.jobs.leases import LEASE_SECONDS, held_here, lease_is_over
from apps.jobs.models import Job, JobState, JobStep, StepState
from apps.jobs.services import job_finish, job_log

log = structlog.get_logger(__name__)
HEARTBEAT_SECONDS = 3.0
ATTEMPTS_MAX = 30  # of one job, while the database refuses its writes


def job_claim(job_id: int) -> JobContext | None:
    """Take a queued job, or a running one whose worker is gone. None when somebody else has it."""
    now = timezone.now()
    job = Job.objects.filter(pk=job_id).first()
    if job is None or job.is_final:
        return None
    owner = f"{process_key()}:{secrets.token_hex(4)}"
    held_here.add(owner)
    if not _take(job, owner, now):
        held_here.discard(owner)
        return None  # another worker got there first
    job.refresh_from_db()
    return JobContext(job, owner)


def _take(job: Job, owner: str, now: datetime) -> bool:
    free = Q(state=JobState.QUEUED)
    if job.state == JobState.RUNNING and lease_is_over(job):
        # As it was when it was judged: a heartbeat that comes in between keeps it.
        free |= Q(state=JobState.RUNNING, lease_owner=job.lease_owner, lease_until=job.lease_until)
    try:
        with transaction.atomic():
            claimed = Job.objects.filter(free, pk=job.pk).update(
                state=JobState.RUNNING,
                lease_owner=owner,
                lease_until=now + timedelta(seconds=LEASE_SECONDS),
                started_at=job.started_at or now,
                attempts=job.attempts + 1,
            )
            page_changed("job", job=job.pk)
    except IntegrityError:
        return False  # its exclusion is taken: the tick sends it again when the other one has ended
    return claimed == 1


class JobContext:
    """What a step works with. ``check`` is called often: it ends a step whose job was cancelled or lost."""

    def __init__(self, job: Job, owner: str) -> None:
        self.job = job
        self.owner = owner
        self._lost = threading.Event()
        self._cancelled = False
        self._cancellable = True
        self._next_look = 0.0
        self._step_span = (0.0, 0.0)
        self._left_after: float | None = None

    # -- for steps --
    def log(self, text: str, source: str = "panel") -> None:
        job_log(self.job, text, source)

    def save_data(self, **values: Any) -> None:
        """Hand values on to later steps; stored at once, so that they survive a killed worker."""
        self.job.data = {**self.job.data, **values}
        self._update(data=self.job.data)

    def set_deployment(self, deployment_id: int) -> None:
        self.job.deployment_id = deployment_id
        self._update(deployment_id=deployment_id)

    def check(self) -> None:
        """Raise LeaseLost or JobCancelled if this work must stop now."""
        if self._lost.is_set():
            raise LeaseLost
        if time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + 0.4
            row = (
                Job.objects.filter(pk=self.job.pk)
                .values("cancel_requested_at", "lease_owner", "superseded_by_id", "undo_cancel_at")
                .first()
            )
            if row is None or row["lease_owner"] != self.owner:
                self._lost.set()
                raise LeaseLost
            self.job.superseded_by_id = row["superseded_by_id"]
            asked_at = row["cancel_requested_at"] if self.job.failure is None else row["undo_cancel_at"]
            self._cancelled = asked_at is not None
        if self._cancelled and self._cancellable:
            raise JobCancelled

    @contextmanager
    def cancellable(self) -> Iterator[None]:
        """A part that a cancel ends, of a step that it does not: in it ``check`` raises JobCancelled."""
        before, self._cancellable = self._cancellable, True
        try:
            self.check()
            yield
        finally:
            self._cancellable = before

    def cancel_sentence(self) -> str:
        """Who ended it, or what took its place."""
        if self.job.superseded_by_id:
            return f"Superseded by job {self.job.superseded_by_id}."
        by = Job.objects.filter(pk=self.job.pk).values_list("cancel_requested_by", flat=True).first()
        return f"Cancelled by {by or 'somebody'}."

    @property
    def lost(self) -> bool:
        """Whether another worker has this job now; nothing of it may be touched any more."""
        return self._lost.is_set()

    def sleep(self, seconds: float) -> None:
        """Wait in short bits, checking between them."""
        deadline = time.monotonic() + seconds
        while True:
            self.check()
            left = deadline - time.monotonic()
            if left <= 0:
                return
            time.sleep(min(0.2, left))

    def progress(self, fraction: float, detail: str = "", eta_seconds: float | None = None) -> None:
        """How far the running step is, 0..1; shown within the step's share of the whole. ``eta_seconds``: until it is
        done, where the step knows better than its history."""
        start, span = self._step_span
        total = round(min(1.0, start + span * max(0.0, min(1.0, fraction))), 4)
        values: dict[str, Any] = {}
        if total > self.job.progress:
            values["progress"] = self.job.progress = total
        if eta_seconds is not None:
            left = eta_seconds + (self._left_after or 0.0)
            values["eta_at"] = self.job.eta_at = timezone.now() + timedelta(seconds=left)
        if values:
            self._update(**values)
        if detail:
            JobStep.objects.filter(job=self.job, state=StepState.RUNNING).update(detail=detail[:500])
        if values or detail:
            page_changed("job", job=self.job.pk)

    # -- the run --
    def run(self) -> None:
        handler = handler_for(self.job.kind)
        heartbeat = threading.Thread(target=self._keep_lease, name=f"lease-{self.job.pk}", daemon=True)
        done = self._done = threading.Event()
        heartbeat.start()
        try:
            if self.job.failure is None:
                try:
                    self._run_steps(handler.steps(self.job))
                    job_finish(
                        self.job, JobState.SUCCEEDED, handler.summary(self.job), where={"lease_owner": self.owner}
                    )
                    return
                except LeaseLost:
                    raise
                except JobCancelled:
                    self._give_up(JobState.CANCELLED, self.cancel_sentence(), {})
                except JobFailed as failure:
                    self._give_up(JobState.FAILED, failure.message, failure.evidence)
                except OperationalError:
                    if self.job.attempts < ATTEMPTS_MAX:
                        raise
                    self._give_up(JobState.ERRORED, "The database refused this job's writes again and again.", {})
                except Exception as error:
                    log.exception("job errored", job=self.job.pk)
                    self.log(traceback.format_exc())
                    self._give_up(
                        JobState.ERRORED, f"Something broke in rigpanel itself: {error!r}. The log has the trace.", {}
                    )
            self._compensate(handler.compensation(self.job))
        except LeaseLost:
            log.warning("lease lost; another worker carries on", job=self.job.pk)
        except OperationalError as error:
            # A full disk, a locked or restarting database: no fault of the job, whose lease ends with this thread. The
            # tick hands it out again, and it carries on from its last finished step.
            log.warning("the database is away; the job is carried on later", job=self.job.pk, error=str(error))
        finally:
            done.set()
            heartbeat.join(timeout=5)
            held_here.discard(self.owner)

    def _run_steps(self, steps: Sequence[Step], first_index: int = 0) -> None:
        existing = {s.name: s for s in self.job.steps.all()}
        for i, step in enumerate(steps):
            if step.name not in existing:
                existing[step.name] = JobStep.objects.create(
                    job=self.job, index=first_index + i, name=step.name, title=step.title
                )
        for i, step in enumerate(steps):
            row = existing[step.name]
            if row.state in (StepState.DONE, StepState.SKIPPED):
                continue
            self._cancellable = step.cancellable if self.job.failure is None else step.undo_cancellable
            self.check()
            times = expected(self.job, steps)  # anew: by now it may be known that it only wakes, say
            took = [times.seconds[one.name] for one in steps]
            total = sum(took) or 1.0
            self._step_span = (sum(took[:i]) / total, took[i] / total)
            left, self._left_after = times.left(steps[i:]), times.left(steps[i + 1 :])
            self.job.eta_at = None if left is None else timezone.now() + timedelta(seconds=left)
            self._update(eta_at=self.job.eta_at)
            self._mark(row, StepState.RUNNING, started_at=row.started_at or timezone.now())
            try:
                detail = step.run(self)
            except (JobFailed, JobCancelled, LeaseLost) as error:
                if not isinstance(error, LeaseLost):
                    why = error.message if isinstance(error, JobFailed) else "cancelled"
                    self._mark(row, StepState.FAILED, finished_at=timezone.now(), detail=why[:500])
                raise
            except Exception:
                self._mark(row, StepState.FAILED, finished_at=timezone.now(), detail="errored")
                raise
            done: dict[str, Any] = {"finished_at": timezone.now()}
            if detail:
                done["detail"] = detail[:500]
            self._mark(row, StepState.DONE, **done)
            self.progress(1.0)

    def _give_up(self, state: JobState, message: str, evidence: dict[str, Any]) -> None:
        """Store why, before anything is undone: a worker killed from here on resumes with the undoing."""
        self.job.failure = {"state": state, "message": message, "evidence": evidence}
        self._cancelled, self._next_look = False, 0.0  # what cancelled the way forward does not cancel the way back
        self._update(failure=self.job.failure)
        JobStep.objects.filter(job=self.job, state=StepState.PENDING).update(state=StepState.SKIPPED)
        self.log(message)

    def _compensate(self, steps: Sequence[Step]) -> None:
        """Run every step, also after one that failed: requests must not stay held because an engine did not return."""
        failure = dict(self.job.failure or {})
        state = JobState(failure.get("state", JobState.ERRORED))
        notes: list[str] = []
        self._cancellable = False
        for i, step in enumerate(steps):
            try:
                self._run_steps([step], first_index=100 + i)
            except LeaseLost:
                raise
            except JobFailed as second:
                notes.append(second.message)
                self.log(second.message)
            except JobCancelled:
                notes.append(f"{step.title}: {self.cancel_sentence().lower()}")
                self.log(notes[-1])
            except OperationalError:
                if self.job.attempts < ATTEMPTS_MAX:
                    raise
                notes.append("The database refused to put things right again and again.")
            except Exception as error:
                log.exception("putting things right errored", job=self.job.pk)
                self.log(traceback.format_exc())
                notes.append(f"Putting things right broke too: {error!r}.")
                state = JobState.ERRORED
        self.job.refresh_from_db(fields=["data", "superseded_by"])
        aftermath = str(self.job.data.get("aftermath", ""))
        summary = " ".join(part for part in (str(failure.get("message", "")), aftermath, *notes) if part)
        result = {"summary": summary, **dict(failure.get("evidence") or {})}
        job_finish(self.job, state, result, where={"lease_owner": self.owner})

    def _mark(self, row: JobStep, state: StepState, **values: Any) -> None:
        JobStep.objects.filter(pk=row.pk).update(state=state, **values)
        row.state = state
        page_changed("job", job=self.job.pk)

    def _update(self, **values: Any) -> None:
        if Job.objects.filter(pk=self.job.pk, lease_owner=self.owner).update(**values) != 1:
            self._lost.set()
            raise LeaseLost

    def _keep_lease(self) -> None:
        while not self._done.wait(HEARTBEAT_SECONDS):
            try:
                until = timezone.now() + timedelta(seconds=LEASE_SECONDS)
                if Job.objects.filter(pk=self.job.pk, lease_owner=self.owner).update(lease_until=until) != 1:
                    self._lost.set()
            except Exception as error:  # the database may be restarting: the lease outlives a short gap
                log.warning("lease not renewed", job=self.job.pk, error=str(error))
            finally:
                close_old_connections()
