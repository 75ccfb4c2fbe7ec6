"""Weights that vLLM quantizes while it loads a 16 bit checkpoint (``--quantization`` beside such a model). Pure.

Read in vLLM 0.32 (``config/quantization.py``, ``layers/quantization/online``): linear layers and experts, or experts
alone, are kept in fewer bits, one layer after the other; embedding, output head and norms stay in 16 bit.
"""

from __future__ import annotations

from dataclasses import replace

from apps.profiles.fit.inputs import ModelFacts
from apps.profiles.fit.weights import NOT_QUANTIZED, TABLE_ELEMENT_BYTES

# Bytes a value takes with its share of the scales.
EVERYWHERE = {
    "fp8": 1.0,  # fp8_per_tensor, as it was called before
    "fp8_per_tensor": 1.0,
    "fp8_per_channel": 1.0,
    "fp8_per_block": 1.0 + 4 / 128**2,
    "ptpc_fp8": 1.0,
    "mxfp8": 1.0 + 1 / 32,
    "mxfp4": 0.5 + 1 / 32,
    "bitsandbytes": 0.5 + 4 / 64,
}
EXPERTS_ONLY = {
    "experts_int8": 1.0,
    "int8_per_channel_weight_only": 1.0,
    "nvfp4_per_token": 0.5 + 1 / 16,
}
BY_CONFIGURATION = ("online", "torchao")  # which layers, quantization_config or the model's own says
SIXTEEN_BIT = 1.8  # bytes a parameter, from which on a checkpoint counts as one of 16 bit


def is_16_bit(model: ModelFacts) -> bool:
    if model.weights_bytes is None:
        return False
    if model.params_total:
        return model.weights_bytes >= SIXTEEN_BIT * model.params_total
    return model.quantization.lower().startswith(("bf16", "fp16"))


def quantized(model: ModelFacts, scheme: str) -> ModelFacts | None:
    """The model as it lies on the cards; itself where the scheme leaves it as it is, None where nobody can say.

    Low: one 16 bit table, which serves as output head too. High: two, and what a quantizer leaves besides.
    """
    scheme = scheme.lower()
    if not is_16_bit(model) or scheme not in (*EVERYWHERE, *EXPERTS_ONLY, *BY_CONFIGURATION):
        return model
    total = model.weights_bytes or 0
    if scheme in EVERYWHERE:
        share = EVERYWHERE[scheme] / TABLE_ELEMENT_BYTES
        table = min((model.vocab_size or 0) * (model.hidden_size or 0) * TABLE_ELEMENT_BYTES, total // 2)
        low, high = (int(kept + (total - kept) * share) for kept in (table, 2 * table))
        return replace(model, weights_bytes=low, weights_most_bytes=min(total, int(high * NOT_QUANTIZED)))
    if scheme in BY_CONFIGURATION:
        return None
    if not model.experts:
        return model
    experts = _expert_bytes(model)
    if experts is None:
        return None
    low = int(total - experts * (1 - EXPERTS_ONLY[scheme] / TABLE_ELEMENT_BYTES))
    return replace(model, weights_bytes=low, weights_most_bytes=min(total, int(low * NOT_QUANTIZED)))


def _expert_bytes(model: ModelFacts) -> int | None:
    if not (model.experts and model.layers and model.hidden_size and model.intermediate_size):
        return None
    found = 3 * TABLE_ELEMENT_BYTES * model.layers * model.experts * model.hidden_size * model.intermediate_size
    return found if found < (model.weights_bytes or 0) else None
