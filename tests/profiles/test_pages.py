"""The profiles' pages."""

from __future__ import annotations

from typing import Any

import pytest
from django.test import Client
from django.utils import timezone

from apps.common.actors import COMMAND_LINE
from apps.profiles.forms import options_text, parse_options
from apps.profiles.preview import preview, rig_facts
from apps.profiles.selectors import profile_get
from apps.profiles.services import load_shipped, profile_archive

pytestmark = pytest.mark.django_db

FORM = {
    "name": "Mixtral, longer",
    "model": "mixtral-8x22b-instruct-awq",
    "engine": "vllm",
    "device": "gpu",
    "replicas": "1",
    "tensor_parallel_size": "4",
    "pipeline_parallel_size": "1",
    "options": "max_model_len = 40000\ngpu_memory_utilization = 0.95",
}


def test_a_member_sees_switch_only_where_members_may(client: Client, rig: Any, bob: Any, charlie: Any) -> None:
    load_shipped()
    client.force_login(bob)
    page = client.get("/profiles/").content.decode()
    assert page.count('name="profile"') == 1
    assert 'value="gemma-3-270m-cpu"' in page
    client.force_login(charlie)
    assert 'name="profile"' not in client.get("/profiles/").content.decode()


def test_the_page_shows_the_exact_line_without_the_flags_that_the_guide_got_wrong(
    client: Client, rig: Any, charlie: Any
) -> None:
    load_shipped()
    client.force_login(charlie)
    page = client.get("/profiles/mixtral-8x22b-tp4/").content.decode()
    for words in ("vllm serve MaziyarPanahi/", "--max-model-len 32768", "--disable-custom-all-reduce", "0-1 and 2-3"):
        assert words in page
    preview_text = page.partition("<pre")[2].partition("</pre>")[0]
    for words in ("--quantization", "--swap-space", "--api-key", "a-key-of-its-own"):
        assert words not in preview_text


def test_cards_that_others_have_replaced_are_not_told_as_missing(rig: Any) -> None:
    load_shipped()
    version = profile_get("mixtral-8x22b-tp4").current
    rig.gpus.filter(index=3).update(present=False)
    assert "(GPU 3 is missing)" in preview(version, rig, rig_facts(rig)).problem
    rig.gpus.filter(index=3).update(retired_at=timezone.now())
    assert preview(version, rig, rig_facts(rig)).problem == (
        "This layout needs 4 GPUs; the rig has only 3. Choose a smaller layout."
    )


def test_two_replicas_are_previewed_on_the_two_bridged_pairs(rig: Any) -> None:
    load_shipped()
    version = profile_get("qwen25-coder-32b-2xtp2").current
    shown = preview(version, rig, rig_facts(rig))
    assert [line.partition("CUDA_VISIBLE_DEVICES=")[2].partition(" ")[0] for line in shown.lines] == [
        "GPU-bench-01-0,GPU-bench-01-1",
        "GPU-bench-01-2,GPU-bench-01-3",
    ]
    assert all("--disable-custom-all-reduce" not in line for line in shown.lines)


def test_a_profile_that_does_not_fit_says_so_in_place_of_a_line(client: Client, rig: Any, charlie: Any) -> None:
    load_shipped()
    rig.gpus.filter(index=3).update(present=False)
    client.force_login(charlie)
    page = client.get("/profiles/mixtral-8x22b-tp4/").content.decode()
    assert "needs 4 GPUs; the rig has only 3 (GPU 3 is missing)" in page


def test_an_edit_makes_a_version_and_its_page_shows_what_changed(client: Client, rig: Any, olivia: Any) -> None:
    load_shipped()
    client.force_login(olivia)
    answer = client.post("/profiles/mixtral-8x22b-tp4/edit/", FORM | {"note": "Try a longer one"})
    assert answer.status_code == 302
    page = client.get(answer["Location"]).content.decode()
    assert "Version 2 is stored" in page
    assert "Try a longer one" in page
    assert "32768</span> → 40000" in page
    version = profile_get("mixtral-8x22b-tp4").current
    assert version.options == {"max_model_len": 40000, "gpu_memory_utilization": 0.95, "max_num_seqs": 32} or (
        version.options == {"max_model_len": 40000, "gpu_memory_utilization": 0.95}
    )
    assert version.served_name == "mixtral-8x22b-instruct-awq"


def test_a_wrong_edit_answers_422_keeps_the_text_and_names_each_mistake(client: Client, rig: Any, olivia: Any) -> None:
    load_shipped()
    client.force_login(olivia)
    typed = "max_modle_len = 1\nport = 80\n<script>alert(1)</script> = 2"
    answer = client.post("/profiles/mixtral-8x22b-tp4/edit/", FORM | {"options": typed, "tensor_parallel_size": "5"})
    page = answer.content.decode()
    assert answer.status_code == 422
    assert "Did you mean max_model_len?" in page
    assert "free port" in page
    assert "48 attention heads" in page
    assert "&lt;script&gt;alert(1)" in page
    assert "<script>alert(1)" not in page
    assert profile_get("mixtral-8x22b-tp4").versions.count() == 1


def test_a_new_profile_from_a_copy_and_its_archive(client: Client, rig: Any, olivia: Any) -> None:
    load_shipped()
    client.force_login(olivia)
    assert "max_model_len = 32768" in client.get("/profiles/new/?copy=mixtral-8x22b-tp4").content.decode()
    assert client.get("/profiles/new/?copy=no-such").status_code == 404
    assert client.post("/profiles/new/", FORM | {"slug": "mine"})["Location"] == "/profiles/mine/"
    assert client.post("/profiles/new/", FORM | {"slug": "mine"}).status_code == 422
    assert client.post("/profiles/mine/archive/").status_code == 302
    assert "/profiles/mine/" not in client.get("/profiles/").content.decode()
    assert "/profiles/mine/" in client.get("/profiles/?archived=1").content.decode()
    client.post("/profiles/mine/archive/", {"restore": "1"})
    assert profile_get("mine").archived_at is None


def test_an_archived_profile_cannot_be_edited(client: Client, rig: Any, olivia: Any) -> None:
    load_shipped()
    profile_archive(profile_get("mixtral-8x22b-tp4"), actor=COMMAND_LINE)
    client.force_login(olivia)
    answer = client.post("/profiles/mixtral-8x22b-tp4/edit/", FORM)
    assert answer.status_code == 422
    assert "archived" in answer.content.decode()


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("", {}),
        ("max_model_len = 32768\n# a remark\n\nenforce_eager = true", {"max_model_len": 32768, "enforce_eager": True}),
        ("--max-model-len 32768 \n--enforce-eager", {"max_model_len": 32768, "enforce_eager": True}),
        ("--max-model-len=32768", {"max_model_len": 32768}),
        ("kv_cache_dtype = fp8", {"kv_cache_dtype": "fp8"}),
        ('{"max_num_seqs": 8}', {"max_num_seqs": 8}),
        ('hf_overrides = {"a": [1, "b=c"]}', {"hf_overrides": {"a": [1, "b=c"]}}),
    ],
)
def test_options_are_read_as_people_write_them(text: str, options: dict[str, Any]) -> None:
    assert parse_options(text) == options
    assert parse_options(options_text(options)) == options


@pytest.mark.parametrize("text", ["{not json", "max_model_len 32768", "= 4", "two words = 1", "a = 1\na = 2"])
def test_options_that_are_not_understood_say_where(text: str) -> None:
    with pytest.raises(ValueError, match=r"Line \d|not JSON"):
        parse_options(text)
