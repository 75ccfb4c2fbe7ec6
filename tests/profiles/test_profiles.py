"""Profiles and their immutable versions."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from django.db import connection, transaction
from django.db.utils import DatabaseError

from apps.audit.models import AuditEntry
from apps.catalog.models import Model
from apps.common.actors import actor_of
from apps.common.errors import Conflict, Invalid, NotFound
from apps.engines.registry import adapter
from apps.profiles.forecast import state_when_free, when_free
from apps.profiles.models import Profile, ProfileVersion
from apps.profiles.placement import Card, RigFacts
from apps.profiles.selectors import history, newest, profile_get, profile_list
from apps.profiles.services import load_shipped, profile_archive, profile_create, profile_restore, profile_update
from apps.profiles.shipped import SHIPPED_PROFILES

FACTS = RigFacts(tuple(Card(i, f"GPU-{i}", 24 * 2**30, 0, True, int(23.55 * 2**30)) for i in range(4)), ())


def verdict(version: ProfileVersion) -> str:
    return when_free(version, FACTS, state_when_free(FACTS, host_total_bytes=128 * 2**30)).word


@pytest.fixture
def model(db: None) -> Model:
    return Model.objects.create(
        slug="lab-32b",
        name="Lab 32B",
        checkpoint="/srv/lab-32b",
        attention_heads=40,
        kv_heads=8,
        weights_bytes=20 * 10**9,
    )


def make(model: Model, person: Any, **values: Any) -> Profile:
    defaults = {"slug": "lab-tp2", "name": "Lab 32B", "engine": "vllm", "tensor_parallel_size": 2}
    return profile_create(actor=actor_of(person), model=model, **(defaults | values))


@pytest.mark.django_db
def test_the_five_shipped_profiles_load_and_loading_again_changes_nothing() -> None:
    assert load_shipped() == 47 + 5
    assert load_shipped() == 0
    assert sorted(Profile.objects.values_list("slug", flat=True)) == [
        "gemma-3-270m-cpu",
        "mixtral-8x22b-tp4",
        "qwen25-coder-32b-2xtp2",
        "qwen25-coder-32b-tp4",
        "r1-distill-70b-tp4",
    ]
    assert ProfileVersion.objects.count() == 5
    assert profile_get("gemma-3-270m-cpu").members_may_switch
    assert profile_get("qwen25-coder-32b-2xtp2").current.layout == "2×TP2"
    assert profile_get("gemma-3-270m-cpu").current.layout == "CPU"
    assert profile_get("mixtral-8x22b-tp4").current.served_name == "mixtral-8x22b-instruct-awq"


@pytest.mark.parametrize("shipped", SHIPPED_PROFILES, ids=lambda shipped: shipped.slug)
def test_shipped_options_are_in_the_engines_own_normal_form(shipped: Any) -> None:
    assert adapter(shipped.engine).check(shipped.options) == shipped.options


@pytest.mark.django_db
def test_shipped_profiles_fit_four_3090s() -> None:
    load_shipped()
    assert {p.slug: verdict(newest(p)) for p in profile_list()} == dict.fromkeys(
        (
            "gemma-3-270m-cpu",
            "mixtral-8x22b-tp4",
            "r1-distill-70b-tp4",
            "qwen25-coder-32b-2xtp2",
            "qwen25-coder-32b-tp4",
        ),
        "fits",
    )


@pytest.mark.django_db
def test_mixtral_with_its_native_context_does_not_fit(olivia: Any) -> None:
    load_shipped()
    profile = profile_get("mixtral-8x22b-tp4")
    profile_update(profile, actor=actor_of(olivia), options={**profile.current.options, "max_model_len": 65536})
    assert verdict(profile.current) == "does not fit"


def test_a_profile_gets_version_one_and_the_models_slug_as_its_name_at_the_gateway(model: Model, olivia: Any) -> None:
    profile = make(model, olivia, options={"--max-model-len": 8192})
    version = profile.current
    assert (version.number, version.served_name, version.options) == (1, "lab-32b", {"max_model_len": 8192})
    assert version.created_by_name == "olivia"
    assert AuditEntry.objects.get(action="profile.create").detail["version"]["model"] == "lab-32b"


def test_only_a_change_of_how_it_is_served_makes_a_version(model: Model, olivia: Any) -> None:
    profile = make(model, olivia, options={"max_model_len": 8192})
    profile_update(profile, actor=actor_of(olivia), description="For the afternoon.", members_may_switch=True)
    assert profile.versions.count() == 1
    profile_update(profile, actor=actor_of(olivia), options={"max_model_len": "8192"})  # the same, typed as text
    assert profile.versions.count() == 1
    changed = profile_update(
        profile, actor=actor_of(olivia), options={"max_model_len": 16384}, replicas=2, note="More room."
    )
    assert changed.current.number == 2
    assert changed.current.note == "More room."
    (newest_version, changes), (_, first) = history(changed)
    assert newest_version.number == 2
    assert [(c.field, c.before, c.after) for c in changes] == [("replicas", "1", "2"), ("max_model_len", 8192, 16384)]
    assert first == []
    told = AuditEntry.objects.filter(action="profile.update").latest("sequence").detail
    assert told == {"version": 2, "changed": {"replicas": ["1", "2"], "max_model_len": [8192, 16384]}}


def test_an_update_that_changes_nothing_leaves_no_trace(model: Model, olivia: Any) -> None:
    profile = make(model, olivia)
    before = AuditEntry.objects.count()
    profile_update(profile, actor=actor_of(olivia), name="Lab 32B", replicas=1)
    assert AuditEntry.objects.count() == before


def test_the_database_refuses_to_change_a_version(model: Model, olivia: Any) -> None:
    version = make(model, olivia).current
    with pytest.raises(DatabaseError), transaction.atomic():
        ProfileVersion.objects.filter(pk=version.pk).update(replicas=4)
    assert ProfileVersion.objects.get(pk=version.pk).replicas == 1


def test_the_served_name_follows_the_model_until_somebody_chose_one(model: Model, olivia: Any) -> None:
    other = Model.objects.create(slug="lab-33b", name="Lab 33B")
    profile = make(model, olivia)
    assert profile_update(profile, actor=actor_of(olivia), model=other).current.served_name == "lab-33b"
    profile_update(profile, actor=actor_of(olivia), served_name="house-model")
    assert profile_update(profile, actor=actor_of(olivia), model=model).current.served_name == "house-model"


@pytest.mark.parametrize(
    ("values", "field", "words"),
    [
        ({"options": {"max_modle_len": 1}}, "options", "Did you mean max_model_len"),
        ({"options": {"port": 8000}}, "options", "free port"),
        ({"options": {"swap_space": 4}}, "options", "no longer has --swap-space"),
        ({"options": {"gpu_memory_utilization": 1.5}}, "options", "gpu_memory_utilization"),
        ({"options": {"load_format": "auto\nx"}}, "options", "load_format"),
        ({"options": ["a"]}, "options", "names with values"),
        ({"options": {"hf_overrides": {"x": "y" * 30000}}}, "options", "too long"),
        ({"engine": "ray_serve", "options": {"num_replicas": 2}}, "options", "the profile's layout"),
        ({"engine": "$(reboot)"}, "engine", "no engine"),
        ({"device": "tpu"}, "device", "gpu or cpu"),
        ({"replicas": 0}, "replicas", "whole number"),
        ({"replicas": True}, "replicas", "whole number"),
        ({"replicas": 40}, "replicas", "80 GPUs"),
        ({"tensor_parallel_size": 3}, "tensor_parallel_size", "40 attention heads"),
        ({"served_name": "--help"}, "served_name", "beginning with a letter"),
        ({"served_name": "two words"}, "served_name", "Use letters"),
        ({"slug": "../up"}, "slug", "lowercase"),
        ({"slug": "42"}, "slug", "letter"),
        ({"name": " "}, "name", "Give it a name"),
    ],
)
def test_what_cannot_be_served_is_refused_with_a_sentence_for_its_field(
    model: Model, olivia: Any, values: dict[str, Any], field: str, words: str
) -> None:
    with pytest.raises(Invalid) as refused:
        make(model, olivia, **values)
    assert words in " ".join(refused.value.fields[field])
    assert not Profile.objects.exists()


def test_everything_wrong_is_told_at_once(model: Model, olivia: Any) -> None:
    with pytest.raises(Invalid) as refused:
        make(model, olivia, slug="Bad", replicas=0, options={"nonsense": 1})
    assert set(refused.value.fields) == {"slug", "replicas", "options"}


def test_a_slug_is_taken_once(model: Model, olivia: Any) -> None:
    make(model, olivia)
    with pytest.raises(Conflict, match="already a profile lab-tp2"):
        make(model, olivia)


def test_fields_that_a_profile_does_not_have_cannot_be_changed(model: Model, olivia: Any) -> None:
    with pytest.raises(Invalid, match="slug"):
        profile_update(make(model, olivia), actor=actor_of(olivia), slug="other")


def test_an_archived_profile_is_out_of_the_lists_not_changeable_and_can_come_back(model: Model, olivia: Any) -> None:
    profile = profile_archive(make(model, olivia), actor=actor_of(olivia))
    assert list(profile_list()) == []
    assert list(profile_list(include_archived=True)) == [profile]
    with pytest.raises(Conflict, match="archived"):
        profile_update(profile, actor=actor_of(olivia), name="New")
    profile_restore(profile, actor=actor_of(olivia))
    assert list(profile_list()) == [profile]


@pytest.mark.django_db
def test_an_edited_shipped_profile_is_the_teams_own_and_an_archived_one_stays_away(olivia: Any) -> None:
    load_shipped()
    actor = actor_of(olivia)
    profile_update(profile_get("mixtral-8x22b-tp4"), actor=actor, options={"max_model_len": 16384})
    profile_archive(profile_get("r1-distill-70b-tp4"), actor=actor)
    assert load_shipped() == 0
    assert profile_get("mixtral-8x22b-tp4").current.options == {"max_model_len": 16384}
    assert profile_get("r1-distill-70b-tp4").archived_at is not None


@pytest.mark.django_db
def test_a_newer_rigpanel_gives_an_untouched_shipped_profile_a_new_version() -> None:
    load_shipped()
    profile = profile_get("qwen25-coder-32b-tp4")
    ProfileVersion.objects.create(  # as an older release would have shipped it
        profile=profile,
        number=2,
        model=profile.current.model,
        engine="vllm",
        tensor_parallel_size=4,
        served_name=profile.current.served_name,
        options={"max_model_len": 4096},
    )
    assert load_shipped() == 1
    assert profile.current.number == 3
    assert profile.current.options["max_model_len"] == 32768
    assert profile_get(profile.slug).shipped


def test_references_are_slugs_or_ids_and_anything_else_is_not_found(model: Model, olivia: Any) -> None:
    profile = make(model, olivia)
    assert profile_get("lab-tp2") == profile_get(profile.pk) == profile_get(str(profile.pk)) == profile
    for nothing in ("", "no-such", "9" * 30, "-1", "'; drop table"):
        with pytest.raises(NotFound):
            profile_get(nothing)


@pytest.mark.django_db(transaction=True)
def test_two_edits_at_once_make_two_versions_and_no_number_twice(olivia: Any) -> None:
    model = Model.objects.create(slug="lab-32b", name="Lab 32B")
    profile = profile_create(actor=actor_of(olivia), slug="lab", name="Lab", model=model, engine="vllm")
    start = threading.Barrier(4)
    errors: list[BaseException] = []

    def edit(length: int) -> None:
        try:
            start.wait(timeout=30)
            profile_update(profile, actor=actor_of(olivia), options={"max_model_len": length})
        except BaseException as error:  # shown below
            errors.append(error)
        finally:
            connection.close()

    threads = [threading.Thread(target=edit, args=(1024 * n,)) for n in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert errors == []
    assert sorted(ProfileVersion.objects.filter(profile=profile).values_list("number", flat=True)) == [1, 2, 3, 4, 5]
    lengths = [v.options["max_model_len"] for v in profile.versions.filter(number__gt=1)]
    assert sorted(lengths) == [1024, 2048, 3072, 4096]
