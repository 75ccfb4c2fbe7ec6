"""A context for each slot counts in the plan as what it gives all slots together."""

from __future__ import annotations

from apps.engines.llama_cpp.adapter import LlamaCppAdapter
from apps.profiles.engine_options import llama_options, with_changes


def test_a_context_for_each_slot_is_counted_for_all_slots() -> None:
    assert llama_options({"context_tokens_per_slot": 8192, "parallel": 4}).context_tokens == 32768
    assert llama_options({"context_tokens_per_slot": 8192}).context_tokens == 8192
    assert llama_options({"context_tokens": 4096, "parallel": 4}).context_tokens == 4096


def test_a_proposed_context_takes_the_place_of_one_for_each_slot() -> None:
    after = with_changes({"context_tokens_per_slot": 8192, "parallel": 4}, {"context_tokens": 16384})
    assert after == {"parallel": 4, "context_tokens": 16384}
    assert LlamaCppAdapter().check(after) == {"context_tokens": 16384, "parallel": 4}
    assert with_changes({"context_tokens_per_slot": 8192}, {"cache_type_k": "q8_0"})["context_tokens_per_slot"] == 8192
