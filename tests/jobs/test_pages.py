from __future__ import annotations

import csv
import io
import json
from datetime import timedelta
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.db import connection
from django.test import AsyncClient, Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from apps.accounts.models import User
from apps.common.paging import page_of
from apps.jobs import filters, views
from apps.jobs.filters import jobs_filtered
from apps.jobs.models import Job, JobLogLine, JobState, JobStep, StepState
from apps.jobs.partials import PARTS, job_changed, job_part
from apps.jobs.selectors import LOG_TAIL_LINES, job_list


def client_of(user: User) -> Client:
    client = Client()
    client.force_login(user)
    return client


def job_of(user: User | None, **values: Any) -> Job:
    defaults: dict[str, Any] = {
        "kind": "switch",
        "title": "Switch to Coder",
        "rig_name": "bench-01",
        "queue": "rig.bench-01.control",
        "user": user,
        "user_name": user.display_name if user else "panel",
    }
    return Job.objects.create(**{**defaults, **values})


def test_the_list_shows_newest_first_and_says_what_to_do_when_empty(bob: User) -> None:
    client = client_of(bob)
    assert "No jobs match" in client.get("/jobs/").content.decode()
    first, second = job_of(bob, title="Switch to A"), job_of(bob, title="Switch to B", reason="for the <sprint>")
    page = client.get("/jobs/").content.decode()
    assert page.index("Switch to B") < page.index("Switch to A")
    assert "for the &lt;sprint&gt;" in page
    assert f'href="/jobs/{second.pk}/"' in page
    oldest = client.get("/jobs/?sort=id").content.decode()
    assert oldest.index("Switch to A") < oldest.index("Switch to B")
    assert first.pk < second.pk


def test_filters_find_by_state_kind_person_time_and_text(alice: User, bob: User) -> None:
    old = job_of(alice, kind="stop", title="Stop Coder", state=JobState.FAILED)
    Job.objects.filter(pk=old.pk).update(created_at=timezone.now() - timedelta(days=9))
    new = job_of(bob, reason="refactoring")
    gone = job_of(None, user_name="bobby who left")

    def found(**wanted: str) -> set[int]:
        return set(jobs_filtered(wanted).values_list("pk", flat=True))

    assert found(state="failed") == {old.pk}
    assert found(kind="stop") == {old.pk}
    assert found(user=str(bob.pk)) == {new.pk}
    assert found(user=str(bob.public_id)) == {new.pk}
    assert found(user="BOB@lab.example") == {new.pk}
    assert found(user="bob@lab") == set()  # an address is not found by its beginning
    assert found(user="bob") == {new.pk, gone.pk}
    assert found(since=(timezone.now() - timedelta(days=1)).isoformat()) == {new.pk, gone.pk}
    assert found(since="2020-01-01") == {old.pk, new.pk, gone.pk}
    assert found(q="refactor") == {new.pk}
    assert found(q=str(old.pk)) >= {old.pk}


def test_the_page_says_when_older_jobs_were_not_searched(bob: User, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filters, "TEXT_SEARCH_JOBS", 2)
    monkeypatch.setattr(views, "TEXT_SEARCH_JOBS", 2)
    for title in ("Switch to A", "Switch to B", "Switch to C"):
        job_of(bob, title=title)
    page = client_of(bob).get("/jobs/?q=switch").content.decode()
    assert "looked for in the newest 2 jobs" in page
    assert "Switch to A" not in page
    assert "looked for" not in client_of(bob).get("/jobs/?state=queued").content.decode()


def test_a_filter_that_makes_no_sense_says_so_on_the_page(bob: User) -> None:
    answer = client_of(bob).get("/jobs/?since=banana&page=many&state=asleep")
    assert answer.status_code == 200
    assert "errorlist" in answer.content.decode()
    assert client_of(bob).get("/jobs/?page=99999").status_code == 200


def test_the_list_costs_the_same_queries_however_many_jobs_there_are(bob: User) -> None:
    client = client_of(bob)
    job_of(bob)
    client.get("/jobs/")
    with CaptureQueriesContext(
        connection,
    ) as few:
        client.get("/jobs/")
    for _ in range(60):
        job_of(bob)
    with CaptureQueriesContext(connection) as many:
        answer = client.get("/jobs/?page=2")
    assert len(many) == len(few)
    assert "61 in all" in answer.content.decode()


def test_a_page_deep_inside_the_list_takes_its_ids_from_an_index_alone(bob: User) -> None:
    rows = [job_of(bob, title=f"Switch {n}") for n in range(30)]
    assert [job.pk for job in page_of(job_list(), 10, 5)] == [job.pk for job in rows[::-1][10:15]]
    if connection.vendor == "sqlite":
        for jobs in (
            job_list(),
            job_list().filter(state="queued"),
            job_list().filter(kind="x"),
            job_list().filter(user=bob),
        ):
            plan = jobs.values_list("pk", flat=True)[10000:10025].explain()
            assert "COVERING INDEX" in plan, plan
            assert "TEMP B-TREE" not in plan, plan


def test_the_job_page_shows_steps_log_parameters_who_why_and_the_result(bob: User, alice: User) -> None:
    job = job_of(
        bob,
        state=JobState.FAILED,
        reason="sprint",
        params={"version_id": 7},
        started_at=timezone.now() - timedelta(seconds=70),
        finished_at=timezone.now(),
        result={"summary": "vLLM exited with code 1 after 12 s.", "exit_code": 1, "log_tail": "a <b>\nc"},
    )
    JobStep.objects.create(job=job, index=0, name="plan", title="Plan", state=StepState.DONE, detail="fits")
    JobStep.objects.create(job=job, index=1, name="start", title="Start the new engine", state=StepState.FAILED)
    JobLogLine.objects.create(job=job, text="loading <weights>", source="engine")
    page = client_of(alice).get(f"/jobs/{job.pk}/").content.decode()
    for text in (
        "Start the new engine",
        "loading &lt;weights&gt;",
        "version_id",
        "sprint",
        "bob",
        "exited with code 1",
    ):
        assert text in page
    assert "a &lt;b&gt;\nc" in page
    assert "Cancel" not in page, "it has ended"
    assert f"job:{job.pk}" in page, "the page watches its job"


def test_page_htmx_and_socket_draw_the_same_part(alice: User) -> None:
    job = job_of(alice, state=JobState.RUNNING, progress=0.4, params={})
    JobLogLine.objects.create(job=job, text="a line")
    client = client_of(alice)
    page = client.get(f"/jobs/{job.pk}/").content.decode()
    for part in PARTS:
        drawn = job_part(part, job, alice)
        assert drawn.count(f'id="job-{job.pk}-{part}"') == 1
        assert page.count(f'id="job-{job.pk}-{part}"') == 1
        fetched = client.get(f"/jobs/{job.pk}/part/{part}")
        assert f'id="job-{job.pk}-{part}"' in fetched.content.decode()
        assert drawn in job_changed(job, alice)
    assert "a line" in job_changed(job, alice, log_only=True)
    assert f"job-{job.pk}-head" not in job_changed(job, alice, log_only=True)
    assert client.get(f"/jobs/{job.pk}/part/nothing").status_code == 404


def test_the_page_shows_the_end_of_a_long_log_and_the_whole_as_text(bob: User) -> None:
    job = job_of(bob)
    lines = LOG_TAIL_LINES + 50
    JobLogLine.objects.bulk_create([JobLogLine(job=job, text=f"line {n}.") for n in range(lines)])
    client = client_of(bob)
    page = client.get(f"/jobs/{job.pk}/").content.decode()
    assert f"line {lines - 1}." in page
    assert "line 3." not in page
    text = client.get(f"/jobs/{job.pk}/log")
    assert text.headers["Content-Type"].startswith("text/plain")
    assert len(text.content.splitlines()) == lines


def test_members_cancel_their_own_jobs_and_operators_any(alice: User, olivia: User, bob: User) -> None:
    own, others, third = job_of(bob), job_of(alice), job_of(alice)
    client = client_of(bob)
    assert "Cancel</button>" in client.get(f"/jobs/{own.pk}/").content.decode()
    assert "Cancel</button>" not in client.get(f"/jobs/{others.pk}/").content.decode()
    assert client.post(f"/jobs/{others.pk}/cancel").status_code == 403
    assert client.post(f"/jobs/{own.pk}/cancel").status_code == 302
    own.refresh_from_db()
    assert own.state == JobState.CANCELLED
    assert client.post(f"/jobs/{own.pk}/cancel").status_code == 409
    assert client_of(olivia).post(f"/jobs/{others.pk}/cancel").status_code == 302
    fragment = client_of(olivia).post(f"/jobs/{third.pk}/cancel", headers={"HX-Request": "true"})
    assert f'id="job-{third.pk}-head"' in fragment.content.decode()


@pytest.mark.parametrize("path", ["/jobs/export?format=csv&user=bob", "/api/v1/jobs/export?format=csv&user=bob"])
def test_the_export_is_filtered_and_safe_for_spreadsheets(alice: User, bob: User, path: str) -> None:
    job_of(alice)
    mine = job_of(bob, reason="=1+1", result={"summary": "done"})
    answer = client_of(bob).get(path)
    rows = list(csv.DictReader(io.StringIO(b"".join(answer.streaming_content).decode())))  # type: ignore[attr-defined]
    assert [row["id"] for row in rows] == [str(mine.pk)]
    assert rows[0]["reason"] == "'=1+1"


def test_a_long_export_is_streamed_by_the_real_server_kind(bob: User) -> None:
    Job.objects.bulk_create(
        [Job(kind="switch", title=f"n{n}", rig_name="r", queue="q", user_name="x") for n in range(1201)]
    )
    browser = AsyncClient()
    browser.force_login(bob)

    async def read() -> list[str]:
        answer = await browser.get("/jobs/export?format=jsonl")
        assert answer.is_async  # type: ignore[attr-defined]
        chunks = [chunk async for chunk in answer.streaming_content]  # type: ignore[attr-defined]
        assert len(chunks) > 1, "not one big answer"
        return b"".join(chunks).decode().splitlines()

    lines = async_to_sync(read)()
    assert len({json.loads(line)["id"] for line in lines}) == 1201
