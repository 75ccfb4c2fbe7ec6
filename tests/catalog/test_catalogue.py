"""The shipped catalogue, a team's own entries, and who may change which."""

from __future__ import annotations

from typing import Any

import pytest

from apps.audit.models import AuditEntry
from apps.audit.services import verify_chain
from apps.catalog.models import Model
from apps.catalog.selectors import model_get, model_list, weights_path
from apps.catalog.services import (
    load_shipped,
    model_create,
    model_delete,
    model_update,
    shipped_catalogue,
    weights_register,
)
from apps.common.actors import actor_of
from apps.common.errors import Conflict, Invalid, NotFound


@pytest.mark.django_db
def test_the_shipped_catalogue_loads_once_and_a_second_time_changes_nothing() -> None:
    assert load_shipped() == 47
    entries = AuditEntry.objects.count()
    assert load_shipped() == 0
    assert Model.objects.filter(shipped=True).count() == 47
    assert AuditEntry.objects.count() == entries


@pytest.mark.django_db
def test_the_seed_models_carry_the_byte_counts_that_their_shapes_give() -> None:
    """Parameter counts follow from the shapes exactly; AWQ g128 with zero points is 0.5 + 2.5/128 bytes a weight."""
    load_shipped()
    mixtral = model_get("mixtral-8x22b-instruct-awq")
    assert (mixtral.weights_bytes, mixtral.kv_bytes_per_token) == (73_662_922_752, 229_376)
    assert mixtral.kv_bytes_per_token == 2 * 2 * mixtral.layers * mixtral.kv_heads * mixtral.head_dim  # type: ignore[operator]
    attention = 2 * 6144 * 48 * 128 + 2 * 6144 * 8 * 128
    experts = 8 * 3 * 6144 * 16384
    small = 56 * (8 * 6144 + 2 * 6144) + 6144
    total = 56 * (attention + experts) + small + 2 * 32768 * 6144
    assert mixtral.params_total == total
    linear = 56 * (attention + experts)
    assert mixtral.weights_bytes == pytest.approx(
        linear * (0.5 + 2.5 / 128) + 2 * (total - linear), abs=2 * 6144
    )  # one norm


def test_every_shipped_entry_names_its_sources_and_says_nothing_it_does_not_know() -> None:
    entries = shipped_catalogue().models
    assert all(entry.sources for entry in entries)
    assert len({entry.slug for entry in entries}) == len(entries)
    by_slug = {entry.slug: entry for entry in entries}
    assert by_slug["command-r-08-2024"].layers is None
    assert by_slug["gemma-4-31b-it"].kv is not None
    assert by_slug["gemma-4-31b-it"].kv.bytes_per_token_bf16 is None
    assert "not confirmed" in by_slug["mixtral-8x22b-instruct-awq"].checkpoint_note
    assert by_slug["gemma-3-270m"].chat_template == "gemma"


@pytest.mark.django_db
def test_an_update_of_rigpanel_brings_shipped_entries_up_to_date_but_not_those_of_the_team(olivia: Any) -> None:
    load_shipped()
    Model.objects.filter(slug="phi-4").update(layers=1)
    model_update(model_get("gpt-oss-20b"), actor=actor_of(olivia), notes=["We keep it on GPU 3."])
    assert load_shipped() == 1
    assert model_get("phi-4").layers == 40
    assert model_get("gpt-oss-20b").notes == ["We keep it on GPU 3."]
    assert not model_get("gpt-oss-20b").shipped


@pytest.mark.django_db
def test_a_team_adds_changes_and_removes_its_own_model_and_the_chain_says_so(olivia: Any) -> None:
    actor = actor_of(olivia)
    model = model_create(
        actor=actor, slug="lab-7b", name="Lab 7B", checkpoint="/srv/models/lab-7b", weights_bytes=14_000_000_000
    )
    model_update(model, actor=actor, max_context_tokens=8192)
    model_update(model, actor=actor, max_context_tokens=8192)
    model_delete(model, actor=actor)
    told = list(AuditEntry.objects.order_by("sequence").values_list("action", "actor_name", "detail"))
    assert [action for action, _, _ in told] == ["model.create", "model.update", "model.delete"]
    assert told[1][1:] == ("olivia", {"max_context_tokens": [None, 8192]})
    assert verify_chain().whole
    with pytest.raises(NotFound):
        model_get("lab-7b")


@pytest.mark.django_db
def test_a_slug_is_taken_once_and_never_renamed(olivia: Any) -> None:
    actor = actor_of(olivia)
    model = model_create(actor=actor, slug="lab-7b", name="Lab 7B")
    with pytest.raises(Conflict, match="already a model lab-7b"):
        model_create(actor=actor, slug="lab-7b", name="Another")
    with pytest.raises(Invalid, match="slug cannot be changed"):
        model_update(model, actor=actor, slug="lab-8b")


@pytest.mark.django_db
def test_a_shipped_model_cannot_be_deleted_because_it_would_come_back(olivia: Any) -> None:
    load_shipped()
    with pytest.raises(Conflict, match="come back"):
        model_delete(model_get("phi-4"), actor=actor_of(olivia))


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("slug", "../etc"),
        ("slug", "Upper"),
        ("slug", "a--b"),
        ("name", "  "),
        ("name", "two\nlines"),
        ("hf_repo", "https://evil.example/x"),
        ("hf_repo", "--trust-remote-code/x"),
        ("checkpoint", "--trust-remote-code"),
        ("checkpoint", "/models/../../etc/passwd"),
        ("checkpoint", "../secret.gguf"),
        ("checkpoint", "plainword"),
        ("checkpoint", "/models/a\x00b"),
        ("weights_bytes", -1),
        ("weights_bytes", 10**30),
        ("layers", "many"),
        ("layers", True),
        ("tool_parser", "hermes --x"),
        ("kv", {"kind": "magic"}),
        ("kv", {"kind": "gqa_full", "colour": 1}),
        ("sources", ["x" * 5000]),
        ("colour", "green"),
    ],
)
def test_hostile_and_odd_facts_are_refused_with_a_sentence_for_the_field(
    olivia: Any, field: str, value: object
) -> None:
    facts = {"slug": "lab-7b", "name": "Lab 7B", field: value}
    with pytest.raises(Invalid) as refused:
        model_create(actor=actor_of(olivia), **facts)
    assert list(refused.value.fields) == [field]
    assert not Model.objects.exists()


@pytest.mark.django_db
def test_search_goes_by_words_and_weights_come_along() -> None:
    load_shipped()
    coder = model_get("qwen2.5-coder-32b-instruct-awq")  # people type the dots
    weights_register(coder, rig_name="bench-01", path="/srv/coder", size_bytes=19)
    weights_register(coder, rig_name="bench-01", path="/srv/coder-2", size_bytes=20)
    found = list(model_list("coder 32b", "bench-01"))
    assert [m.slug for m in found] == ["qwen2-5-coder-32b-instruct-awq"]
    assert [w.path for w in found[0].here] == ["/srv/coder-2"]  # type: ignore[attr-defined]
    assert weights_path(coder, "bench-01") == "/srv/coder-2"
    assert weights_path(coder, "bench-02") is None
    assert list(model_list("nothing-like-it")) == []
