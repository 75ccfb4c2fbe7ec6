"""The planner against answers of vLLM 0.33.0's own, exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from apps.profiles import fit

GIB = 2**30
ROWS = json.loads((Path(__file__).parent / "data" / "kv_cache_rows.json").read_text("utf-8"))["rows"]


def full(layers: int, kv_heads: int, head_dim: int) -> fit.LayerGroup:
    return fit.LayerGroup("full", layers, kv_heads=kv_heads, head_dim=head_dim)


MIXTRAL = [full(56, 8, 128)]
LLAMA_70B = [full(80, 8, 128)]
CODER_32B = [full(64, 8, 128)]
GPT_OSS_120B = [full(18, 8, 64), fit.LayerGroup("sliding", 18, kv_heads=8, head_dim=64, window=128)]
CODER_V2_LITE = [fit.LayerGroup("mla", 27, head_dim=576)]
QWEN3_NEXT = [full(12, 2, 256), fit.LayerGroup("state", 36, state_bytes_per_layer=1_097_728)]


@pytest.mark.parametrize(
    ("groups", "tp", "gib", "length", "bytes_per_block", "blocks", "tokens", "concurrency", "estimated"),
    [
        (MIXTRAL, 4, 3.04, 65536, 917504, 3557, 56912, "0.87", 56896),
        (MIXTRAL, 4, 2.14, 32768, 917504, 2504, 40064, "1.22", None),
        (LLAMA_70B, 4, 10.94, 131072, 1310720, 8962, 143392, "1.09", None),
        (LLAMA_70B, 2, 1.68, 16384, 2621440, 688, 11008, "0.67", 10992),
        (CODER_32B, 4, 15.69, 32768, 1048576, 16066, 257056, "7.84", None),
        (CODER_32B, 2, 10.29, 32768, 2097152, 5268, 84288, "2.57", None),
        (GPT_OSS_120B, 4, 4, 131072, 147456, 29127, 458366, "3.50", None),
        (CODER_V2_LITE, 1, 10, 163840, 497664, 21575, 345200, "2.11", None),
        (CODER_V2_LITE, 8, 10, 163840, 497664, 21575, 345200, "2.11", None),
    ],
)
def test_the_golden_rows_come_out_exactly(
    groups: list[fit.LayerGroup],
    tp: int,
    gib: float,
    length: int,
    bytes_per_block: int,
    blocks: int,
    tokens: int,
    concurrency: str,
    estimated: int | None,
) -> None:
    capacity = fit.kv_cache_capacity(
        groups, tensor_parallel_size=tp, max_model_len=length, available_kv_bytes=int(gib * GIB)
    )
    assert capacity.bytes_per_block == bytes_per_block
    assert capacity.num_blocks == blocks
    assert capacity.kv_cache_tokens == tokens
    assert f"{capacity.max_concurrency:.2f}" == concurrency
    assert capacity.estimated_max_model_len == estimated
    assert capacity.fits == (estimated is None)


@pytest.mark.parametrize(("kind", "row", "answer"), ROWS)
def test_random_models_come_out_as_vllm_answered(kind: str, row: dict[str, Any], answer: dict[str, Any] | str) -> None:
    row = dict(row)
    groups = [fit.LayerGroup(**group) for group in row.pop("groups")]
    if answer == "refused":
        with pytest.raises(ValueError, match="cannot share blocks"):
            fit.kv_cache_capacity(groups, **row)
        return
    capacity = fit.kv_cache_capacity(groups, **row)
    assert {name: getattr(capacity, name) for name in answer} == answer


def test_one_request_needs_its_own_blocks_and_the_one_held_back() -> None:
    needed = fit.bytes_for_one_request(MIXTRAL, tensor_parallel_size=4, max_model_len=65536)
    assert needed == 3.5 * GIB + 917504  # vLLM's message says 3.5 GiB, without that block

    def fits(available: int) -> bool:
        return fit.kv_cache_capacity(
            MIXTRAL, tensor_parallel_size=4, max_model_len=65536, available_kv_bytes=available
        ).fits

    assert fits(needed)
    assert not fits(needed - 1)


def test_more_ranks_than_heads_repeat_the_heads() -> None:
    def bytes_per_block(tp: int) -> int:
        return fit.kv_cache_capacity(
            [full(12, 2, 256)], tensor_parallel_size=tp, max_model_len=4096, available_kv_bytes=GIB
        ).bytes_per_block

    assert bytes_per_block(2) * 2 == bytes_per_block(1)
    assert bytes_per_block(4) == bytes_per_block(8) == bytes_per_block(2)


def test_the_attention_block_grows_until_a_state_fits_its_page() -> None:
    capacity = fit.kv_cache_capacity(
        QWEN3_NEXT, tensor_parallel_size=1, max_model_len=262144, available_kv_bytes=10 * GIB
    )
    # 2048 bytes per token: 544 tokens are the first multiple of 16 that hold 1,097,728 bytes.
    assert capacity.bytes_per_block == 12 * 544 * 2048


def test_a_scale_lies_beside_each_head_of_int8_caches() -> None:
    def bytes_per_block(dtype: str) -> int:
        return fit.kv_cache_capacity(
            [full(1, 8, 128)],
            tensor_parallel_size=4,
            kv_cache_dtype=dtype,
            max_model_len=4096,
            available_kv_bytes=GIB,
        ).bytes_per_block

    assert bytes_per_block("auto") == 16 * 2 * 2 * 128 * 2
    assert bytes_per_block("fp8") == 16 * 2 * 2 * 128
    assert bytes_per_block("int8_per_token_head") == 16 * 2 * 2 * (128 + 4)


def test_no_memory_left_means_no_tokens_and_no_length() -> None:
    for available in (-GIB, 0, 917504):
        capacity = fit.kv_cache_capacity(
            MIXTRAL, tensor_parallel_size=4, max_model_len=1024, available_kv_bytes=available
        )
        assert not capacity.fits
        assert capacity.estimated_max_model_len == 0
        assert capacity.num_blocks == max(0, available) // 917504


def test_what_nobody_can_plan_is_refused_with_a_sentence() -> None:
    with pytest.raises(ValueError, match="needs window of at least 1"):
        fit.LayerGroup("sliding", 4, kv_heads=8, head_dim=64)
    with pytest.raises(ValueError, match="no kind of KV cache"):
        fit.LayerGroup("ring", 4, kv_heads=8, head_dim=64)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no KV cache dtype this planner knows"):
        fit.kv_cache_capacity(
            MIXTRAL, tensor_parallel_size=1, kv_cache_dtype="int3", max_model_len=1, available_kv_bytes=1
        )
    with pytest.raises(ValueError, match="tensor_parallel_size must be at least 1"):
        fit.kv_cache_capacity(MIXTRAL, tensor_parallel_size=0, max_model_len=1, available_kv_bytes=1)
    with pytest.raises(ValueError, match="keeps no KV cache"):
        fit.kv_cache_capacity([], tensor_parallel_size=1, max_model_len=1, available_kv_bytes=1)
    with pytest.raises(ValueError, match="at most 56"):
        fit.kv_cache_capacity(
            MIXTRAL, tensor_parallel_size=1, pipeline_parallel_size=57, max_model_len=1, available_kv_bytes=1
        )
