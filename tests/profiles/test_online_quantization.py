"""A 16 bit checkpoint that vLLM quantizes while it loads is counted as it then lies on the cards."""

from __future__ import annotations

import pytest

from apps.profiles import fit
from apps.profiles.fit import Verdict
from apps.profiles.fit.online import EVERYWHERE
from apps.profiles.forecast import model_of
from tests.profiles.test_forecast import MODELS, RIGS, planned

GIB = 2**30
FACTS = RIGS["0-1/2-3"]
PHI = model_of(MODELS["phi-4"])
# Of 61 GB 57 are experts of 768.
EXPERTS = fit.ModelFacts(
    "Experts",
    61_064_245_248,
    params_total=30_532_122_624,
    layers=48,
    hidden_size=2048,
    vocab_size=151_936,
    experts=128,
    intermediate_size=768,
)


@pytest.mark.parametrize("scheme", ["fp8", "fp8_per_tensor", "fp8_per_block", "fp8_per_channel", "mxfp8"])
def test_a_model_of_27_gib_fits_one_card_in_8_bit(scheme: str) -> None:
    assert planned("phi-4", FACTS, 1, 1).verdict is Verdict.DOES_NOT_FIT
    found = planned("phi-4", FACTS, 1, 1, quantization=scheme)
    assert found.verdict is Verdict.FITS
    assert any(scheme in warning for warning in found.estimate.warnings)


@pytest.mark.parametrize("scheme", EVERYWHERE)
def test_embedding_and_output_head_stay_in_16_bit(scheme: str) -> None:
    """phi-4 has 14.66 billion parameters, two tables of 0.51 among them."""
    table = 100_352 * 5120
    found = fit.quantized(PHI, scheme)
    assert found is not None
    each = EVERYWHERE[scheme]
    assert found.weights_bytes == pytest.approx(2 * table + (14_659_507_200 - table) * each, rel=1e-6)
    both = 4 * table + (14_659_507_200 - 2 * table) * each
    assert found.weights_bytes < both < (found.weights_most_bytes or 0) < 1.04 * both


def test_the_range_reaches_the_cards() -> None:
    weights = planned("phi-4", FACTS, 1, 2, quantization="fp8").estimate.gpus[0].weights
    found = fit.quantized(PHI, "fp8")
    assert found is not None
    assert weights.low == (found.weights_bytes or 0) // 2
    assert weights.high > (found.weights_most_bytes or 0) // 2


def test_some_schemes_quantize_experts_alone() -> None:
    found = fit.quantized(EXPERTS, "int8_per_channel_weight_only")
    assert found is not None
    assert found.weights_bytes == 61_064_245_248 - 3 * 48 * 128 * 2048 * 768
    assert fit.quantized(PHI, "experts_int8") == PHI, "it has none"


def test_a_checkpoint_that_is_quantized_stays_as_it_is() -> None:
    coder = model_of(MODELS["qwen2-5-coder-32b-instruct-awq"])
    assert fit.quantized(coder, "fp8") == coder
    assert fit.quantized(PHI, "awq") == PHI
    assert fit.quantized(PHI, "") == PHI


@pytest.mark.parametrize(
    ("slug", "options"),
    [
        ("phi-4", {"quantization": "torchao"}),
        ("phi-4", {"quantization_config": {"linear": "mxfp4"}}),
        ("phi-4", {"quantization": "fp8_per_tensor", "quantization_config": {"ignore": ["re:.*"]}}),
        ("qwen3-coder-30b-a3b-instruct", {"quantization": "experts_int8"}),  # the width of its experts is not known
    ],
    ids=["torchao", "config", "both", "experts"],
)
def test_what_nobody_can_size_is_not_refused(slug: str, options: dict[str, object]) -> None:
    found = planned(slug, FACTS, 1, 1, **options)
    assert found.verdict is None
    assert "not known" in found.sentence
    assert found.suggestions == ()


def test_what_fits_as_the_files_are_fits_quantized_too() -> None:
    assert planned("phi-4", FACTS, 1, 2, quantization="torchao").verdict is Verdict.FITS


def test_an_impossible_split_is_refused_however_the_weights_are_kept() -> None:
    found = planned("phi-4", FACTS, 1, 4, quantization="torchao")
    assert found.verdict is Verdict.DOES_NOT_FIT
    assert "KV heads" in found.sentence
