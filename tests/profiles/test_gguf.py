"""Real tensor sizes from a GGUF header."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from apps.profiles import fit
from apps.profiles.gguf import gguf_sizes
from tests.profiles.test_fit_estimate import CARD_3090, QWEN_7B, RIG

GIB = 2**30


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def gguf(tensors: dict[str, int], *, alignment: int = 32, cut: int = 0) -> bytes:
    """A file whose tensors have these sizes, with a vocabulary as real ones carry it."""
    words = [b"".join((struct.pack("<IQ", 8, 3), text("a"), text("bc"), text("ä"))), struct.pack("<IQf", 6, 1, 1.0)]
    pairs = [
        text("general.architecture") + struct.pack("<I", 8) + text("llama"),
        text("general.alignment") + struct.pack("<II", 4, alignment),
        text("tokenizer.ggml.tokens") + struct.pack("<I", 9) + words[0],
        text("tokenizer.ggml.scores") + struct.pack("<I", 9) + words[1],
        text("llama.rope.freq_base") + struct.pack("<If", 6, 1e6),
        text("llama.block_count") + struct.pack("<II", 4, 3),
        text("llama.attention.head_count_kv") + struct.pack("<II", 4, 2),
        text("llama.attention.key_length") + struct.pack("<II", 4, 64),
        text("llama.attention.sliding_window") + struct.pack("<II", 4, 512),
        text("llama.context_length") + struct.pack("<IQ", 10, 8192),
    ]
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(pairs)) + b"".join(pairs)
    offset, entries, data = 0, [], b""
    for name, size in tensors.items():
        entries.append(text(name) + struct.pack("<IQQIQ", 2, 4, 8, 0, offset))
        data += b"\0" * size
        offset += size
    head += b"".join(entries)
    head += b"\0" * (-len(head) % alignment)
    return (head + data)[: len(head) + len(data) - cut]


SIZES = {
    "token_embd.weight": 640,
    "blk.0.attn_q.weight": 320,
    "blk.0.ffn_up.weight": 960,
    "blk.1.attn_q.weight": 320,
    "blk.10.attn_q.weight": 64,
    "output_norm.weight": 32,
    "output.weight": 640,
}


@pytest.mark.parametrize("alignment", [32, 64])
def test_layers_and_tables_are_told_apart(tmp_path: Path, alignment: int) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf({n: s // alignment * alignment or alignment for n, s in SIZES.items()}, alignment=alignment))
    found = gguf_sizes(path)
    assert found is not None
    if alignment == 32:
        assert (found.total_bytes, found.layer_bytes) == (sum(SIZES.values()), (1280, 320, 64))
        assert (found.embedding_bytes, found.output_bytes, found.other_bytes) == (640, 640, 32)
    assert len(found.layer_bytes) == 3


def test_parts_are_read_together(tmp_path: Path) -> None:
    names = list(SIZES)
    for at, part in enumerate((names[:4], names[4:]), 1):
        data = gguf({name: SIZES[name] for name in part})
        (tmp_path / f"big-{at:05d}-of-00002.gguf").write_bytes(data)
    found = gguf_sizes(tmp_path / "big-00001-of-00002.gguf")
    assert found is not None
    assert found.total_bytes == sum(SIZES.values())
    (tmp_path / "big-00002-of-00002.gguf").unlink()
    assert gguf_sizes(tmp_path / "big-00001-of-00002.gguf") is None


@pytest.mark.parametrize(
    "data",
    [b"", b"GGUF", b"PK\3\4" + b"\0" * 100, gguf(SIZES)[:200], gguf(SIZES, cut=900), b"GGUF" + b"\xff" * 64],
    ids=["empty", "magic only", "zip", "cut header", "cut data", "nonsense"],
)
def test_what_is_no_whole_gguf_file_is_none(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    assert gguf_sizes(path) is None
    assert gguf_sizes(tmp_path / "absent.gguf") is None


def test_layers_lie_on_the_cards_as_the_split_says() -> None:
    """28 layers of 0.5 GiB and an output of 1 GiB: 3:1 puts 21 layers and 1 layer less on the first and second card."""
    file = fit.GgufFile(15 * GIB, (GIB // 2,) * 28, GIB, GIB // 2, 0)
    options = fit.LlamaOptions(context_tokens=8192, gpu_layers="all", tensor_split=(3.0, 1.0))
    first, second = fit.llama_estimate(QWEN_7B, fit.Layout(1, 2), options, RIG, file).gpus
    assert first.weights.low == 22 * GIB // 2
    assert second.weights.low == 6 * GIB // 2 + GIB // 2
    assert first.kv_cache.low + second.kv_cache.low == pytest.approx(28 * 2 * 4 * 128 * 2 * 8192, rel=0.01)


def test_llama_cpp_too_large_for_one_card_names_context_cache_and_more_cards() -> None:
    file = fit.GgufFile(22 * GIB, (GIB * 3 // 4,) * 28, GIB, GIB // 2, 0)
    options = fit.LlamaOptions(context_tokens=131072, gpu_layers="all")
    found = fit.llama_estimate(QWEN_7B, fit.Layout(), options, RIG, file)
    assert found.verdict is fit.Verdict.DOES_NOT_FIT
    assert [change.setting for change in found.changes][-1] == "layout"
    for change in found.changes:
        assert isinstance(change.options, fit.LlamaOptions)
        again = fit.llama_estimate(QWEN_7B, change.layout, change.options, RIG, file)
        assert again.verdict is fit.Verdict.FITS, change.sentence
    half = fit.llama_estimate(QWEN_7B, fit.Layout(), fit.LlamaOptions(131072, gpu_layers="auto"), RIG, file)
    assert half.verdict is fit.Verdict.TIGHT
    assert "leaves layers on the CPU" in half.reason
    one = fit.RigMemory((CARD_3090,))
    assert fit.llama_estimate(QWEN_7B, fit.Layout(1, 2), options, one, file).verdict is fit.Verdict.DOES_NOT_FIT


def test_the_file_tells_the_cache_that_the_catalogue_does_not_know(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf(SIZES))
    file = gguf_sizes(path)
    assert file is not None
    assert file.cache is not None
    assert file.cache.rich == (fit.LayerGroup("full", 3, kv_heads=2, head_dim=64),)
    assert file.cache.lean == (fit.LayerGroup("sliding", 3, kv_heads=2, head_dim=64, window=512),)
    unknown = fit.ModelFacts("Small", None)
    assert fit.llama_host_estimate(unknown, fit.LlamaOptions()).verdict is None
    found = fit.llama_host_estimate(unknown, fit.LlamaOptions(), host_total_bytes=8 * GIB, file=file)
    assert found.verdict is fit.Verdict.FITS
    assert found.max_model_len == 8192
    assert "not known" not in found.reason
