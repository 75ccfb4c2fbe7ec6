"""Placement over the pairings that quad-3090 rigs really have."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apps.profiles.placement import Bridge, Card, DoesNotFit, Placement, RigFacts, place

VISIBLE_BYTES = 24112 * 2**20


def rig(
    *pairs: tuple[int, int],
    cards: int = 4,
    lanes: int = 4,
    missing: Collection[int] = (),
    dead: Collection[tuple[int, int]] = (),
    numa: Mapping[int, int] | None = None,
) -> RigFacts:
    return RigFacts(
        tuple(Card(i, f"GPU-{i}", VISIBLE_BYTES, (numa or {}).get(i, 0), i not in missing) for i in range(cards)),
        tuple(Bridge(f"GPU-{a}", f"GPU-{b}", 0 if (a, b) in dead else lanes) for a, b in pairs),
    )


def indexes(placement: Placement) -> list[list[int]]:
    return [[c.index for c in replica] for replica in placement.replicas]


def uuids(*numbers: int) -> frozenset[str]:
    return frozenset(f"GPU-{n}" for n in numbers)


NEIGHBOURS = rig((0, 1), (2, 3))
CROSSED = rig((0, 2), (1, 3))


def test_two_tp2_replicas_sit_on_neighbouring_pairs() -> None:
    placement = place(NEIGHBOURS, replicas=2, tensor_parallel_size=2)
    assert indexes(placement) == [[0, 1], [2, 3]]
    assert placement.nvlinked
    assert placement.warnings == ()


def test_two_tp2_replicas_sit_on_crossed_pairs_where_the_bridges_are() -> None:
    placement = place(CROSSED, replicas=2, tensor_parallel_size=2)
    assert indexes(placement) == [[0, 2], [1, 3]]
    assert placement.nvlinked
    assert placement.warnings == ()


def test_one_tp2_replica_takes_the_pair_whose_bridge_works() -> None:
    placement = place(rig((0, 1), (2, 3), dead={(0, 1)}), replicas=1, tensor_parallel_size=2)
    assert indexes(placement) == [[2, 3]]
    assert placement.nvlinked
    assert placement.warnings == ()


def test_a_replica_on_a_dead_bridge_says_what_it_costs() -> None:
    placement = place(rig((0, 1), (2, 3), dead={(0, 1)}), replicas=2, tensor_parallel_size=2)
    assert indexes(placement) == [[0, 1], [2, 3]]
    assert not placement.nvlinked
    (warning,) = placement.warnings
    assert "between GPUs 0 and 1 is dead" in warning
    assert "35–49 %" in warning


def test_without_any_bridge_tp2_says_that_it_goes_over_pcie() -> None:
    placement = place(rig(), replicas=1, tensor_parallel_size=2)
    assert indexes(placement) == [[0, 1]]
    assert not placement.nvlinked
    assert "no NVLink bridge" in placement.warnings[0]


def test_a_bridge_with_lost_lanes_is_used_last_and_named() -> None:
    facts = RigFacts(NEIGHBOURS.cards, (Bridge("GPU-0", "GPU-1", 2), Bridge("GPU-2", "GPU-3", 4)))
    assert indexes(place(facts, replicas=1, tensor_parallel_size=2)) == [[2, 3]]
    assert any("2 of 4 lanes" in w for w in place(facts, replicas=2, tensor_parallel_size=2).warnings)


@pytest.mark.parametrize(("facts", "shown"), [(NEIGHBOURS, "0-1 and 2-3"), (CROSSED, "0-2 and 1-3")])
def test_tp4_uses_all_four_and_notes_that_it_lies_on_two_pairs(facts: RigFacts, shown: str) -> None:
    placement = place(facts, replicas=1, tensor_parallel_size=4)
    assert indexes(placement) == [[0, 1, 2, 3]]
    assert not placement.nvlinked  # or vLLM would be told to use a kernel that needs all six pairs
    assert shown in placement.warnings[0]
    assert "PCIe" in placement.warnings[0]


def test_tp4_with_a_bridge_between_any_two_is_nvlinked() -> None:
    mesh = rig((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
    assert place(mesh, replicas=1, tensor_parallel_size=4).nvlinked


def test_tp4_beside_a_dead_bridge_names_it() -> None:
    placement = place(rig((0, 1), (2, 3), dead={(2, 3)}), replicas=1, tensor_parallel_size=4)
    assert not placement.nvlinked
    assert any("GPUs 2 and 3 is dead" in w for w in placement.warnings)


def test_tp2_pp2_keeps_each_stage_on_a_pair() -> None:
    assert indexes(place(CROSSED, replicas=1, tensor_parallel_size=2, pipeline_parallel_size=2)) == [[0, 2, 1, 3]]


def test_two_pipeline_stages_of_one_card_sit_on_a_pair() -> None:
    assert indexes(place(CROSSED, replicas=1, tensor_parallel_size=1, pipeline_parallel_size=2)) == [[0, 2]]


def test_a_single_card_leaves_working_pairs_whole() -> None:
    assert indexes(place(rig((0, 1), (2, 3), dead={(0, 1)}), replicas=1, tensor_parallel_size=1)) == [[0]]
    assert indexes(place(rig((0, 1), (2, 3), dead={(2, 3)}), replicas=1, tensor_parallel_size=1)) == [[2]]
    assert indexes(place(rig((0, 1), missing={2}), replicas=1, tensor_parallel_size=1)) == [[3]]


def test_occupied_cards_are_avoided_even_at_the_price_of_the_other_pair() -> None:
    assert indexes(place(NEIGHBOURS, replicas=1, tensor_parallel_size=2, avoid=uuids(0))) == [[2, 3]]
    assert indexes(place(CROSSED, replicas=1, tensor_parallel_size=2, avoid=uuids(2))) == [[1, 3]]


def test_free_cards_without_a_bridge_go_before_occupied_ones_with_one() -> None:
    placement = place(NEIGHBOURS, replicas=1, tensor_parallel_size=2, avoid=uuids(1, 2))
    assert indexes(placement) == [[0, 3]]
    assert placement.warnings


def test_occupied_cards_are_used_when_they_are_needed_and_then_the_pairs_count_again() -> None:
    assert indexes(place(NEIGHBOURS, replicas=2, tensor_parallel_size=2, avoid=uuids(1, 2))) == [[0, 1], [2, 3]]
    assert indexes(place(NEIGHBOURS, replicas=1, tensor_parallel_size=2, avoid=uuids(0, 1, 2))) == [[2, 3]]


def test_where_free_cards_do_not_suffice_one_that_rests_goes_before_one_that_somebody_serves_on() -> None:
    """The bridges want 2 beside 3, where somebody serves; 1 rests."""
    rests = {"avoid": uuids(0, 2), "resting": uuids(1)}
    assert indexes(place(NEIGHBOURS, replicas=1, tensor_parallel_size=1, **rests)) == [[3]]
    assert indexes(place(NEIGHBOURS, replicas=1, tensor_parallel_size=2, **rests)) == [[1, 3]]


def test_a_resting_card_that_would_spare_nobody_is_not_taken() -> None:
    """Somebody has to go for a pair in any case: then for one that may serve at once."""
    rests = {"avoid": uuids(0, 1, 3), "resting": uuids(2)}
    assert indexes(place(NEIGHBOURS, replicas=1, tensor_parallel_size=1, **rests)) == [[2]]
    assert indexes(place(NEIGHBOURS, replicas=1, tensor_parallel_size=2, **rests)) == [[0, 1]]
    served = {"avoid": uuids(0, 1, 2), "resting": uuids(0)}  # somebody serves on one that rests, as an operator said
    assert indexes(place(rig(), replicas=1, tensor_parallel_size=2, **served)) == [[1, 3]]


def test_a_card_that_somebody_sleeps_on_goes_after_a_free_one_and_before_the_others() -> None:
    beside = {"avoid": uuids(0, 1), "slept_on": uuids(2)}
    assert indexes(place(NEIGHBOURS, replicas=1, tensor_parallel_size=1, **beside)) == [[3]]
    assert indexes(place(NEIGHBOURS, replicas=1, tensor_parallel_size=2, **beside)) == [[2, 3]]
    rests = {"avoid": uuids(0), "resting": uuids(1, 2), "slept_on": uuids(2, 3)}
    assert indexes(place(NEIGHBOURS, replicas=1, tensor_parallel_size=1, **rests)) == [[3]]


def test_a_missing_card_takes_its_pair_out() -> None:
    placement = place(rig((0, 1), (2, 3), missing={0}), replicas=1, tensor_parallel_size=2)
    assert indexes(placement) == [[2, 3]]
    with pytest.raises(DoesNotFit, match=r"needs 4 GPUs; the rig has only 3 \(GPU 0 is missing\)"):
        place(rig((0, 1), (2, 3), missing={0}), replicas=1, tensor_parallel_size=4)


def test_too_many_cards_asked_for_is_a_sentence() -> None:
    with pytest.raises(DoesNotFit, match="needs 8 GPUs; the rig has only 4"):
        place(NEIGHBOURS, replicas=2, tensor_parallel_size=4)
    with pytest.raises(DoesNotFit, match="the rig has none"):
        place(RigFacts((), ()), replicas=1, tensor_parallel_size=1)


@pytest.mark.parametrize("layout", [(0, 1, 1), (1, 0, 1), (1, 1, 0), (-1, -1, 1)])
def test_a_layout_of_nothing_is_refused(layout: tuple[int, int, int]) -> None:
    with pytest.raises(DoesNotFit, match="at least 1"):
        place(NEIGHBOURS, replicas=layout[0], tensor_parallel_size=layout[1], pipeline_parallel_size=layout[2])


def test_two_numa_nodes_keep_replicas_apart_and_warn_when_one_spans_both() -> None:
    facts = rig(numa={0: 0, 1: 1, 2: 0, 3: 1})
    assert indexes(place(facts, replicas=2, tensor_parallel_size=2)) == [[0, 2], [1, 3]]
    assert any("NUMA" in w for w in place(facts, replicas=1, tensor_parallel_size=4).warnings)


@given(
    order=st.permutations(range(4)),
    dead=st.sets(st.sampled_from([0, 1])),
    avoid=st.sets(st.integers(0, 3)),
    rest=st.sets(st.integers(0, 3)),
    layout=st.sampled_from([(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (1, 4), (1, 3)]),
)
def test_whatever_the_bridges_cards_are_used_once_and_no_occupied_one_without_need(
    order: list[int], dead: set[int], avoid: set[int], rest: set[int], layout: tuple[int, int]
) -> None:
    pairs = ((order[0], order[1]), (order[2], order[3]))
    facts = rig(*pairs, dead={pairs[i] for i in dead})
    placement = place(facts, replicas=layout[0], tensor_parallel_size=layout[1], avoid=uuids(*avoid))
    used = [c.index for replica in placement.replicas for c in replica]
    needed = layout[0] * layout[1]
    assert len(used) == len(set(used)) == needed
    assert len(set(used) & avoid) == max(0, needed - (4 - len(avoid)))
    both = place(facts, replicas=layout[0], tensor_parallel_size=layout[1], avoid=uuids(*avoid), resting=uuids(*rest))
    taken = {c.index for replica in both.replicas for c in replica}
    assert bool(taken & avoid) == (needed > 4 - len(avoid))  # whoever rests, nobody goes without need
    if needed > 4 - len(avoid):
        assert len(taken & rest) == max(0, needed - (4 - len(rest)))  # then all that may serve come first
    shuffled = RigFacts(tuple(reversed(facts.cards)), tuple(reversed(facts.bridges)))
    again = place(shuffled, replicas=layout[0], tensor_parallel_size=layout[1], avoid=uuids(*avoid))
    assert again.replicas == placement.replicas


def test_among_equals_wide_pcie_comes_before_cool_and_cool_before_low() -> None:
    def with_facts(width: Mapping[int, int], celsius: Mapping[int, float]) -> RigFacts:
        cards = (
            replace(c, pcie_width=width.get(c.index, 16), temperature_celsius=celsius.get(c.index, 35.0))
            for c in NEIGHBOURS.cards
        )
        return replace(NEIGHBOURS, cards=tuple(cards))

    def pair(facts: RigFacts) -> list[list[int]]:
        return indexes(place(facts, replicas=1, tensor_parallel_size=2))

    assert pair(with_facts({}, {})) == [[0, 1]]
    assert pair(with_facts({}, {0: 78.0})) == [[2, 3]]
    assert pair(with_facts({}, {0: 36.0})) == [[0, 1]], "a degree is noise"
    assert pair(with_facts({3: 4}, {0: 78.0})) == [[0, 1]]


def test_a_narrow_slot_is_named_where_the_exchange_goes_over_pcie() -> None:
    cards = tuple(replace(c, pcie_width=4 if c.index == 3 else 16) for c in NEIGHBOURS.cards)
    facts = replace(NEIGHBOURS, cards=cards)
    four = place(facts, replicas=1, tensor_parallel_size=4)
    assert any("GPU 3 runs on 4 PCIe lanes and the others on 16" in w for w in four.warnings)
    pairs = place(facts, replicas=2, tensor_parallel_size=2)
    assert pairs.warnings == (), "a bridged pair does not care"
