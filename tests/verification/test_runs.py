"""A verification as a job over the real simulated rig and its socket, its pages and its acceptance."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.core.management import call_command
from django.test import Client

from apps.common.actors import COMMAND_LINE
from apps.common.errors import Conflict, NotFound
from apps.hardware.client import HardwareClient
from apps.hardware.server import HardwareServer
from apps.hardware.simulated import SimulatedDriver
from apps.jobs.models import Job, JobState
from apps.jobs.runner import job_claim
from apps.verification.models import VerificationRun
from apps.verification.services import run_accept, verify_request

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def sampler(settings: Any) -> Iterator[HardwareClient]:
    """A simulated rig behind its socket, as the sampler process has it."""
    folder = tempfile.mkdtemp(dir="/tmp")
    settings.SAMPLER_SOCKET = Path(folder) / "s.sock"
    server = HardwareServer(SimulatedDriver(), settings.SAMPLER_SOCKET)
    server.start()
    client = HardwareClient(settings.SAMPLER_SOCKET)
    yield client
    client.close()
    server.stop()
    shutil.rmtree(folder)


def verify(rig: Any) -> tuple[Job, VerificationRun]:
    job = verify_request(suite="quick", rig=rig, actor=COMMAND_LINE, reason="after the move")
    context = job_claim(job.pk)
    assert context is not None
    context.run()
    job.refresh_from_db()
    return job, VerificationRun.objects.get(job=job)


def verdicts(run: VerificationRun) -> dict[str, str]:
    return dict(run.results.values_list("check_name", "verdict"))


def test_a_healthy_simulated_rig_passes_and_says_that_it_is_simulated(rig: Any, sampler: HardwareClient) -> None:
    job, run = verify(rig)
    cards = {k: v for k, v in verdicts(run).items() if k not in ("disk_space", "host_memory")}
    assert set(cards.values()) == {"pass"}, verdicts(run)
    assert len(cards) == 7
    assert job.state == JobState.SUCCEEDED, job.summary
    assert job.summary.startswith("Simulated: ")
    assert "of 9 passed" in job.summary
    assert run.hardware_source == "simulated"
    assert run.finished_at is not None
    assert [s.name for s in job.steps.order_by("index")][-1] == "verdict"


def test_a_card_with_half_its_lanes_fails_the_job_with_the_sentence_and_keeps_the_evidence(
    rig: Any, sampler: HardwareClient
) -> None:
    sampler.fault("width", 1, width=8)
    job, run = verify(rig)
    assert job.state == JobState.FAILED
    assert "PCIe width" in job.summary
    assert verdicts(run)["pcie_width"] == "fail"
    assert verdicts(run)["driver"] == "pass"
    assert job.result is not None
    assert "GPU 1 uses fewer lanes" in job.result["failed"][0]
    assert run.finished_at is not None


def test_an_accepted_run_is_what_later_ones_are_compared_with(rig: Any, sampler: HardwareClient, olivia: Any) -> None:
    _, first = verify(rig)
    run_accept(first, actor=COMMAND_LINE)
    sampler.fault("nvlink", 0, lanes=4)
    _, second = verify(rig)
    result = second.results.get(check_name="nvlink_pairs")
    assert result.verdict == "fail"
    assert "0-1 (4 of 4 lanes" in result.expected


def test_without_a_sampler_the_sentence_says_so_and_nothing_passes_by_accident(rig: Any, settings: Any) -> None:
    settings.SAMPLER_SOCKET = Path("/tmp/no-such-folder/s.sock")
    job, run = verify(rig)
    assert job.state == JobState.FAILED
    assert verdicts(run)["gpu_count"] == "fail"
    assert "Start it with the panel" in run.results.get(check_name="gpu_count").advice


def test_two_clicks_make_one_run_and_an_unknown_suite_none(rig: Any) -> None:
    job = verify_request(suite="quick", rig=rig, actor=COMMAND_LINE)
    assert verify_request(suite="quick", rig=rig, actor=COMMAND_LINE) == job
    assert job.queue == "rig.bench-01.verify"
    assert VerificationRun.objects.count() == 1
    with pytest.raises(NotFound, match="there is: quick"):
        verify_request(suite="../x", rig=rig, actor=COMMAND_LINE)
    with pytest.raises(Conflict, match="not ended"):
        run_accept(VerificationRun.objects.get(), actor=COMMAND_LINE)


def test_the_pages_follow_a_run_from_the_button_to_its_acceptance(
    client: Client, rig: Any, sampler: HardwareClient, olivia: Any, charlie: Any, django_assert_max_num_queries: Any
) -> None:
    client.force_login(olivia)
    assert "Never verified" in client.get("/verify/").content.decode()
    address = client.post("/verify/start/", {"suite": "quick"})["Location"]
    assert "Waiting for the rig" in client.get(address).content.decode()
    context = job_claim(Job.objects.get().pk)
    assert context is not None
    context.run()
    with django_assert_max_num_queries(14):
        page = client.get(address).content.decode()
    for words in ("Simulated: ", "NVLink pairs", "4 of 4 lanes, 56 GB/s", "Accept as normal"):
        assert words in page
    part = client.get(address, headers={"HX-Request": "true"}).content.decode()
    assert part.startswith("<section id=")
    assert "<html" not in part
    client.post(f"{address}accept/")
    assert "accepted as this rig" in client.get(address).content.decode()
    client.force_login(charlie)
    with django_assert_max_num_queries(14):
        page = client.get("/verify/").content.decode()
    assert "Run the quick checks" not in page
    assert client.post(f"{address}accept/").status_code == 403
    assert client.get("/verify/99999/").status_code == 404


def test_the_command_says_when_nobody_would_do_the_work(rig: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        call_command("verify")
    assert ended.value.code == 1
    assert "make up" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        call_command("install", "starter")
    assert ended.value.code == 1
    assert not Job.objects.exists()
