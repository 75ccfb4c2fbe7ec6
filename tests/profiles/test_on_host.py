"""vLLM on the CPU: the plan counts the cache that the launch asks for, and that is enough to start."""

from __future__ import annotations

from typing import Any

import pytest

from apps.engines.protocol import EngineKind
from apps.engines.registry import adapter
from apps.profiles import fit
from apps.profiles.fit import Verdict
from apps.profiles.forecast import Forecast, RigState, forecast, host_cache_bytes
from apps.profiles.models import ProfileVersion
from tests.engines.contexts import INSTALLS, ModelSpec, context
from tests.profiles.test_forecast import MODELS

GIB = 2**30
EMBEDDING = "qwen3-embedding-4b"
HOST = RigState(host_total_bytes=64 * GIB, host_available_bytes=60 * GIB)


def version(engine: str = "vllm", ranks: int = 1, slug: str = EMBEDDING, **options: Any) -> ProfileVersion:
    return ProfileVersion(
        model=MODELS[slug], engine=engine, device="cpu", replicas=1, tensor_parallel_size=ranks, options=options
    )


def launched_with(profile: ProfileVersion) -> int:
    """Bytes of cache on its command line."""
    model = ModelSpec("e", "/models/e", request_cache_bytes=host_cache_bytes(profile))
    engine = EngineKind(profile.engine)
    launches = adapter(engine).launch_specs(
        context(model, INSTALLS[engine], profile.options, tensor_parallel_size=profile.tensor_parallel_size)
    )
    argv = launches[0].argv
    if engine is EngineKind.VLLM:
        return int(argv[argv.index("--kv-cache-memory-bytes") + 1])
    text = next(part for part in argv if "kv_cache_memory_bytes" in part)
    return int(text.partition('"kv_cache_memory_bytes":')[2].partition(",")[0])


def planned(profile: ProfileVersion, state: RigState = HOST) -> Forecast:
    return forecast(profile, (), (), state)


@pytest.mark.parametrize("engine", ["vllm", "ray_serve"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_long_context_is_started_with_a_cache_that_holds_it(engine: str, ranks: int) -> None:
    profile = version(engine, ranks, max_model_len=16384)
    assert planned(profile).verdict is Verdict.FITS
    shape = fit.model_facts({"name": "e", "kv": MODELS[EMBEDDING].kv}).cache
    assert shape is not None
    sizes = {"tensor_parallel_size": ranks, "max_model_len": 16384, "block_size": 128}
    found = fit.kv_cache_capacity(shape.rich, available_kv_bytes=launched_with(profile), **sizes)
    assert found.fits
    assert not fit.kv_cache_capacity(shape.rich, available_kv_bytes=GIB, **sizes).fits


@pytest.mark.parametrize("engine", ["vllm", "ray_serve"])
@pytest.mark.parametrize("length", [512, "auto"])
def test_a_short_or_an_automatic_context_is_started_with_a_gibibyte(engine: str, length: int | str) -> None:
    profile = version(engine, max_model_len=length)
    assert launched_with(profile) == GIB
    found = planned(profile)
    assert found.verdict is Verdict.FITS
    assert found.estimate.host_memory is not None
    assert found.estimate.host_memory.low == MODELS[EMBEDDING].weights_bytes + GIB + 2 * GIB  # type: ignore[operator]


def test_an_automatic_context_is_told_as_vllm_shortens_it() -> None:
    """A gibibyte holds 56 blocks of 128 tokens of 147,456 bytes, of which vLLM holds one back."""
    assert planned(version(max_model_len="auto")).estimate.max_model_len == 55 * 128


def test_the_cache_that_is_asked_for_is_counted_and_not_another() -> None:
    found = planned(version(max_model_len=512, kv_cache_memory_bytes=20 * GIB)).estimate.host_memory
    assert found is not None
    assert found.low == MODELS[EMBEDDING].weights_bytes + 22 * GIB  # type: ignore[operator]


def test_a_cache_too_small_for_one_request_is_refused_before_vllm_does() -> None:
    found = planned(version(max_model_len=16384, kv_cache_memory_bytes=GIB))
    assert found.verdict is Verdict.DOES_NOT_FIT
    assert "2.27 GiB of KV cache, and kv_cache_memory_bytes is 1.00 GiB" in found.sentence
    assert "max_model_len to 7,040 tokens" in found.sentence


def test_float32_is_twice_the_weights_and_twice_the_cache() -> None:
    wide, plain = version(max_model_len=16384, dtype="float32"), version(max_model_len=16384)
    assert launched_with(wide) == 2 * launched_with(plain)
    low = [planned(v).estimate.host_memory for v in (wide, plain)]
    assert low[0] is not None
    assert low[1] is not None
    assert low[0].low - 2 * GIB == 2 * (low[1].low - 2 * GIB)


def test_nothing_is_asked_for_elsewhere() -> None:
    assert host_cache_bytes(version("llama_cpp")) is None
    on_cards = version(max_model_len=16384)
    on_cards.device = "gpu"
    assert host_cache_bytes(on_cards) is None
    assert host_cache_bytes(version(slug="command-r-08-2024")) is None
    assert host_cache_bytes(version(slug="bge-m3")) == 0
