"""What every engine adapter promises, whatever engine it is for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from apps.engines.protocol import (
    Cause,
    EngineAdapter,
    EngineKind,
    EngineMetrics,
    HealthProbe,
    InvalidOptions,
    LaunchContext,
    ReadinessState,
    SharesOneAddress,
)
from apps.engines.registry import ADAPTERS, adapter
from apps.engines.simulated.adapter import simulated_install
from tests.engines.contexts import CODER, GEMMA, INSTALLS, context, slots

OPTIONS = {
    EngineKind.LLAMA_CPP: {"context_tokens": 4096, "parallel": 2},
    EngineKind.RAY_SERVE: {"max_model_len": 4096, "max_ongoing_requests": 8},
    EngineKind.SIMULATED: {"max_model_len": 4096, "load_seconds": 1},
    EngineKind.VLLM: {"max_model_len": 4096, "enforce_eager": True},
}


@pytest.fixture(params=sorted(ADAPTERS))
def engine(request: pytest.FixtureRequest) -> EngineAdapter:
    return adapter(request.param)


def two_replicas(engine: EngineAdapter) -> LaunchContext:
    install = INSTALLS.get(engine.kind) or simulated_install()
    model = GEMMA if engine.kind is EngineKind.LLAMA_CPP else CODER
    return context(model, install, OPTIONS[engine.kind], replicas=slots(2, replicas=2), tensor_parallel_size=2)


def test_it_is_an_adapter_and_is_made_once(engine: EngineAdapter) -> None:
    assert isinstance(engine, EngineAdapter)
    assert adapter(engine.kind) is engine
    assert engine.health_path.startswith("/")
    assert engine.start_timeout_seconds > 0


def test_options_are_normalised_to_what_was_set_and_normalising_is_stable(engine: EngineAdapter) -> None:
    once = engine.check(OPTIONS[engine.kind])
    assert set(once) == set(OPTIONS[engine.kind])
    assert engine.check(once) == once
    assert engine.check({}) == {}


def test_several_wrong_options_are_all_named_at_once(engine: EngineAdapter) -> None:
    with pytest.raises(InvalidOptions) as caught:
        engine.check({"host": "0.0.0.0", "api_key": "x", "zzzz": 1, "served_model_name": "me"})
    assert [e.field for e in caught.value.errors] == ["host", "api_key", "zzzz", "served_model_name"]
    assert all(e.message.endswith((".", "?")) for e in caught.value.errors)


def test_an_almost_right_option_is_answered_with_the_right_one(engine: EngineAdapter) -> None:
    known = next(iter(OPTIONS[engine.kind]))
    with pytest.raises(InvalidOptions, match=f"Did you mean {known}"):
        engine.check({known + "s": 1})


def test_a_key_goes_by_the_secret_environment_alone(engine: EngineAdapter) -> None:
    for launch in engine.launch_specs(two_replicas(engine)):
        slot = slots(2, replicas=2)[launch.replica]
        assert slot.api_key in launch.secret_env.values()
        assert slot.api_key not in " ".join(launch.argv)
        assert slot.api_key not in " ".join(launch.env.values())


def test_each_replica_gets_its_own_launch_on_its_own_port_and_cards(engine: EngineAdapter) -> None:
    if isinstance(engine, SharesOneAddress):
        pytest.skip("one launch serves all of its replicas")
    launches = engine.launch_specs(two_replicas(engine))
    assert [launch.launch_id for launch in launches] == ["launch-0", "launch-1"]
    assert [launch.replica for launch in launches] == [0, 1]
    assert ["28100" in launch.argv for launch in launches] == [True, False]
    first, second = (f"{launch.argv} {launch.env}" for launch in launches)
    assert slots(2, replicas=2)[0].gpu_uuids[0] in first
    assert slots(2, replicas=2)[0].gpu_uuids[0] not in second
    assert all(part for launch in launches for part in launch.argv)


def test_replicas_behind_one_address_are_one_launch_with_all_cards(engine: EngineAdapter) -> None:
    if not isinstance(engine, SharesOneAddress):
        pytest.skip("each of its replicas is a launch")
    (launch,) = engine.launch_specs(two_replicas(engine))
    first, second = slots(2, replicas=2)
    assert (launch.launch_id, launch.replica) == (first.launch_id, 0)
    assert "28100" in launch.argv
    assert "28101" not in launch.argv
    words = f"{launch.argv} {launch.env}"
    assert all(uuid in words for uuid in (*first.gpu_uuids, *second.gpu_uuids))
    assert all(part for part in launch.argv)
    assert engine.replicas_path.startswith("/")
    assert engine.parse_report("<html>") is None


def test_stopping_ends_with_sigkill(engine: EngineAdapter) -> None:
    for launch in engine.launch_specs(two_replicas(engine)):
        assert launch.stop_signals[0][0] == "SIGTERM"
        assert launch.stop_signals[-1][0] == "SIGKILL"


@pytest.mark.parametrize("name", ["--port=1", "", "a\nb"])
def test_a_name_that_could_be_read_as_a_flag_is_refused(engine: EngineAdapter, name: str) -> None:
    given = two_replicas(engine)
    with pytest.raises(InvalidOptions, match="cannot be used"):
        engine.launch_specs(replace(given, model=replace(given.model, served_name=name)))


def test_an_empty_log_waits_and_health_makes_it_ready(engine: EngineAdapter) -> None:
    waiting = engine.readiness("", HealthProbe(status=None))
    assert (waiting.state, waiting.fraction) == (ReadinessState.WAITING, 0.0)
    ready = engine.readiness("", HealthProbe(status=200))
    assert (ready.state, ready.fraction) == (ReadinessState.READY, 1.0)


@pytest.mark.parametrize(
    "text", ["", "\0\xff", "{}", "name{", 'x{a="b"} NaN', "<html>", "vllm:num_requests_running abc"]
)
def test_odd_metrics_say_nothing_and_raise_nothing(engine: EngineAdapter, text: str) -> None:
    assert engine.parse_metrics(text) == EngineMetrics()


def test_an_unknown_end_is_called_unknown(engine: EngineAdapter) -> None:
    found = engine.diagnose("something nobody has seen before\n", 1)
    assert found.cause is Cause.UNKNOWN
    assert "something nobody has seen before" in found.evidence
    assert dict(found.suggested_options) == {}


def test_a_sigkill_is_explained(engine: EngineAdapter) -> None:
    assert engine.diagnose("", -9).cause is Cause.KILLED


def test_unknown_engines_are_refused_in_words() -> None:
    with pytest.raises(InvalidOptions, match="There is no engine 'ollama'"):
        adapter("ollama")
