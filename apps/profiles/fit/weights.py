"""How many bytes of weights lie on each pipeline stage's GPUs. Pure.

Tensor parallelism divides linear layers, experts, embeddings and the output head; norms, routers and MLA's
down-projections lie on every rank; KV heads fewer than ranks are repeated; pipeline stages divide the layers, the
first with the embedding and the last with the output head.
"""

from __future__ import annotations

from dataclasses import replace

from apps.profiles.fit.block_tables import stage_ends
from apps.profiles.fit.inputs import Layout, ModelFacts
from apps.profiles.fit.ranges import GIB, Range

# The allocator rounds every tensor up. Measured on an H200 (vLLM 0.26): 18.00 GiB of AWQ became 18.14 with Marlin and
# 18.49 with Machete (compute capability 9 and above), 14.19 of bf16 became 14.30, 0.92 became 0.93.
ROUNDING = 1.012
MACHETE_ROUNDING = 1.03
LEAST_ROUNDING_BYTES = 16 * 2**20
# Layers a quantizer keeps in 16 bit (routers, shared experts, the first layer): a judgement, not a measurement.
NOT_QUANTIZED = 1.03
# gpt-oss: experts of 2880 are padded per rank to a multiple of 128 or more (vLLM pads; 2880/4 = 720 becomes 768).
MXFP4_PADDING = 1.067
WIDEST = int(0.9 * GIB)
TABLE_ELEMENT_BYTES = 2  # embedding and output head stay in 16 bit


def weights_per_gpu(model: ModelFacts, layout: Layout, compute_capability: tuple[int, int]) -> list[Range] | None:
    """Bytes on a GPU of each pipeline stage, or None where the model's size is not known."""
    if model.weights_bytes is None:
        return None
    found = [_with_rounding(model, share, compute_capability) for share in shares(model, layout)]
    if model.weights_most_bytes is None:
        return found
    most = weights_per_gpu(
        replace(model, weights_bytes=model.weights_most_bytes, weights_most_bytes=None), layout, compute_capability
    )
    return [Range(low.low, high.high) for low, high in zip(found, most or found, strict=True)]


def shares(model: ModelFacts, layout: Layout) -> list[int]:
    """The exact part: bytes per GPU of each stage before any allocator rounds them."""
    total = model.weights_bytes or 0
    ranks, stages = layout.tensor_parallel_size, layout.pipeline_parallel_size
    repeated = _repeated(model, ranks)
    if stages == 1:
        return [total // ranks + repeated]
    table = (model.vocab_size or 0) * (model.hidden_size or 0) * TABLE_ELEMENT_BYTES
    body = max(0, total - 2 * table)
    layers = model.layers or stages
    ends = stage_ends(layers, stages)
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    return [
        (body * size // layers + (table if at in (0, stages - 1) else 0)) // ranks + repeated * size // layers
        for at, size in enumerate(sizes)
    ]


def _repeated(model: ModelFacts, ranks: int) -> int:
    """Bytes a rank holds beyond its even share, for parts that tensor parallelism does not divide."""
    if ranks == 1 or not (model.layers and model.hidden_size):
        return 0
    extra = 0.0
    if model.experts:
        extra += model.layers * model.hidden_size * model.experts * TABLE_ELEMENT_BYTES * (1 - 1 / ranks)
    bytes_per_parameter = (model.weights_bytes or 0) / model.params_total if model.params_total else 2.0
    mla = model.cache is not None and any(group.kind == "mla" for group in model.cache.lean)
    if mla and model.cache is not None:
        width = model.cache.lean[0].head_dim or 0
        extra += model.layers * model.hidden_size * width * bytes_per_parameter * (1 - 1 / ranks)
    elif model.kv_heads and model.head_dim and model.kv_heads < ranks:
        heads = 1 - model.kv_heads / ranks
        extra += 2 * model.layers * model.hidden_size * model.head_dim * heads * bytes_per_parameter
    return int(extra)


def _with_rounding(model: ModelFacts, share: int, compute_capability: tuple[int, int]) -> Range:
    factor = MACHETE_ROUNDING if model.four_bit_linear and compute_capability >= (9, 0) else ROUNDING
    if "mxfp4" in model.quantization.lower():
        factor *= MXFP4_PADDING
    elif model.weights_estimated:
        factor *= NOT_QUANTIZED
    return Range(share, share + min(WIDEST, int(share * (factor - 1)) + LEAST_ROUNDING_BYTES))
