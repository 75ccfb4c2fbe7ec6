"""A profile's options as the planner takes them, and the whole catalogue on the rigs that people have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import apps.catalog
from apps.catalog.models import Model
from apps.profiles.engine_options import llama_options, version_of, vllm_options
from apps.profiles.fit import KV_CACHE_DTYPES, Verdict
from apps.profiles.forecast import Forecast, forecast, model_fit, state_when_free
from apps.profiles.models import ProfileVersion
from apps.profiles.placement import Card, DoesNotFit, RigFacts, place
from tests.profiles.test_placement import rig

GIB = 2**30
ENTRIES = json.loads((Path(apps.catalog.__file__).parent / "data" / "models.json").read_text("utf-8"))["models"]
FIELDS = {field.name for field in Model._meta.get_fields()}


def model_of(entry: dict[str, Any]) -> Model:
    values = {name: value for name, value in entry.items() if name in FIELDS and value is not None}
    return Model(**values)


MODELS = {entry["slug"]: model_of(entry) for entry in ENTRIES}


def cards(facts: RigFacts) -> RigFacts:
    """With the memory that CUDA reports of a 3090."""
    return RigFacts(
        tuple(
            Card(c.index, c.uuid, 24 * GIB, c.numa_node, c.present, int(23.55 * GIB), c.pcie_width) for c in facts.cards
        ),
        facts.bridges,
    )


RIGS = {
    "0-1/2-3": cards(rig((0, 1), (2, 3))),
    "0-2/1-3": cards(rig((0, 2), (1, 3))),
    "one dead bridge": cards(rig((0, 1), (2, 3), dead={(0, 1)})),
    "a missing card": cards(rig((0, 1), (2, 3), missing={3})),
}


def planned(slug: str, facts: RigFacts, replicas: int, ranks: int, **options: Any) -> Forecast:
    version = ProfileVersion(
        model=MODELS[slug],
        engine="vllm",
        device="gpu",
        replicas=replicas,
        tensor_parallel_size=ranks,
        options={"gpu_memory_utilization": 0.9, "max_num_seqs": 32, **options},
    )
    try:
        placement = place(facts, replicas=replicas, tensor_parallel_size=ranks)
        chosen = [card for cards in placement.replicas for card in cards]
    except DoesNotFit:
        chosen = []
    others = [c for c in facts.cards if c.present and c not in chosen]
    return forecast(version, chosen, others, state_when_free(facts))


@pytest.mark.parametrize("name", RIGS)
def test_every_model_is_planned_in_every_layout(name: str) -> None:
    facts = RIGS[name]
    present = sum(c.present for c in facts.cards)
    for slug in MODELS:
        for replicas, ranks in ((1, 4), (2, 2), (4, 1), (1, 2), (1, 1)):
            found = planned(slug, facts, replicas, ranks)
            assert found.sentence.endswith("."), slug
            assert len(found.estimate.gpus) in (0, replicas * ranks)
            if replicas * ranks > present:
                assert found.verdict is Verdict.DOES_NOT_FIT
                assert f"the rig has {present}" in found.sentence
            for suggestion in found.suggestions:
                assert suggestion.replicas * suggestion.tensor_parallel_size <= present
                again = planned(slug, facts, suggestion.replicas, suggestion.tensor_parallel_size, **suggestion.options)
                assert again.verdict is Verdict.FITS, (slug, suggestion.sentence)


def test_what_people_who_know_such_rigs_expect() -> None:
    facts = RIGS["0-2/1-3"]
    words = {slug: model_fit(model, facts)[0] for slug, model in MODELS.items()}
    for slug in ("qwen3-5-397b-a17b", "qwen3-235b-a22b", "kimi-k2-5", "glm-4-7", "minimax-m2-5", "step-3-5-flash"):
        assert words[slug] == "does not fit", slug
    for slug in ("qwen3-5-122b-a10b-gptq-int4", "gpt-oss-120b", "glm-4-5-air-awq", "mistral-small-4-119b"):
        assert words[slug] in ("fits", "tight"), slug
        assert planned(slug, facts, 2, 2).verdict is Verdict.DOES_NOT_FIT, slug
    assert words["mixtral-8x22b-instruct-awq"] == "tight", "its native context must be shortened"
    assert words["phi-4"] == "fits"
    assert "KV heads" in planned("phi-4", facts, 1, 4).sentence
    assert words["command-r-08-2024"] == "not known"


def test_options_become_what_takes_memory() -> None:
    def read(**options: Any) -> Any:
        return vllm_options(options, card_bytes=24 * GIB, version=(0, 33))

    assert (read().max_num_seqs, read().max_num_batched_tokens, read().gpu_memory_utilization) == (256, 2048, 0.92)
    large = vllm_options({}, card_bytes=80 * GIB, version=(0, 33))
    assert (large.max_num_seqs, large.max_num_batched_tokens) == (1024, 8192)
    assert read(performance_mode="throughput").max_num_seqs == 512
    assert read(optimization_level=0).enforce_eager
    assert read(max_model_len="auto").auto_max_model_len
    assert read(compilation_config={"cudagraph_mode": "NONE"}).max_cudagraph_capture_size == 0
    assert read(cpu_offload_gb=2).cpu_offload_bytes == 2 * GIB
    assert llama_options({}).gpu_layers == "all"
    assert llama_options({"extra_args": ["--swa-full"], "tensor_split": [3, 1]}).tensor_split == (3.0, 1.0)
    assert [version_of(v) for v in ("0.26.0", "0.33.1+cu130", "b11434", "")] == [(0, 26), (0, 33), (0, 33), (0, 33)]


def test_a_cache_type_that_is_not_known_forbids_nothing() -> None:
    assert "turboquant_4bit_nc" not in KV_CACHE_DTYPES
    found = planned("mixtral-8x22b-instruct-awq", RIGS["0-1/2-3"], 1, 4, kv_cache_dtype="turboquant_4bit_nc")
    assert found.verdict is None
    assert "turboquant_4bit_nc is not known" in found.sentence
    assert found.suggestions == ()


def test_what_is_not_counted_is_said() -> None:
    found = planned("phi-4", RIGS["0-1/2-3"], 1, 2, speculative_config={"model": "x"}, enable_lora=True)
    assert sum("not counted" in warning for warning in found.estimate.warnings) == 2
