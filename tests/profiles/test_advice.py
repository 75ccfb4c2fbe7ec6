"""One fast user or many: measured here first, published second, nothing third."""

from __future__ import annotations

from dataclasses import replace

from apps.profiles import fit
from apps.profiles.advice import PAIRS, SINGLES, TP4, Advice, Measured, advice
from apps.profiles.placement import RigFacts
from tests.profiles.test_fit_estimate import CATALOGUE, CODER_32B, HOMELAB, MIXTRAL, RIG
from tests.profiles.test_placement import NEIGHBOURS, rig

UNBRIDGED = rig()
OPTIONS = replace(HOMELAB, max_model_len=16384)


def asked(
    model: fit.ModelFacts, *history: Measured, facts: RigFacts = NEIGHBOURS, published_cards: bool = True
) -> Advice:
    return advice(model, OPTIONS, RIG, facts, history, published_cards=published_cards)


def test_the_layouts_stand_side_by_side_with_what_each_holds() -> None:
    found = asked(CODER_32B)
    assert [o.layout for o in found.options] == [TP4, PAIRS, SINGLES]
    assert [str(o.verdict) for o in found.options] == ["fits", "fits", "does not fit"]
    assert all(p.source for o in found.options for p in o.published)


def test_what_the_rig_measured_comes_before_what_others_published() -> None:
    history = [
        Measured(TP4, 1, 61.0, 40),
        Measured(PAIRS, 1, 55.0, 40),
        Measured(TP4, 17, 600.0, 40),
        Measured(PAIRS, 17, 420.0, 40),
    ]
    found = asked(CODER_32B, *history)
    assert (found.one_fast_user.layout, found.one_fast_user.basis) == (TP4, "measured")
    assert (found.many_users.layout, found.many_users.basis) == (TP4, "measured")
    assert "1 × TP4 600 tokens/s, 2 × TP2 420 tokens/s" in found.many_users.sentence
    few = asked(CODER_32B, Measured(TP4, 1, 61.0, 1), Measured(PAIRS, 1, 55.0, 1))
    assert few.one_fast_user.basis == "published", "one look is chance"


def test_published_figures_name_their_source_and_follow_the_bridges() -> None:
    bridged, without = asked(CODER_32B), asked(CODER_32B, facts=UNBRIDGED)
    assert bridged.one_fast_user.layout == PAIRS
    assert "r/LocalLLaMA 1t6susj" in bridged.one_fast_user.sentence
    assert without.one_fast_user.layout == TP4
    assert "club-3090" in without.one_fast_user.sentence
    assert bridged.many_users.layout == without.many_users.layout == PAIRS


def test_nothing_third() -> None:
    other = asked(CODER_32B, published_cards=False)
    assert other.one_fast_user.layout is None
    assert other.one_fast_user.basis == other.many_users.basis == "none"
    assert all(not o.published for o in other.options)


def test_where_only_one_layout_holds_the_model_there_is_no_choice() -> None:
    found = asked(MIXTRAL)
    assert found.one_fast_user.layout == found.many_users.layout == TP4
    assert "Only 1 × TP4" in found.many_users.sentence
    too_large = asked(CATALOGUE["qwen3-235b-a22b"])
    assert too_large.one_fast_user.layout is None


def test_every_model_of_the_catalogue_gets_an_answer() -> None:
    for model in CATALOGUE.values():
        found = asked(model)
        assert found.one_fast_user.sentence.endswith(".")
        assert found.many_users.sentence.endswith(".")
