"""What a rig's own boots teach the next estimate."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apps.profiles import fit
from tests.profiles.test_fit_estimate import CODER_32B, HOMELAB, RIG

GIB = 2**30
LAYOUT = fit.Layout(1, 2)
OPTIONS = replace(HOMELAB, max_model_len=32768)


def said(compile_cached: bool = False) -> fit.Prediction:
    found = fit.prediction_of(fit.estimate(CODER_32B, LAYOUT, replace(OPTIONS, compile_cached=compile_cached), RIG))
    assert found is not None
    return found


def was(prediction: fit.Prediction, **factors: float) -> fit.BootFacts:
    """A boot that told each part as so many times the middle of what was said."""
    parts = ("weights", "activation", "cuda_graphs", "non_torch")
    found = {name: int(getattr(prediction, name).middle * factors.get(name, 1.0)) for name in parts}
    return fit.BootFacts(**found, compiled=prediction.compiles)


def corrected(*boots: fit.BootFacts, cached: bool = False, same_settings: bool = False) -> fit.FitEstimate:
    learnt = fit.correction([(said(cached), boot) for boot in boots], same_settings=same_settings)
    return fit.estimate(CODER_32B, LAYOUT, replace(OPTIONS, compile_cached=cached), replace(RIG, correction=learnt))


def test_without_boots_nothing_changes() -> None:
    assert fit.correction([]) == fit.NO_CORRECTION
    assert corrected() == fit.estimate(CODER_32B, LAYOUT, replace(OPTIONS, compile_cached=False), RIG)


def test_one_boot_moves_the_ranges_to_where_it_was() -> None:
    gpu = corrected(was(said(), non_torch=1.4, cuda_graphs=0.7)).gpus[0]
    assert gpu.non_torch.middle == pytest.approx(said().non_torch.middle * 1.4, rel=0.01)
    assert gpu.cuda_graphs.middle == pytest.approx(said().cuda_graphs.middle * 0.7, rel=0.01)
    assert gpu.weights == said().weights


def test_boots_of_the_same_settings_narrow_the_range_and_others_do_not() -> None:
    boots = [was(said(), non_torch=1.30), was(said(), non_torch=1.31), was(said(), non_torch=1.32)]
    narrow, wide = corrected(*boots, same_settings=True).gpus[0], corrected(*boots).gpus[0]
    assert narrow.non_torch.width < wide.non_torch.width - GIB // 10
    assert wide.non_torch.width == pytest.approx(said().non_torch.width, abs=2)
    for boot in boots:
        assert boot.non_torch is not None
        assert narrow.non_torch.low <= boot.non_torch <= narrow.non_torch.high


def test_the_compile_spike_of_a_first_boot_teaches_nothing_about_later_ones() -> None:
    first = was(said(), activation=1.5)
    learnt = fit.correction([(said(), first)])
    assert learnt.activation.factor == pytest.approx(1.5, rel=0.01)
    assert learnt.later_activation.factor == 1.0
    surprise = replace(first, compiled=False)  # said to compile, and did not
    assert fit.correction([(said(), surprise)]).activation.factor == 1.0


def test_a_boot_whose_engine_miscounted_is_left_out() -> None:
    negative = replace(was(said(), weights=1.5), non_torch=-int(3.9 * GIB))
    assert fit.correction([(said(), negative)]) == fit.NO_CORRECTION


def test_a_prediction_survives_its_row() -> None:
    assert fit.Prediction.from_dict(said().to_dict()) == said()


@given(
    st.lists(
        st.builds(
            fit.BootFacts,
            weights=st.none() | st.integers(0, 10**12),
            activation=st.none() | st.integers(0, 10**12),
            cuda_graphs=st.none() | st.integers(0, 10**12),
            non_torch=st.none() | st.integers(-(10**11), 10**12),
            compiled=st.none() | st.booleans(),
        ),
        max_size=6,
    ),
    st.booleans(),
)
def test_whatever_a_log_told_the_estimate_stays_sane(boots: list[fit.BootFacts], same: bool) -> None:
    found = corrected(*boots, same_settings=same)
    for gpu in found.gpus:
        for part in ("weights", "kv_cache", "activation", "cuda_graphs", "overhead", "non_torch"):
            value: fit.Range = getattr(gpu, part)
            assert 0 <= value.low <= value.high <= value.low + 1.5 * GIB


def test_boots_of_another_model_teach_nothing_about_weights() -> None:
    repacked = was(said(), weights=1.02, non_torch=1.4)
    learnt = fit.correction([(said(), repacked)], same_model=False)
    assert learnt.weights.factor == 1.0
    assert learnt.non_torch.factor == pytest.approx(1.4, rel=0.01)
