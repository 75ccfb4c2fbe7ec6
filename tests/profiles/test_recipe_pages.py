"""Recipes and exports where people meet them: the page, the API, and the way there and back."""

from __future__ import annotations

import json
import shlex
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml
from django.test import Client
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apps.audit.models import AuditEntry
from apps.catalog.models import Model, Weights
from apps.common.actors import COMMAND_LINE
from apps.common.errors import Invalid
from apps.profiles.forms import parse_options
from apps.profiles.recipes.export import export, own_fields
from apps.profiles.recipes.matching import filled, form_values, model_for
from apps.profiles.recipes.own import write_own
from apps.profiles.recipes.reading import read_recipe
from apps.profiles.selectors import VERSION_FIELDS, profile_get
from apps.profiles.services import PROFILE_FIELDS, load_shipped, profile_create

pytestmark = pytest.mark.django_db
SECRET = "hf_abcdefghijkl1234"
LINE = f"HF_TOKEN={SECRET} vllm serve Qwen/Qwen2.5-Coder-32B-Instruct-AWQ -tp 2 --max-model-len 8192 --port 1 --odd 1"


def test_a_pasted_line_fills_the_form_of_a_new_profile(client: Client, rig: Any, alice: Any) -> None:
    load_shipped()
    client.force_login(alice)
    assert "Paste a recipe" in client.get("/profiles/").content.decode()
    before = AuditEntry.objects.count()
    answer = client.post("/profiles/recipe/", {"text": LINE})
    page = answer.content.decode()
    assert answer.status_code == 200
    assert SECRET not in page
    assert '<option value="qwen2-5-coder-32b-instruct-awq" selected>' in page
    assert "max_model_len = 8192" in page
    assert "--odd 1" in page
    assert AuditEntry.objects.count() == before  # reading changes nothing


def test_a_text_that_cannot_be_read_is_answered_beside_the_field(client: Client, rig: Any, alice: Any) -> None:
    client.force_login(alice)
    answer = client.post("/profiles/recipe/", {"text": f"vllm serve 'x --api-key {SECRET}"})
    assert answer.status_code == 422
    assert "never closed" in answer.content.decode()
    assert SECRET not in answer.content.decode()
    assert client.post("/profiles/recipe/", {"text": "x" * 70_000}).status_code == 422
    assert client.post("/profiles/recipe/", {"text": "a\x00b"}).status_code == 422


def test_the_api_reads_a_recipe_that_profiles_then_take(client: Client, rig: Any, alice: Any) -> None:
    load_shipped()
    client.force_login(alice)
    answer = client.post("/api/v1/profiles/recipe", {"text": LINE}, content_type="application/json")
    assert answer.status_code == 200, answer.content
    (recipe,) = answer.json()["recipes"]
    assert [note["text"] for note in recipe["not_understood"]] == ["--odd 1"]
    made = client.post("/api/v1/profiles", recipe["profile"], content_type="application/json")
    assert made.status_code == 201, made.content
    assert made.json()["version"]["options"] == {"max_model_len": 8192}
    wrong = client.post("/api/v1/profiles/recipe", {"text": "a: &a [*a]"}, content_type="application/json")
    assert wrong.status_code == 422
    assert "contains itself" in wrong.json()["error"]["message"]


def test_a_model_is_found_by_any_of_its_names(rig: Any) -> None:
    load_shipped()
    coder = Model.objects.get(slug="qwen2-5-coder-32b-instruct-awq")
    for name in (coder.slug, coder.checkpoint, coder.checkpoint.lower(), "/models/Qwen2.5-Coder-32B-Instruct-AWQ/"):
        assert model_for(name) == coder, name
    assert model_for("nobody/ever-made-this") is None
    assert model_for("") is None


def test_a_model_that_is_not_in_the_catalogue_is_said(client: Client, rig: Any, alice: Any) -> None:
    client.force_login(alice)
    page = client.post("/profiles/recipe/", {"text": "vllm serve nobody/ever"}).content.decode()
    assert "not in the catalogue" in page


# -- export ---------------------------------------------------------------------------------------


def test_every_shipped_profile_comes_back_from_its_yaml(rig: Any) -> None:
    load_shipped()
    for slug in ("gemma-3-270m-cpu", "mixtral-8x22b-tp4", "qwen25-coder-32b-2xtp2"):
        profile = profile_get(slug)
        _, text = export(profile, rig, "yaml")
        (recipe,) = read_recipe(text).recipes
        assert filled(recipe) == own_fields(profile, profile.current)


def test_no_field_of_a_profile_is_forgotten_by_its_yaml(rig: Any) -> None:
    load_shipped()
    profile = profile_get("mixtral-8x22b-tp4")
    fields = own_fields(profile, profile.current)
    assert set(fields) == {"slug", *PROFILE_FIELDS, *VERSION_FIELDS}
    given_all = {**fields, "power_limit_watts": 280, "engine_version": "0.33.0"}
    (recipe,) = read_recipe(write_own(given_all)).recipes
    assert filled(recipe) == given_all
    assert recipe.not_understood == []


words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=40)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=words,
    description=words,
    served=words,
    sizes=st.tuples(*[st.integers(1, 64)] * 3),
    members=st.booleans(),
    options=st.dictionaries(words, plain, max_size=4),
)
def test_yaml_is_read_back_without_loss(
    name: str, description: str, served: str, sizes: tuple[int, int, int], members: bool, options: dict[str, Any]
) -> None:
    fields = {
        "slug": "some-slug",
        "name": name,
        "model": "tiny",
        "engine": "vllm",
        "device": "gpu",
        "replicas": sizes[0],
        "tensor_parallel_size": sizes[1],
        "pipeline_parallel_size": sizes[2],
        "served_name": served,
        "members_may_switch": members,
        "description": description,
        "options": options,
    }
    (recipe,) = read_recipe(write_own(fields)).recipes
    assert {key: getattr(recipe, key) for key in fields} == fields
    assert recipe.not_understood == []


@given(
    st.dictionaries(st.from_regex(r"[a-z_]{1,9}", fullmatch=True), plain.filter(lambda v: v is not None), max_size=4)
)
def test_the_form_takes_every_option_as_it_was(options: dict[str, Any]) -> None:
    assert parse_options(form_values({"options": options})["options"]) == options


def test_a_command_line_comes_back_as_the_profile_it_was(rig: Any) -> None:
    load_shipped()
    profile = profile_get("r1-distill-70b-tp4")
    _, text = export(profile, rig, "command")
    (recipe,) = read_recipe(text).recipes
    version = profile.current
    assert (recipe.tensor_parallel_size, recipe.served_name) == (4, version.served_name)
    assert model_for(recipe.model) == version.model
    assert version.options.items() <= recipe.options.items()
    assert recipe.not_understood == []


def test_systemd_units_and_compose_services_hold_no_key_and_quote_what_they_must(rig: Any) -> None:
    load_shipped()
    coder = profile_get("qwen25-coder-32b-2xtp2")
    _, unit = export(coder, rig, "systemd")
    assert unit.count("ExecStart=") == 2
    assert "GPU-bench-01-2,GPU-bench-01-3" in unit
    name, text = export(coder, rig, "compose")
    assert name == "qwen25-coder-32b-2xtp2.compose.yaml"
    services = yaml.safe_load(text)["services"]
    first = services["qwen25-coder-32b-2xtp2-0"]
    assert first["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"] == [
        "GPU-bench-01-0",
        "GPU-bench-01-1",
    ]
    assert "a-key-of-its-own" not in unit + text
    (again, other) = read_recipe(text).recipes
    assert (again.tensor_parallel_size, other.tensor_parallel_size) == (2, 2)
    assert again.options["max_model_len"] == 32768


def test_odd_words_survive_every_form(rig: Any) -> None:
    model = Model.objects.create(slug="odd", name="Odd", checkpoint="/models/o d%d$HOME.gguf")
    template = "{{ '100% $x \"q\" \\\\ ' }}"
    profile = profile_create(
        actor=COMMAND_LINE,
        slug="odd",
        name="Odd % $name",
        model=model,
        engine="llama_cpp",
        device="cpu",
        options={"chat_template": template, "threads": 2},
    )
    _, text = export(profile, rig, "command")
    (recipe,) = read_recipe(text).recipes
    assert (recipe.model, recipe.options["chat_template"]) == (model.checkpoint, template)
    assert template in shlex.split(text.partition("llama-server")[2].replace("\\\n", " "))
    _, unit = export(profile, rig, "systemd")
    assert "o d%%d$$HOME.gguf" in unit
    _, compose = export(profile, rig, "compose")
    service = yaml.safe_load(compose)["services"]["odd"]
    assert template.replace("$", "$$") in service["command"]
    assert "deploy" not in service


def of_service(text: str, slug: str) -> tuple[list[str], dict[str, str]]:
    """The command of a compose service and its volumes, the path inside first."""
    service = yaml.safe_load(text.replace("$$", "$"))["services"][slug]
    volumes = [volume.removesuffix(":ro").split(":") for volume in service.get("volumes", [])]
    assert len({inside for _, inside in volumes}) == len(volumes)
    return service["command"], {inside: host for host, inside in volumes}


def on_the_host(path: str, volumes: dict[str, str]) -> Path:
    """What a container finds at ``path``: within one of its volumes, with every link in it leading nowhere else."""
    inside = next(inside for inside in volumes if PurePosixPath(path).is_relative_to(inside))
    found = (Path(volumes[inside]) / PurePosixPath(path).relative_to(inside)).resolve(strict=True)
    assert found.is_relative_to(Path(volumes[inside]).resolve())
    return found


def test_compose_mounts_every_part_of_a_gguf_and_the_files_beside_it(rig: Any, tmp_path: Path) -> None:
    for name in ("big-00001-of-00002.gguf", "big-00002-of-00002.gguf", "mmproj.gguf"):
        (tmp_path / "q$4" / "big").mkdir(parents=True, exist_ok=True)
        (tmp_path / "q$4" / "big" / name).write_text(name)
    (tmp_path / "other" / "big").mkdir(parents=True)
    (tmp_path / "other" / "big" / "mmproj.gguf").write_text("another")
    model = Model.objects.create(slug="big", name="Big")
    path = tmp_path / "q$4" / "big" / "big-00001-of-00002.gguf"
    Weights.objects.create(model=model, rig_name=rig.slug, path=str(path))
    options = {"extra_args": ["--mmproj", str(tmp_path / "other" / "big" / "mmproj.gguf")]}
    profile = profile_create(
        actor=COMMAND_LINE, slug="big", name="B", model=model, engine="llama_cpp", device="cpu", options=options
    )
    command, volumes = of_service(export(profile, rig, "compose")[1], "big")
    first = command[command.index("--model") + 1]
    assert first.startswith("/models/")
    for part in ("00001", "00002"):
        assert part in on_the_host(first.replace("00001", part), volumes).read_text()
    assert on_the_host(command[command.index("--mmproj") + 1], volumes).read_text() == "another"


def test_compose_mounts_what_the_links_of_a_hub_cache_lead_to(rig: Any, tmp_path: Path) -> None:
    cache = tmp_path / "models--Qwen--Tiny"
    snapshot = cache / "snapshots" / "0a1b"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    (cache / "blobs" / "e0").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/e0")
    draft, template = tmp_path / "draft", tmp_path / "tool.jinja"
    draft.mkdir()
    template.write_text("x")
    model = Model.objects.create(slug="tiny", name="Tiny", hf_repo="Qwen/Tiny", checkpoint="Qwen/Tiny")
    Weights.objects.create(model=model, rig_name=rig.slug, path=str(snapshot))
    options = {
        "chat_template": str(template),
        "speculative_config": {"method": "eagle", "model": str(draft), "num_speculative_tokens": 2},
        "default_chat_template_kwargs": {"mode": "/think"},
    }
    profile = profile_create(actor=COMMAND_LINE, slug="tiny", name="T", model=model, engine="vllm", options=options)
    text = export(profile, rig, "compose")[1]
    command, volumes = of_service(text, "tiny")
    assert on_the_host(command[0] + "/config.json", volumes).read_text() == "{}"
    assert on_the_host(command[command.index("--chat-template") + 1], volumes) == template.resolve()
    speculative = json.loads(command[command.index("--speculative-config") + 1])
    assert on_the_host(speculative["model"], volumes) == draft.resolve()
    assert len(volumes) == 3
    assert "/think" in text
    (recipe,) = read_recipe(text).recipes
    assert model_for(recipe.model) == model


def test_a_folder_of_a_hubs_cache_is_its_repository(rig: Any) -> None:
    other = Model.objects.create(slug="other", name="Other", checkpoint="Qwen/Qwen3-0.6B-Base")
    model = Model.objects.create(slug="small", name="Small", checkpoint="Qwen/Qwen3-0.6B")
    gguf = Model.objects.create(slug="little", name="Little", checkpoint="org/x/little-q4.gguf")
    assert model_for("~/.cache/huggingface/hub/models--Qwen--Qwen3-0.6B/snapshots/0a1b/") == model
    assert model_for("/hub/models--Qwen--Qwen3-0.6B-Base") == other
    assert model_for("/hub/models--org--x-GGUF/snapshots/0a1b/little-q4.gguf") == gguf
    assert model_for("/hub/models--org--nothing/snapshots/0a1b") is None


def test_a_template_that_begins_with_a_slash_is_no_file(rig: Any) -> None:
    model = Model.objects.create(slug="tiny", name="Tiny", checkpoint="/tiny.gguf")
    options = {"chat_template": "/no_think {{ messages }}"}
    profile = profile_create(
        actor=COMMAND_LINE, slug="tiny", name="T", model=model, engine="llama_cpp", device="cpu", options=options
    )
    command, volumes = of_service(export(profile, rig, "compose")[1], "tiny")
    assert options["chat_template"] in command
    assert volumes == {"/models/tiny.gguf": "/tiny.gguf"}


def test_what_has_no_command_line_is_said(rig: Any, client: Client, charlie: Any) -> None:
    model = Model.objects.create(slug="tiny", name="Tiny")
    profile = profile_create(actor=COMMAND_LINE, slug="sim", name="Sim", model=model, engine="simulated")
    with pytest.raises(Invalid, match="export it as yaml"):
        export(profile, rig, "systemd")
    client.force_login(charlie)
    assert client.get("/profiles/sim/export/?format=nonsense").status_code == 404
    assert client.get("/api/v1/profiles/sim/export?format=nonsense").status_code == 422
    answer = client.get("/api/v1/profiles/sim/export")
    assert answer["Content-Disposition"] == 'attachment; filename="sim.yaml"'
    assert yaml.safe_load(answer.content)["model"] == "tiny"
    assert "Export" in client.get("/profiles/sim/").content.decode()


def test_an_address_of_a_page_is_no_slug(rig: Any) -> None:
    model = Model.objects.create(slug="tiny", name="Tiny")
    with pytest.raises(Invalid, match="another page"):
        profile_create(actor=COMMAND_LINE, slug="recipe", name="R", model=model, engine="simulated")


def test_yaml_of_json_types_stays_json(rig: Any) -> None:
    fields = {"options": {"a": "yes", "b": "1e3", "c": "2024-01-01", "d": "null", "e": "0x10"}}
    assert parse_options(form_values(fields)["options"]) == fields["options"]
    assert json.dumps(fields["options"])
