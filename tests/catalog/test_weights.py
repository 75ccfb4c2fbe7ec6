"""Weights on this machine: registered where they lie, listed with who uses them, deleted with what that frees."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from django.test import Client

from apps.catalog.models import Weights
from apps.catalog.selectors import Usage
from apps.catalog.services import model_create, weights_register
from apps.catalog.signals import weights_usage
from apps.catalog.weights.choose import NothingToChoose, RepoFile, choose, is_safe, quantization_of
from apps.catalog.weights.disk import disk_report
from apps.catalog.weights.inspect import look_at
from apps.catalog.weights.services import register_here
from apps.common.actors import COMMAND_LINE
from apps.common.errors import Invalid
from apps.jobs.models import Job
from apps.jobs.runner import job_claim
from tests.catalog.test_download import gguf, tensors

DENSE = json.dumps(
    [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
    ]
).encode()
INDEX = json.dumps({"weight_map": {"a": "one", "b": "two.safetensors"}}).encode()
CONFIG = b'{"architectures": ["LlamaForCausalLM"]}'


@pytest.fixture
def models(settings: Any, tmp_path: Path) -> Path:
    settings.MODELS_DIR = tmp_path / "models"
    settings.MODELS_DIR.mkdir()
    return tmp_path / "models"


@pytest.fixture
def tiny(db: None) -> Any:
    return model_create(actor=COMMAND_LINE, slug="tiny", name="Tiny", hf_repo="lab/tiny")


def put(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def finish(job: Job) -> Job:
    context = job_claim(job.pk)
    assert context is not None
    context.run()
    job.refresh_from_db()
    return job


# -- what a folder or file holds --


def test_a_whole_folder_and_a_gguf_file_are_taken(tmp_path: Path) -> None:
    folder = put(tmp_path / "m", {"config.json": CONFIG, "model.safetensors": tensors(1000)})
    found = look_at(str(folder))
    assert (found.kind, found.architecture) == ("safetensors", "LlamaForCausalLM")
    assert found.size_bytes == len(CONFIG) + len(tensors(1000))
    file = put(tmp_path / "g", {"tiny-Q5_K_S.gguf": gguf()}) / "tiny-Q5_K_S.gguf"
    assert look_at(str(file)).quantization == "Q5_K_S"
    assert look_at(str(tmp_path / "g")).path == str(file)  # its folder means it, when it is the only one


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"model.safetensors": tensors(10)}, "no config.json"),
        ({"config.json": b"{", "model.safetensors": tensors(10)}, "cannot be read as JSON"),
        ({"config.json": CONFIG}, "no weights"),
        (
            {
                "config.json": CONFIG,
                "model.safetensors": tensors(10),
                "modules.json": DENSE,
                "1_Pooling/config.json": b"{}",
                "2_Dense/config.json": b"{}",
            },
            "2_Dense holds no weights",
        ),
        (
            {
                "config.json": CONFIG,
                "model.safetensors": tensors(10),
                "modules.json": DENSE,
                "2_Dense/config.json": b"{}",
                "2_Dense/model.safetensors": tensors(10)[:-1],
            },
            "cut short",
        ),
        ({"config.json": CONFIG, "model.safetensors": tensors(1000)[:-1]}, "cut short"),
        ({"config.json": CONFIG, "model.safetensors": b"<html>not found</html>"}, "damaged"),
        (
            {
                "config.json": CONFIG,
                "model.safetensors.index.json": json.dumps(
                    {"weight_map": {"a": "one", "b": "two.safetensors"}}
                ).encode(),
                "two.safetensors": tensors(10),
            },
            "1 of 2 weight files are missing, the first is one",
        ),
        ({"a-Q4_0.gguf": gguf(), "b-Q8_0.gguf": gguf()}, "name the file itself"),
        ({"only.gguf": b"version https://git-lfs.github.com/spec/v1"}, "does not begin like a GGUF"),
        ({"x-00001-of-00003.gguf": gguf(), "x-00003-of-00003.gguf": gguf()}, "x-00002-of-00003.gguf is missing"),
    ],
)
def test_what_no_engine_could_load_is_refused_with_the_reason(
    tmp_path: Path, files: dict[str, bytes], words: str
) -> None:
    with pytest.raises(Invalid, match=words):
        look_at(str(put(tmp_path / "m", files)))


@pytest.mark.parametrize("path", ["models", "/etc", "/", "/proc/self", "/nowhere/at-all", "/dev/../etc/ssl"])
def test_places_without_models_are_refused(path: str) -> None:
    with pytest.raises(Invalid):
        look_at(path)


def test_the_panels_own_folder_is_closed_but_for_the_models_in_it(settings: Any, tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="not a place for models"):
        look_at(str(Path(settings.DATA_DIR) / "secrets"))
    (tmp_path / "sly").symlink_to(Path(settings.DATA_DIR) / "secrets")
    with pytest.raises(Invalid, match="not a place for models"):
        look_at(str(tmp_path / "sly"))


# -- which files of a repository --


def test_quantizations_are_read_from_the_names_people_use() -> None:
    assert quantization_of("Qwen3-32B-UD-Q4_K_XL.gguf") == "UD-Q4_K_XL"
    assert quantization_of("llama-3.gguf") == ""
    assert quantization_of("BF16/model-BF16-00001-of-00002.gguf") == "BF16"
    assert quantization_of("gpt-oss-20b-MXFP4.gguf") == "MXFP4"
    assert quantization_of("model.IQ3_XXS.gguf") == "IQ3_XXS"


def test_no_name_of_a_repository_leads_out_of_the_folder() -> None:
    for name in ("../x.json", "/etc/x.json", "a/../../x.json", "a\\b.json", "", "a//b", "./x"):
        assert not is_safe(name)


def test_a_repository_that_ships_its_weights_twice_gives_them_once() -> None:
    names = ["consolidated.safetensors", "model.safetensors", "config.json", "1_Pooling/config.json", "params.json"]
    chosen = choose([RepoFile(n, 10) for n in names])
    assert [f.name for f in chosen.files] == [
        "model.safetensors",
        "config.json",
        "1_Pooling/config.json",
        "params.json",
    ]
    with pytest.raises(NothingToChoose, match="neither"):
        choose([RepoFile("README.md", 1)])
    with pytest.raises(NothingToChoose, match="not complete"):
        choose([RepoFile("x-Q4_0-00001-of-00003.gguf", 1)])


def test_layers_behind_an_embedding_model_come_with_it() -> None:
    """google/embeddinggemma-300m as the hub lists it: without its two Dense layers vLLM answers, and wrongly."""
    small = ["config.json", "modules.json", "tokenizer.json", "1_Pooling/config.json", "2_Dense/config.json"]
    layers = ["2_Dense/model.safetensors", "3_Dense/model.safetensors"]
    others = ["2_Dense/pytorch_model.bin", "onnx/model.safetensors", "checkpoint/model.safetensors"]
    chosen = choose([RepoFile(n, 10) for n in ["model.safetensors", *small, *layers, *others]])
    assert [f.name for f in chosen.files] == ["model.safetensors", *layers, *small]
    pickled = choose([RepoFile(n, 10) for n in ["pytorch_model.bin", *small, "2_Dense/pytorch_model.bin"]])
    assert [f.name for f in pickled.files] == ["pytorch_model.bin", "2_Dense/pytorch_model.bin", *small]
    plain = choose([RepoFile(n, 10) for n in ["model.safetensors", "config.json", *layers]])
    assert [f.name for f in plain.files] == ["model.safetensors", "config.json"]  # no modules.json: nobody reads them


def test_an_embedding_model_with_its_layers_is_taken(tmp_path: Path) -> None:
    whole = {
        "config.json": CONFIG,
        "model.safetensors": tensors(10),
        "modules.json": DENSE,
        "2_Dense/config.json": b"{}",
        "2_Dense/pytorch_model.bin": b"x",
    }
    assert look_at(str(put(tmp_path / "m", whole))).kind == "safetensors"
    # Another form of the list, and a path that leads out, are no reason to refuse a model.
    for modules in (b"{", b'{"modules": 3}', json.dumps([{"path": "../x", "type": "a.Dense"}, 7]).encode()):
        assert look_at(str(put(tmp_path / "m", {"modules.json": modules}))).kind == "safetensors"


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["consolidated.safetensors", "params.json", "tekken.json"], "Mistral's own form"),
        (["model.safetensors", "tokenizer.json"], "no config.json"),
        (["pytorch_model.bin", "tokenizer.json"], "no config.json"),
    ],
)
def test_what_could_not_be_registered_afterwards_is_not_fetched(names: list[str], words: str) -> None:
    with pytest.raises(NothingToChoose, match=words):
        choose([RepoFile(n, 10) for n in names])


# -- pages, the disk --


@pytest.mark.django_db
def test_a_folder_is_registered_by_page_and_api_and_a_wrong_one_is_answered_beside_the_field(
    client: Client, rig: Any, olivia: Any, tiny: Any, tmp_path: Path
) -> None:
    client.force_login(olivia)
    wrong = client.post("/models/tiny/weights/", {"path": "/nowhere/<b>"})
    assert wrong.status_code == 422
    assert "There is nothing at /nowhere/&lt;b&gt;" in wrong.content.decode()
    folder = put(tmp_path / "m", {"config.json": CONFIG, "model.safetensors": tensors(1000)})
    assert client.post("/models/tiny/weights/", {"path": str(folder)}).status_code == 302
    assert Weights.objects.get().path == str(folder)
    assert str(folder) in client.get("/models/tiny/").content.decode()
    assert str(folder) in client.get("/models/disk/").content.decode()  # elsewhere, never deleted
    assert client.post("/models/tiny/weights/forget/").status_code == 302
    assert not Weights.objects.exists()
    assert folder.is_dir()
    answer = client.post("/api/v1/models/tiny/weights", {"path": str(folder)}, content_type="application/json")
    assert (answer.status_code, answer.json()["kind"]) == (201, "safetensors")
    bad = client.post("/api/v1/models/tiny/weights", {"path": "/etc"}, content_type="application/json")
    assert (bad.status_code, bad.json()["error"]["fields"]["path"][0]) == (422, "/etc is not a place for models.")


@pytest.mark.django_db(transaction=True)
def test_the_disk_tells_sizes_and_users_and_a_deletion_frees_what_it_said(
    client: Client, rig: Any, olivia: Any, tiny: Any, models: Path
) -> None:
    put(models / "tiny" / "abc", {"config.json": CONFIG, "model.safetensors": tensors(500_000)})
    put(models / "tiny" / "def", {"half.gguf.part": bytes(1000)})
    put(models / "stray", {"x.gguf": gguf()})
    weights_register(tiny, rig_name="bench-01", path=str(models / "tiny" / "abc"), size_bytes=1)
    places = {p.name: p for p in disk_report().places}
    assert set(places) == {"tiny/abc", "tiny/def", "stray"}
    assert places["tiny/abc"].size_bytes >= 500_000
    assert places["tiny/def"].unfinished
    client.force_login(olivia)
    page = client.get("/models/disk/").content.decode()
    assert "an unfinished download" in page
    assert "no model of the catalogue" in page
    answer = client.post("/models/disk/delete/", {"place": "tiny/abc"})
    job = finish(Job.objects.get(kind="remove_weights"))
    assert answer["Location"] == f"/jobs/{job.pk}/"
    assert (job.state, job.data["freed_bytes"]) == ("succeeded", places["tiny/abc"].size_bytes)
    assert not (models / "tiny" / "abc").exists()
    assert not Weights.objects.exists()
    for name in ("../secrets", "/etc", "tiny/../../x", "tiny", ""):
        assert client.post("/models/disk/delete/", {"place": name}).status_code == 404
    assert (models / "stray").is_dir()


@pytest.mark.django_db(transaction=True)
def test_what_runs_is_not_deleted_whoever_started_it(
    client: Client, rig: Any, olivia: Any, tiny: Any, models: Path
) -> None:
    put(models / "tiny" / "abc", {"x.gguf": gguf()})
    client.force_login(olivia)

    def serving(**asked: Any) -> list[Usage]:
        return [Usage("Tiny for all", "/deployments/1/", "Ready")] if asked["path"].endswith("abc") else []

    weights_usage.connect(serving)
    try:
        answer = client.post("/models/disk/delete/", {"place": "tiny/abc"}, headers={"accept": "application/json"})
        assert answer.status_code == 409
        assert "in use by Tiny for all" in answer.content.decode()
    finally:
        weights_usage.disconnect(serving)
    # An engine that somebody started by hand: seen by its command line.
    stranger = subprocess.Popen(
        [sys.executable, "-c", "input()", "--model", str(models / "tiny" / "abc" / "x.gguf")], stdin=subprocess.PIPE
    )
    try:
        answer = client.post("/api/v1/weights/delete", {"place": "tiny/abc"}, content_type="application/json")
        assert answer.status_code == 409
        assert f"process {stranger.pid}" in answer.json()["error"]["message"]
        listed = client.get("/api/v1/weights").json()["places"][0]
        assert listed["used_by"] == [f"process {stranger.pid}"]
    finally:
        stranger.communicate(b"\n")
    assert (
        client.post("/api/v1/weights/delete", {"place": "tiny/abc"}, content_type="application/json").status_code == 202
    )
    assert (models / "tiny" / "abc" / "x.gguf").exists()  # the job deletes, not the request


@pytest.mark.django_db(transaction=True)
def test_what_runs_is_not_deleted_where_the_models_folder_is_a_link(
    client: Client, rig: Any, olivia: Any, tiny: Any, settings: Any, tmp_path: Path
) -> None:
    put(tmp_path / "disk" / "tiny" / "abc", {"x.gguf": gguf()})
    settings.MODELS_DIR = tmp_path / "models"
    settings.MODELS_DIR.symlink_to(tmp_path / "disk")
    weights = register_here(tiny, path=str(settings.MODELS_DIR / "tiny" / "abc" / "x.gguf"), actor=COMMAND_LINE)

    def serving(**asked: Any) -> list[Usage]:
        return [Usage("Tiny for all", "", "Ready")] if weights.path.startswith(f"{asked['path']}/") else []

    weights_usage.connect(serving)
    try:
        (place,) = disk_report().places
        assert (place.weights, place.in_use) == ([weights], True)
        client.force_login(olivia)
        answer = client.post("/api/v1/weights/delete", {"place": "tiny/abc"}, content_type="application/json")
        assert answer.status_code == 409
    finally:
        weights_usage.disconnect(serving)


@pytest.mark.django_db
def test_a_quantization_as_long_as_a_files_name_fits_its_column(tiny: Any, tmp_path: Path) -> None:
    file = f"tiny-Q4_{'k' * 60}.gguf"
    put(tmp_path, {file: gguf()})
    weights = register_here(tiny, path=str(tmp_path / file), actor=COMMAND_LINE)
    assert weights.quantization.startswith("Q4_K")
    weights.full_clean(exclude=["repo", "revision"])  # PostgreSQL keeps to the column's length, SQLite does not


@pytest.mark.django_db
def test_a_folder_that_is_not_ours_to_read_hides_nothing_else(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(models / "stray", {"x.gguf": gguf()})
    (models / "lost+found").mkdir()
    closed, access, iterdir = models / "lost+found", os.access, Path.iterdir

    def refuse(self: Path) -> Any:  # the tests may run as root, who may read everything
        if self == closed:
            raise PermissionError(13, "Permission denied", str(self))
        return iterdir(self)

    monkeypatch.setattr(Path, "iterdir", refuse)
    monkeypatch.setattr(os, "access", lambda path, mode: path != closed and access(path, mode))
    assert [p.name for p in disk_report().places] == ["stray"]


@pytest.mark.django_db
def test_the_download_button_begins_a_job_and_the_page_follows_it(
    client: Client, rig: Any, olivia: Any, charlie: Any, tiny: Any
) -> None:
    client.force_login(olivia)
    assert client.post("/models/tiny/download/", {"revision": "v1"})["Location"] == "/models/tiny/"
    job = Job.objects.get()
    assert job.params == {"model": "tiny", "repo": "lab/tiny", "revision": "v1", "quantization": ""}
    job.data = {"files": [{"name": "a.gguf", "size_bytes": 2**30}], "done": {"a.gguf": 2**29}}
    job.save()
    page = client.get("/models/tiny/").content.decode()
    assert f"download:{job.pk}" in page
    assert "0.50 GiB" in page
    assert "a.gguf" in page
    answer = client.post("/api/v1/models/tiny/download", {"revision": "v1"}, content_type="application/json")
    assert (answer.status_code, answer.json()["id"]) == (202, job.pk)
    client.force_login(charlie)
    assert client.post("/models/tiny/download/").status_code == 403


@pytest.mark.django_db
def test_a_token_is_stored_by_owners_and_never_shown(client: Client, rig: Any, alice: Any, olivia: Any) -> None:
    client.force_login(olivia)
    assert client.post("/models/disk/token/", {"token": "hf_abcdefgh"}).status_code == 403
    client.force_login(alice)
    assert client.post("/models/disk/token/", {"token": "hf_abcdefgh"}).status_code == 302
    page = client.get("/models/disk/").content.decode()
    assert "A token is stored" in page
    assert "hf_abcdefgh" not in page
    assert client.post("/models/disk/token/", {"remove": "1"}).status_code == 302
    assert "A token is stored" not in client.get("/models/disk/").content.decode()


def test_a_header_that_promises_the_sky_is_not_read(tmp_path: Path) -> None:
    folder = put(tmp_path / "m", {"config.json": CONFIG, "model.safetensors": struct.pack("<Q", 2**60) + b"{}"})
    with pytest.raises(Invalid, match="damaged"):
        look_at(str(folder))
