"""What llama.cpp is told to leave on the CPU takes nothing of a card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from apps.profiles import fit
from apps.profiles.engine_options import llama_options
from apps.profiles.fit import Verdict
from apps.profiles.forecast import model_of
from apps.profiles.gguf import gguf_sizes
from tests.profiles.test_fit_estimate import CARD_3090
from tests.profiles.test_forecast import MODELS
from tests.profiles.test_gguf import gguf

GIB = 2**30
CODER, GPT_OSS = model_of(MODELS["qwen2-5-coder-32b-instruct-awq"]), model_of(MODELS["gpt-oss-120b"])
# 36 layers of 1.65 GiB, of which 1.6 are experts.
EXPERTS_KNOWN = fit.GgufFile(62 * GIB, (int(1.65 * GIB),) * 36, GIB, GIB, 0, expert_bytes=(int(1.6 * GIB),) * 36)


def judged(
    model: fit.ModelFacts, *extra: str, file: fit.GgufFile | None = None, host: int | None = None, **options: Any
) -> fit.FitEstimate:
    rig = fit.RigMemory((CARD_3090,), host_available_bytes=host)
    return fit.llama_estimate(model, fit.Layout(), llama_options({**options, "extra_args": list(extra)}), rig, file)


@pytest.mark.parametrize("extra", [("--cpu-moe",), ("--n-cpu-moe", "30")])
def test_experts_on_the_cpu_are_not_refused_for_their_size(extra: tuple[str, ...]) -> None:
    found = judged(GPT_OSS, *extra, context_tokens=16384)
    assert found.verdict is Verdict.TIGHT
    assert "only the model's file tells" in found.reason
    assert judged(GPT_OSS, context_tokens=16384).verdict is Verdict.DOES_NOT_FIT


def test_too_few_layers_without_their_experts_do_not_fit() -> None:
    assert judged(GPT_OSS, "--n-cpu-moe", "2", context_tokens=16384).verdict is Verdict.DOES_NOT_FIT


def test_the_file_tells_how_much_the_experts_take() -> None:
    def weights(*extra: str) -> float:
        return judged(GPT_OSS, *extra, context_tokens=16384, file=EXPERTS_KNOWN).gpus[0].weights.low / GIB

    assert weights() == pytest.approx(36 * 1.65 + 1)
    assert weights("--cpu-moe") == pytest.approx(36 * 0.05 + 1)
    assert weights("--n-cpu-moe", "24") == pytest.approx(24 * 0.05 + 12 * 1.65 + 1)
    fits = judged(GPT_OSS, "--n-cpu-moe", "26", context_tokens=16384, file=EXPERTS_KNOWN)
    assert (fits.verdict, fits.host_memory) == (Verdict.FITS, fit.Range.exactly(26 * int(1.6 * GIB)))
    assert "41.6 GiB stay on the CPU" in fits.reason
    assert judged(GPT_OSS, "--n-cpu-moe", "20", context_tokens=16384, file=EXPERTS_KNOWN).verdict is (
        Verdict.DOES_NOT_FIT
    )


def test_a_file_is_read_for_its_experts(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    sizes = {
        "blk.0.attn_q.weight": 320,
        "blk.0.ffn_up.weight": 960,
        "blk.1.ffn_up_exps.weight": 640,
        "blk.1.ffn_gate_up_chexps.weight": 64,
        "blk.1.ffn_gate_inp.weight": 32,
        "blk.1.ffn_down_shexp.weight": 96,
    }
    path.write_bytes(gguf(sizes))
    found = gguf_sizes(path)
    assert found is not None
    assert (found.layer_bytes, found.expert_bytes) == ((1280, 832), (0, 704))


def test_no_layers_on_the_gpu_are_none_and_not_all() -> None:
    found = judged(GPT_OSS, gpu_layers=0, context_tokens=16384, file=EXPERTS_KNOWN)
    assert found.verdict is Verdict.FITS
    assert (found.gpus[0].weights, found.gpus[0].kv_cache) == (fit.Range(0, 0), fit.Range(0, 0))
    assert found.host_memory is not None
    assert found.host_memory.low > 36 * int(1.65 * GIB)
    assert llama_options({}).gpu_layers == "all"


def test_a_cache_in_host_memory_takes_nothing_of_the_card() -> None:
    assert judged(CODER, context_tokens=32768).verdict is Verdict.DOES_NOT_FIT
    found = judged(CODER, "--no-kv-offload", context_tokens=32768)
    assert found.verdict is Verdict.FITS
    assert (found.gpus[0].kv_cache, found.host_memory) == (fit.Range(0, 0), fit.Range.exactly(8 * GIB))


def test_what_stays_on_the_cpu_is_compared_with_the_host_s_memory() -> None:
    assert judged(CODER, "--no-kv-offload", context_tokens=32768, host=9 * GIB).verdict is Verdict.FITS
    found = judged(CODER, "--no-kv-offload", context_tokens=32768, host=7 * GIB)
    assert found.verdict is Verdict.TIGHT
    assert "8.0 GiB stay on the CPU. That is more than the 7.0 GiB of host memory" in found.reason


def test_where_patterns_lay_tensors_nothing_is_said() -> None:
    found = judged(GPT_OSS, "--override-tensor", "exps=CPU", context_tokens=16384)
    assert found.verdict is None
    assert "--override-tensor" in found.reason


def test_a_context_that_is_not_set_is_shortened_to_what_fits() -> None:
    found = judged(CODER)
    assert found.verdict is Verdict.TIGHT
    assert "shortens a context that is not set" in found.reason
    assert found.changes[0].setting == "context_tokens"
    assert judged(CODER, "--fit-ctx", "8192").verdict is Verdict.TIGHT


@pytest.mark.parametrize(
    ("extra", "options"),
    [
        ((), {"context_tokens": 0}),  # all of the model's own, and llama.cpp shortens nothing
        ((), {"context_tokens": 32768}),
        (("--fit", "off"), {}),
        (("--fit-ctx", "32768"), {}),
        ((), {"split_mode": "tensor"}),
    ],
    ids=["whole", "set", "off", "longest", "tensor"],
)
def test_where_it_is_not_shortened_it_is_refused(extra: tuple[str, ...], options: dict[str, Any]) -> None:
    assert judged(CODER, *extra, **options).verdict is Verdict.DOES_NOT_FIT


def test_weights_that_no_context_is_short_enough_for_are_refused() -> None:
    assert judged(model_of(MODELS["phi-4"])).verdict is Verdict.DOES_NOT_FIT
