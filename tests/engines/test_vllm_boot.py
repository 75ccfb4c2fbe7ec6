"""What a start of vLLM tells of itself, over logs of a real H200 and lines of newer versions."""

from __future__ import annotations

from pathlib import Path

import pytest

from apps.engines.vllm.boot import GIB, boot_facts, check_boot

FIXTURES = Path(__file__).resolve().parents[3] / "shared" / "fixtures" / "vllm-gpu"

NEWER = """
(Worker_TP0 pid=9) INFO 11-23 18:24:36 [gpu_model_runner.py:1] Model loading took 4.51 GiB memory and 3.330846 seconds
(Worker_TP1 pid=8) INFO 11-23 18:24:36 [gpu_model_runner.py:1] Model loading took 4.53 GiB memory and 4.0 seconds
(EngineCore pid=7) INFO 11-23 18:25:30 [kv.py:2] GPU KV cache size: 84,288 tokens, Maximum concurrency for 32,768 \
tokens per request: 2.57x
(Worker_TP0 pid=9) INFO 11-23 18:25:33 [gpu_worker.py:857] Free memory on device (22.9/23.55 GiB) on startup. Desired \
GPU memory utilization is (0.9, 21.2 GiB). Actual usage is 4.93 GiB for consumed memory (weights + non-torch), 1.04 \
GiB for peak activation, and 0.49 GiB for CUDAGraph memory. Replace gpu_memory_utilization config with ...
"""


def recorded(name: str) -> str:
    path = FIXTURES / name
    if not path.exists():
        pytest.skip(f"needs the recording {name} beside the repository")
    return path.read_text(errors="replace")


def gib(count: int | None) -> float | None:
    return None if count is None else round(count / GIB, 2)


@pytest.mark.parametrize(
    ("name", "activation", "available", "tokens", "compiled", "compile_seconds"),
    [
        ("A1-awq32-cold.log", 1.49, 2.87, 11728, True, 51.09),
        ("second-identical-boot.log", 0.38, 3.98, 16304, False, 10.99),
    ],
)
def test_a_first_and_a_second_boot_tell_their_memory_and_whether_they_compiled(
    name: str, activation: float, available: float, tokens: int, compiled: bool, compile_seconds: float
) -> None:
    facts = boot_facts(recorded(name))
    assert gib(facts.weights) == 18.49
    assert gib(facts.activation) == activation
    assert gib(facts.non_torch) == 0.22
    assert gib(facts.cuda_graphs) == 0.2
    assert gib(facts.available_kv) == available
    assert facts.kv_cache_tokens == tokens
    assert facts.compiled is compiled
    assert facts.plan_may_be_kept is not compiled
    assert facts.seconds["compile"] == compile_seconds
    assert 2 < facts.seconds["weights"] < 4
    assert facts.seconds["imports"] > 10
    assert facts.trusted


def test_an_applied_startup_plan_is_seen_with_its_pinned_cache() -> None:
    facts = boot_facts(recorded("startup-plan-applied.log"))
    assert (facts.startup_plan, facts.kv_cache_tokens, gib(facts.available_kv)) == ("applied", 10336, 2.52)
    assert facts.activation is None


def test_a_negative_non_torch_part_is_not_trusted() -> None:
    facts = boot_facts(recorded("A2-awq32-sleep-warm.log"))
    assert gib(facts.non_torch) == -3.88
    assert not facts.trusted


def test_newer_forms_with_two_ranks_are_read() -> None:
    facts = boot_facts(NEWER)
    assert gib(facts.weights) == 4.53  # the fullest rank
    assert gib(facts.non_torch) == 0.4
    assert (gib(facts.activation), gib(facts.cuda_graphs)) == (1.04, 0.49)
    assert (facts.kv_cache_tokens, facts.max_concurrency) == (84288, 2.57)
    assert facts.compiled is None


def test_an_empty_log_tells_nothing() -> None:
    facts = boot_facts("")
    assert facts.weights is None
    assert facts.seconds == {}
    assert facts.trusted


def test_a_start_that_cannot_be_trusted_is_told_and_a_plan_of_one_that_compiled_is_thrown_away() -> None:
    (warning,) = check_boot(recorded("A2-awq32-sleep-warm.log")).warnings
    assert warning.startswith("vLLM counted 3.9 GiB as used that had been freed")
    saved = "INFO [startup_plan.py:99] Saved startup plan to /var/cache/startup_plan/startup_plan_76dd.json\n"
    compiled = check_boot("Compiling a graph for compile range (1, 2048) takes 17.15 s\n" + saved)
    assert compiled.discard == ("/var/cache/startup_plan/startup_plan_76dd.json",)
    hit = check_boot("Directly load AOT compilation from path /x\n" + saved)
    assert (hit.discard, hit.facts["compiled"], hit.warnings) == ((), False, ())
