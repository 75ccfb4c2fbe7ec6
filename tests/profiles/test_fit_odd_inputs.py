"""Whatever a catalogue row, an option or a card says, the planner answers or refuses in words."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from apps.profiles import fit

GIB = 2**30
PARTS = ("weights", "kv_cache", "activation", "cuda_graphs", "overhead", "slack")


def maybe(low: int, high: int) -> st.SearchStrategy[int | None]:
    return st.none() | st.integers(low, high)


groups = st.one_of(
    st.builds(
        lambda n, h, d: fit.LayerGroup("full", n, kv_heads=h, head_dim=d),
        st.integers(1, 128),
        st.integers(1, 128),
        st.sampled_from((64, 96, 128, 192, 256, 512)),
    ),
    st.builds(
        lambda n, h, d, w: fit.LayerGroup("sliding", n, kv_heads=h, head_dim=d, window=w),
        st.integers(1, 128),
        st.integers(1, 64),
        st.sampled_from((64, 128, 256)),
        st.integers(1, 8192),
    ),
    st.builds(lambda n, d: fit.LayerGroup("mla", n, head_dim=d), st.integers(1, 64), st.sampled_from((320, 576))),
    st.builds(
        lambda n, b: fit.LayerGroup("state", n, state_bytes_per_layer=b), st.integers(1, 64), st.integers(1, 2**24)
    ),
)
shapes = st.lists(groups, max_size=3).map(lambda g: fit.CacheShape(tuple(g), tuple(g)))
models = st.builds(
    fit.ModelFacts,
    name=st.just("Odd"),
    weights_bytes=maybe(0, 2**41),
    weights_estimated=st.booleans(),
    params_total=maybe(1, 2**41),
    layers=maybe(1, 200),
    hidden_size=maybe(1, 32768),
    attention_heads=maybe(1, 256),
    kv_heads=maybe(1, 256),
    head_dim=maybe(1, 512),
    intermediate_size=maybe(1, 200_000),
    vocab_size=maybe(1, 1_000_000),
    experts=maybe(1, 512),
    experts_per_token=maybe(1, 16),
    max_context_tokens=maybe(1, 10_000_000),
    quantization=st.sampled_from(("", "awq int4 g128", "mxfp4", "fp8", "gptq g32")),
    architecture=st.sampled_from(("", "GptOssForCausalLM")),
    cache=st.none() | shapes,
)
layouts = st.builds(fit.Layout, st.integers(1, 4), st.sampled_from((1, 2, 3, 4, 8)), st.integers(1, 4))
options = st.builds(
    fit.EngineOptions,
    max_model_len=maybe(1, 10_000_000),
    gpu_memory_utilization=st.floats(0.01, 1.0),
    max_num_seqs=st.integers(1, 4096),
    max_num_batched_tokens=st.integers(1, 65536),
    kv_cache_dtype=st.sampled_from(("auto", "fp8", "int8_per_token_head", "nvfp4")),
    block_size=st.sampled_from((1, 16, 128)),
    enforce_eager=st.booleans(),
    enable_prefix_caching=st.booleans(),
    enable_sleep_mode=st.booleans(),
    kv_cache_memory_bytes=maybe(1, 2**40),
    max_cudagraph_capture_size=maybe(0, 65536),
    cpu_offload_bytes=st.integers(0, 2**38),
    auto_max_model_len=st.booleans(),
    compile_cached=st.none() | st.booleans(),
    vllm_version=st.sampled_from(((0, 26), (0, 33))),
)
cards = st.lists(
    st.builds(
        fit.CardMemory,
        st.integers(1, 200 * GIB),
        maybe(0, 200 * GIB),
        st.integers(0, 3),
        st.booleans(),
    ),
    min_size=0,
    max_size=8,
)


@settings(max_examples=150, deadline=None)
@given(models, layouts, options, cards)
def test_the_estimate_answers_or_refuses_in_words(
    model: fit.ModelFacts, layout: fit.Layout, engine: fit.EngineOptions, memory: list[fit.CardMemory]
) -> None:
    rig = fit.RigMemory(tuple(memory))
    found = fit.estimate(model, layout, engine, rig)
    assert found.reason.endswith((".", "!"))
    assert found.verdict in (None, *fit.Verdict)
    for gpu in found.gpus:
        for part in PARTS:
            value: fit.Range = getattr(gpu, part)
            assert value.low <= value.high <= value.low + 1.5 * GIB, part
            assert part == "slack" or value.low >= 0, part
    for change in found.changes:
        assert isinstance(change.options, fit.EngineOptions)
        assert fit.outcome(model, change.layout, change.options, rig).verdict is fit.Verdict.FITS
    if found.verdict is fit.Verdict.DOES_NOT_FIT and engine.kv_cache_memory_bytes is None:
        less = replace(engine, max_num_seqs=max(1, engine.max_num_seqs // 2))
        assert fit.estimate(model, layout, less, rig).reason


@settings(max_examples=100, deadline=None)
@given(
    models,
    layouts,
    st.builds(
        fit.LlamaOptions,
        context_tokens=maybe(0, 10_000_000),
        parallel=maybe(1, 256),
        gpu_layers=st.none() | st.sampled_from(("auto", "all")) | st.integers(0, 1000),
        split_mode=st.none() | st.sampled_from(("none", "layer", "row", "tensor")),
        tensor_split=st.none() | st.lists(st.floats(0, 10), min_size=1, max_size=8).map(tuple),
        micro_batch_tokens=st.integers(1, 65536),
        flash_attention=st.none() | st.sampled_from(("on", "off", "auto")),
        cache_type_k=st.sampled_from(("f16", "q8_0", "q4_0")),
    ),
    cards,
    st.none() | st.builds(fit.GgufFile, st.integers(1, 2**40), st.lists(st.integers(1, 2**33), max_size=80).map(tuple)),
)
def test_llama_cpp_too(
    model: fit.ModelFacts,
    layout: fit.Layout,
    engine: fit.LlamaOptions,
    memory: list[fit.CardMemory],
    file: fit.GgufFile | None,
) -> None:
    found = fit.llama_estimate(model, layout, engine, fit.RigMemory(tuple(memory)), file)
    assert found.reason.endswith(".")
    assert fit.llama_host_estimate(model, engine, host_total_bytes=2**36, file=file).reason.endswith(".")
