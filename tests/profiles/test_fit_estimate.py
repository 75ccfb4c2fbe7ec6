"""The estimate against boots measured on a GPU, against the catalogue, and its advice against itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import apps.catalog
from apps.profiles import fit

GIB = 2**30
ENTRIES = json.loads((Path(apps.catalog.__file__).parent / "data" / "models.json").read_text("utf-8"))["models"]
CATALOGUE = {entry["slug"]: fit.model_facts(entry) for entry in ENTRIES}
MIXTRAL = CATALOGUE["mixtral-8x22b-instruct-awq"]
LLAMA_70B = CATALOGUE["deepseek-r1-distill-llama-70b-awq"]
CODER_32B = next(model for slug, model in CATALOGUE.items() if slug.startswith("qwen2-5-coder-32b"))

CARD_3090 = fit.CardMemory(int(23.55 * GIB))
RIG = fit.RigMemory((CARD_3090,) * 4)
H200 = fit.RigMemory((fit.CardMemory(int(139.8 * GIB)),), compute_capability=(9, 0))
HOMELAB = fit.EngineOptions(gpu_memory_utilization=0.90, max_num_seqs=32)
PARTS = ("weights", "kv_cache", "activation", "cuda_graphs", "overhead", "slack")


def gqa(
    name: str, weights: int, layers: int, hidden: int, inner: int, heads: int, kv: int, dim: int, vocab: int
) -> fit.ModelFacts:
    return fit.model_facts(
        {
            "name": name,
            "weights_bytes": weights,
            "layers": layers,
            "hidden_size": hidden,
            "intermediate_size": inner,
            "attention_heads": heads,
            "kv_heads": kv,
            "head_dim": dim,
            "vocab_size": vocab,
            "max_context_tokens": 32768,
            "kv": {"kind": "gqa_full", "layers": layers, "kv_heads": kv, "head_dim": dim},
        }
    )


# 16 bit weights as booted: exact sums over Qwen2.5's shapes (0.5B with one table for embedding and output head).
QWEN_7B = gqa("Qwen2.5 7B", 15_231_233_024, 28, 3584, 18944, 28, 4, 128, 152064)
QWEN_HALF_B = gqa("Qwen2.5 0.5B", 988_065_536, 24, 896, 4864, 14, 2, 64, 151936)


def holds(value: fit.Range, gib: float) -> bool:
    """Logs print two decimals."""
    return value.low - 0.005 * GIB <= gib * GIB <= value.high + 0.005 * GIB


# vLLM 0.26 on an H200, tensor parallel size 1: utilisation, options, and what its log said in GiB.
BOOT = fit.EngineOptions(gpu_memory_utilization=0.165, max_model_len=8192, max_num_seqs=32, vllm_version=(0, 26))
EAGER = replace(BOOT, enforce_eager=True)
MEASURED = {
    "A1 first boot": (CODER_32B, BOOT, 18.49, 1.49, 0.20, 2.87, 11728),
    "A3 eager": (CODER_32B, EAGER, 18.49, 0.42, 0.0, 3.94, 16128),
    "A4 256 sequences": (CODER_32B, replace(BOOT, max_num_seqs=256), 18.49, 1.49, 1.17, 2.87, 11728),
    "A5 as A1": (CODER_32B, replace(BOOT, max_model_len=11728), 18.49, 1.49, 0.20, 2.87, 11728),
    "A6 eager, 8192 tokens": (CODER_32B, replace(EAGER, max_num_batched_tokens=8192), 18.49, 1.58, 0.0, 2.78, 11376),
    "second identical boot": (CODER_32B, replace(BOOT, compile_cached=True), 18.49, 0.38, 0.20, 3.98, 16304),
    "E2 no room": (CODER_32B, replace(EAGER, gpu_memory_utilization=0.125), 18.49, 0.42, 0.0, -1.65, None),
    "C1 0.5B": (
        QWEN_HALF_B,
        replace(BOOT, gpu_memory_utilization=0.05, enable_sleep_mode=True),
        0.93,
        0.26,
        0.15,
        5.58,
        487312,
    ),
}


@pytest.mark.parametrize("name", MEASURED)
def test_measured_boots_lie_between_low_and_high(name: str) -> None:
    model, options, weights, activation, graphs, available, tokens = MEASURED[name]
    estimate = fit.estimate(model, fit.Layout(), options, H200)
    gpu = estimate.gpus[0]
    boot = estimate.next_boot
    assert boot is not None
    assert holds(gpu.weights, weights)
    assert holds(gpu.activation, activation)
    assert holds(gpu.cuda_graphs, graphs)
    assert holds(boot.available_kv, available)
    if tokens is not None:
        assert boot.kv_cache_tokens.low <= tokens <= boot.kv_cache_tokens.high


def test_weights_and_spike_of_7b_and_of_marlin_were_measured_too() -> None:
    seven = fit.estimate(QWEN_7B, fit.Layout(), BOOT, H200).gpus[0]
    assert holds(seven.weights, 14.3)
    assert holds(seven.activation, 1.04)
    marlin = fit.estimate(CODER_32B, fit.Layout(), EAGER, replace(H200, compute_capability=(8, 6))).gpus[0]
    assert holds(marlin.weights, 18.14)
    assert holds(marlin.activation, 0.40)


def test_a_later_boot_has_more_cache_than_the_first() -> None:
    estimate = fit.estimate(CODER_32B, fit.Layout(), BOOT, H200)
    assert estimate.first_boot is not None
    assert estimate.later_boots is not None
    assert estimate.next_boot == estimate.first_boot
    gained = estimate.later_boots.kv_cache_tokens.low / estimate.first_boot.kv_cache_tokens.low
    assert gained > 1.3  # 39 % were measured
    eager = fit.estimate(CODER_32B, fit.Layout(), EAGER, H200)
    assert eager.first_boot == eager.later_boots


@pytest.mark.parametrize(
    ("model", "ranks", "weights", "most", "least"),
    [
        (MIXTRAL, 4, 17.15, 56992, 40144),
        (LLAMA_70B, 4, 9.26, 143328, 131536),
        (LLAMA_70B, 2, 18.52, 10976, 5088),
        (CODER_32B, 4, 4.50, 257136, 242384),
        (CODER_32B, 2, 9.00, 91696, 84320),
    ],
)
def test_the_seed_models_agree_with_the_hand_made_table(
    model: fit.ModelFacts, ranks: int, weights: float, most: int, least: int
) -> None:
    """The table took 1.0 to 1.9 GiB for everything beside the weights: the same bytes give the same tokens, and the
    ranges of this planner overlap that band."""
    assert model.weights_bytes is not None
    assert model.cache is not None
    assert round(model.weights_bytes / ranks / GIB, 2) == weights
    for overhead, tokens in ((1.0, most), (1.9, least)):
        left = int((23.55 * 0.90 - overhead) * GIB - model.weights_bytes / ranks)
        capacity = fit.kv_cache_capacity(
            model.cache.lean, tensor_parallel_size=ranks, max_model_len=4096, available_kv_bytes=left
        )
        assert abs(capacity.num_blocks * 16 - tokens) <= 16
    # The table knows no compile spike, and only few sequences keep CUDA graphs and all else within its 1.9 GiB.
    few = fit.estimate(model, fit.Layout(1, ranks), replace(HOMELAB, max_model_len=4096), RIG)
    many = fit.estimate(model, fit.Layout(1, ranks), replace(HOMELAB, max_num_seqs=256, max_model_len=4096), RIG)
    for boot in (few.first_boot, few.later_boots, many.later_boots):
        assert boot is not None
        assert boot.kv_cache_tokens.low < most
        assert boot.kv_cache_tokens.high > least


def test_mixtral_does_not_fit_two_cards_and_four_are_proposed() -> None:
    estimate = fit.estimate(MIXTRAL, fit.Layout(2, 2), replace(HOMELAB, max_model_len=32768), RIG)
    assert estimate.verdict is fit.Verdict.DOES_NOT_FIT
    assert "34.3 to 34.7 GiB of weights alone" in estimate.reason
    assert [(c.setting, str(c.layout)) for c in estimate.changes] == [("layout", "1 × TP4")]


def test_mixtral_at_its_native_length_does_not_fit_and_three_settings_would_do() -> None:
    estimate = fit.estimate(MIXTRAL, fit.Layout(1, 4), HOMELAB, RIG)
    assert estimate.verdict is fit.Verdict.DOES_NOT_FIT
    assert "one request of 65,536 tokens needs 3.50 GiB" in estimate.reason
    assert [c.setting for c in estimate.changes] == ["gpu_memory_utilization", "max_model_len", "kv_cache_dtype"]


@pytest.mark.parametrize("slug", CATALOGUE)
@pytest.mark.parametrize("layout", [fit.Layout(1, 1), fit.Layout(2, 2), fit.Layout(1, 4), fit.Layout(1, 2, 2)], ids=str)
def test_every_catalogue_model_gets_narrow_ranges_and_advice_that_holds(slug: str, layout: fit.Layout) -> None:
    model = CATALOGUE[slug]
    estimate = fit.estimate(model, layout, fit.EngineOptions(), RIG)
    assert estimate.reason.endswith(".")
    for gpu in estimate.gpus:
        for part in PARTS:
            value: fit.Range = getattr(gpu, part)
            assert 0 <= value.width <= 1.5 * GIB, part
    for boot in (estimate.first_boot, estimate.later_boots):
        assert boot is None or boot.available_kv.width <= 1.5 * GIB
    for change in estimate.changes:
        changed = fit.estimate(model, change.layout, change.options, RIG)
        assert changed.verdict is fit.Verdict.FITS, change.sentence
    if estimate.verdict is fit.Verdict.FITS:
        assert estimate.changes == ()


def test_the_parts_fill_the_card() -> None:
    gpu = fit.estimate(LLAMA_70B, fit.Layout(1, 4), replace(HOMELAB, max_model_len=8192), RIG).gpus[0]
    lowest = gpu.weights.low + gpu.activation.low + gpu.cuda_graphs.low + gpu.overhead.low
    assert lowest + gpu.kv_cache.high + gpu.slack.high == pytest.approx(CARD_3090.total_bytes, abs=4)


def test_pipeline_stages_share_the_layers_and_the_ends_carry_the_tables() -> None:
    options = replace(HOMELAB, max_model_len=8192)
    gpus = fit.estimate(LLAMA_70B, fit.Layout(1, 1, 4), options, RIG).gpus
    assert [gpu.stage for gpu in gpus] == [0, 1, 2, 3]
    assert gpus[0].weights.low == gpus[3].weights.low > gpus[1].weights.low == gpus[2].weights.low
    whole = sum(gpu.weights.low for gpu in gpus)
    assert whole == pytest.approx(LLAMA_70B.weights_bytes, rel=1e-6)


def test_what_others_use_lowers_the_utilisation_that_starts() -> None:
    busy = replace(CARD_3090, in_use_bytes=2 * GIB)
    rig = replace(RIG, cards=(busy, CARD_3090, CARD_3090, CARD_3090))
    options = replace(HOMELAB, gpu_memory_utilization=0.92, max_model_len=8192)
    estimate = fit.estimate(CODER_32B, fit.Layout(1, 4), options, rig)
    assert estimate.verdict is fit.Verdict.DOES_NOT_FIT
    assert "At its start vLLM asks for 21.7 GiB of GPU 0" in estimate.reason
    assert [c.sentence for c in estimate.changes] == ["Lower the utilisation to 0.88."]


def test_each_sleeping_neighbour_takes_about_a_gibibyte() -> None:
    options = replace(HOMELAB, max_model_len=8192)
    awake = fit.estimate(CODER_32B, fit.Layout(1, 4), options, RIG)
    rig = replace(RIG, cards=(replace(CARD_3090, sleeping_neighbours=2), *RIG.cards[1:]))
    beside = fit.estimate(CODER_32B, fit.Layout(1, 4), options, rig)
    lost = awake.gpus[0].slack.low - beside.gpus[0].slack.low
    assert 2.0 * GIB <= lost <= 2.2 * GIB
    assert awake.gpus[1] == beside.gpus[1]
    assert beside.verdict is not fit.Verdict.FITS


def test_sleep_mode_says_what_it_pins_in_host_memory() -> None:
    options = replace(HOMELAB, enable_sleep_mode=True, max_model_len=8192)
    rig = replace(RIG, host_available_bytes=100 * GIB)
    estimate = fit.estimate(MIXTRAL, fit.Layout(1, 4), options, rig)
    assert estimate.pinned_host is not None
    assert holds(estimate.pinned_host, 130)
    assert any("Sleeping pins" in warning for warning in estimate.warnings)
    assert fit.estimate(MIXTRAL, fit.Layout(1, 4), HOMELAB, rig).pinned_host is None


def test_a_fixed_cache_size_is_taken_as_it_is_and_checked_against_the_card() -> None:
    options = replace(HOMELAB, max_model_len=8192, kv_cache_memory_bytes=10 * GIB)
    estimate = fit.estimate(CODER_32B, fit.Layout(1, 4), options, RIG)
    assert estimate.verdict is fit.Verdict.FITS
    assert estimate.gpus[0].kv_cache == fit.Range(10 * GIB, 10 * GIB)
    too_much = replace(options, kv_cache_memory_bytes=20 * GIB)
    assert fit.estimate(CODER_32B, fit.Layout(1, 4), too_much, RIG).verdict is fit.Verdict.DOES_NOT_FIT


def test_impossible_splits_are_named_and_a_possible_one_proposed() -> None:
    estimate = fit.estimate(CATALOGUE["phi-4"], fit.Layout(1, 4), HOMELAB, RIG)
    assert estimate.verdict is fit.Verdict.DOES_NOT_FIT
    assert "10 KV heads and 4 GPUs" in estimate.reason
    assert str(estimate.changes[0].layout) == "1 × TP2"
    uneven = fit.estimate(CODER_32B, fit.Layout(1, 3), HOMELAB, RIG)
    assert "40 attention heads cannot be divided among 3 GPUs" in uneven.reason
    assert "needs 8 GPUs; the rig has 4" in fit.estimate(CODER_32B, fit.Layout(2, 4), HOMELAB, RIG).reason


def test_gpt_oss_on_a_3090_is_offered_int8_and_mla_no_other_cache() -> None:
    def settings(slug: str, length: int) -> dict[str, str]:
        options = replace(HOMELAB, gpu_memory_utilization=0.95, max_model_len=length)
        found = fit.estimate(CATALOGUE[slug], fit.Layout(1, 4), options, RIG)
        return {change.setting: change.options.kv_cache_dtype for change in found.changes}

    assert settings("gpt-oss-120b", 700_000)["kv_cache_dtype"] == "int8_per_token_head"
    assert "kv_cache_dtype" not in settings("glm-4-7-flash", 400_000)


def test_what_is_not_known_is_said_and_not_guessed() -> None:
    unknown = fit.estimate(CATALOGUE["command-r-08-2024"], fit.Layout(1, 4), HOMELAB, RIG)
    assert unknown.verdict is None
    assert "not known" in unknown.reason
    no_shape = fit.estimate(CATALOGUE["nemotron-3-nano-30b-a3b"], fit.Layout(1, 4), HOMELAB, RIG)
    assert no_shape.verdict is None
    assert "cache" in no_shape.reason
    too_big = fit.estimate(CATALOGUE["deepseek-v4-pro"], fit.Layout(1, 4), HOMELAB, RIG)
    assert too_big.verdict is fit.Verdict.DOES_NOT_FIT  # even without knowing its cache


def test_an_encoder_needs_no_cache() -> None:
    estimate = fit.estimate(CATALOGUE["bge-m3"], fit.Layout(), HOMELAB, RIG)
    assert estimate.verdict is fit.Verdict.FITS
    assert estimate.gpus[0].kv_cache == fit.Range(0, 0)


def test_options_no_engine_takes_are_refused() -> None:
    for wrong in ({"gpu_memory_utilization": 1.2}, {"max_num_seqs": 0}, {"max_model_len": 0}):
        with pytest.raises(ValueError, match=r"must be|lies between"):
            fit.estimate(CODER_32B, fit.Layout(), replace(HOMELAB, **wrong), RIG)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="replicas must be"):
        fit.estimate(CODER_32B, fit.Layout(0), HOMELAB, RIG)
