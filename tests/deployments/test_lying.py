"""Where a profile lies on a rig whose cards are not alike, or not equally free."""

from __future__ import annotations

from typing import Any

import pytest

from apps.deployments import lying
from apps.deployments.lying import Lying, Taken, placed, settle
from apps.profiles import fit
from apps.profiles.fit import Verdict
from apps.profiles.forecast import RigState, model_fit, state_when_free, when_free
from apps.profiles.models import ProfileVersion
from apps.profiles.placement import Bridge, Card, RigFacts
from tests.profiles.test_forecast import MODELS

GIB = 2**30
EMBEDDING = "qwen3-embedding-8b"


def rig(*sizes: float) -> RigFacts:
    """Cards of these GiB, 0-1 and 2-3 bridged."""
    cards = tuple(Card(i, f"GPU-{i}", int(size * GIB), None, True, int(size * GIB)) for i, size in enumerate(sizes))
    pairs = [(i, i + 1) for i in range(0, len(cards) - 1, 2)]
    return RigFacts(cards, tuple(Bridge(cards[a].uuid, cards[b].uuid, 4) for a, b in pairs))


FOUR = rig(23.55, 23.55, 23.55, 23.55)


def state(facts: RigFacts, used: dict[int, float] | None = None, sleepers: tuple[int, ...] = ()) -> RigState:
    memory = {
        c.uuid: fit.CardMemory(
            c.cuda_total_bytes or 0, int((used or {}).get(c.index, 0) * GIB), int(c.index in sleepers)
        )
        for c in facts.cards
    }
    return RigState(memory)


def version(slug: str = EMBEDDING, ranks: int = 1, replicas: int = 1, **options: Any) -> ProfileVersion:
    return ProfileVersion(
        model=MODELS[slug],
        engine="vllm",
        device="gpu",
        replicas=replicas,
        tensor_parallel_size=ranks,
        options={"gpu_memory_utilization": 0.9, "max_num_seqs": 32, "max_model_len": 8192, **options},
    )


def settled(profile: ProfileVersion, facts: RigFacts, now: RigState, taken: Taken | None = None) -> Lying:
    taken = taken or Taken()
    return settle(profile, facts, now, placed(profile, facts, taken), taken)


def indices(found: Lying) -> list[int]:
    return [card.index for card in found.placement.cards]


def test_a_card_that_another_program_fills_is_left_where_another_is_empty() -> None:
    found = settled(version(), FOUR, state(FOUR, {0: 12}))
    assert (indices(found), found.forecast.verdict) == ([1], Verdict.FITS)


def test_a_pair_with_a_filled_card_is_left_for_the_other_pair() -> None:
    found = settled(version(ranks=2), FOUR, state(FOUR, {0: 12}))
    assert (indices(found), found.forecast.verdict) == ([2, 3], Verdict.FITS)


def test_a_card_too_small_for_a_model_is_left_for_a_larger_one() -> None:
    mixed = rig(11.6, 23.55)
    assert indices(settled(version(), mixed, state(mixed))) == [1]
    assert indices(settled(version("qwen3-embedding-0-6b"), mixed, state(mixed))) == [0], "the large one stays free"


def test_the_first_that_is_large_enough_is_found_among_several_sizes() -> None:
    mixed = rig(5.6, 7.6, 11.6, 23.55)
    assert indices(settled(version("qwen3-embedding-4b", max_model_len=4096), mixed, state(mixed))) == [2]
    assert indices(settled(version(), mixed, state(mixed))) == [3]


def test_what_fits_is_not_moved_by_a_reading() -> None:
    assert indices(settled(version(), FOUR, state(FOUR, {0: 1.5, 1: 0.1}))) == [0]


def test_nobody_who_serves_is_pushed_out_for_a_roomier_card() -> None:
    taken = Taken(avoid=frozenset({"GPU-1", "GPU-2", "GPU-3"}))
    found = settled(version(), FOUR, state(FOUR, {0: 12}), taken)
    assert (indices(found), found.forecast.verdict) == ([0], Verdict.DOES_NOT_FIT)


def test_the_card_that_falls_short_is_named_as_people_call_it() -> None:
    taken = Taken(avoid=frozenset({"GPU-0", "GPU-1", "GPU-3"}))
    found = settled(version(), FOUR, state(FOUR, {2: 12}), taken)
    assert "of GPU 2 " in found.forecast.sentence


def test_where_it_fits_nowhere_the_advice_is_for_the_cards_that_are_free() -> None:
    """phi-4 needs two cards: beside the filled one nothing would do."""
    found = settled(version("phi-4"), FOUR, state(FOUR, {0: 12}))
    assert found.forecast.verdict is Verdict.DOES_NOT_FIT
    change = found.forecast.suggestions[0]
    assert (change.replicas, change.tensor_parallel_size) == (1, 2)
    taken_up = settled(version("phi-4", ranks=2), FOUR, state(FOUR, {0: 12}))
    assert (indices(taken_up), taken_up.forecast.verdict) == ([2, 3], Verdict.FITS)


@pytest.mark.parametrize("ranks", [1, 2])
def test_among_equal_cards_nothing_is_looked_for_twice(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    real = lying.forecast
    monkeypatch.setattr(lying, "forecast", lambda *args, **kw: made.append(1) or real(*args, **kw))
    found = settled(version("mixtral-8x22b-instruct-awq", ranks), FOUR, state(FOUR))
    assert found.forecast.verdict is Verdict.DOES_NOT_FIT
    assert len(made) == 1


def test_sleepers_are_stopped_on_the_card_that_is_large_enough() -> None:
    mixed = rig(11.6, 23.55)
    taken = Taken(slept_on=frozenset({"GPU-1"}))
    found = settled(version(gpu_memory_utilization=0.96), mixed, state(mixed, sleepers=(1,)), taken)
    assert (indices(found), found.stops_sleepers) == ([1], True)
    beside = settled(version(), mixed, state(mixed, sleepers=(1,)), taken)
    assert (indices(beside), beside.stops_sleepers) == ([1], False)


def test_an_empty_rig_is_judged_by_its_largest_cards() -> None:
    mixed = rig(11.6, 23.55)
    found = when_free(version(), mixed, state_when_free(mixed))
    assert (found.verdict, found.cards[0].index) == (Verdict.FITS, 1)
    word, sentence = model_fit(MODELS["qwen3-embedding-4b"], mixed)
    assert (word, sentence[:4]) == ("fits", "TP1:")
