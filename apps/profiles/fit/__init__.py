"""Whether a model fits a rig, and how many tokens of KV cache it will have. Pure functions, no I/O."""

from apps.profiles.fit.correction import NO_CORRECTION, BootFacts, Correction, Prediction, correction
from apps.profiles.fit.estimate import Change, FitEstimate, estimate
from apps.profiles.fit.gpus import GpuEstimate, Verdict
from apps.profiles.fit.inputs import (
    CacheShape,
    CardMemory,
    EngineOptions,
    GgufFile,
    Layout,
    LlamaOptions,
    ModelFacts,
    RigMemory,
    cache_shape,
    model_facts,
)
from apps.profiles.fit.kv_cache import KvCacheCapacity, bytes_for_one_request, kv_cache_capacity
from apps.profiles.fit.layers import KV_CACHE_DTYPES, LayerGroup
from apps.profiles.fit.llama_cpp import llama_estimate, llama_host_estimate
from apps.profiles.fit.online import quantized
from apps.profiles.fit.outcomes import BootForecast, Outcome, outcome, prediction_of
from apps.profiles.fit.ranges import Range

__all__ = [
    "KV_CACHE_DTYPES",
    "NO_CORRECTION",
    "BootFacts",
    "BootForecast",
    "CacheShape",
    "CardMemory",
    "Change",
    "Correction",
    "EngineOptions",
    "FitEstimate",
    "GgufFile",
    "GpuEstimate",
    "KvCacheCapacity",
    "LayerGroup",
    "Layout",
    "LlamaOptions",
    "ModelFacts",
    "Outcome",
    "Prediction",
    "Range",
    "RigMemory",
    "Verdict",
    "bytes_for_one_request",
    "cache_shape",
    "correction",
    "estimate",
    "kv_cache_capacity",
    "llama_estimate",
    "llama_host_estimate",
    "model_facts",
    "outcome",
    "prediction_of",
    "quantized",
]
