"""The llama.cpp adapter: exact command lines, and verdicts over lines that llama-server printed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from apps.engines.llama_cpp.adapter import LlamaCppAdapter
from apps.engines.llama_cpp.options import EXTRA_FLAGS
from apps.engines.protocol import Cause, EngineKind, HealthProbe, InvalidOptions, ReadinessState
from tests.engines.contexts import GEMMA, INSTALLS, context, slots, written

GOLDEN = Path(__file__).parent / "golden"
HELP = Path(__file__).resolve().parents[3] / "shared" / "fixtures" / "llama-server-help.txt"
LLAMA = INSTALLS[EngineKind.LLAMA_CPP]
adapter = LlamaCppAdapter()

ON_CPU = context(GEMMA, LLAMA, {"context_tokens": 4096, "parallel": 2, "threads": 2})
ON_TWO_CARDS = context(
    replace(GEMMA, served_name="big", source="/models/big.gguf", chat_template=None),
    LLAMA,
    {
        "context_tokens": 16384,
        "gpu_layers": "all",
        "split_mode": "layer",
        "tensor_split": [3, 1],
        "batch_tokens": 2048,
        "micro_batch_tokens": 512,
        "flash_attention": "on",
        "cache_type_k": "q8_0",
        "cache_type_v": "q8_0",
        "extra_args": ["--n-cpu-moe", "4", "--swa-full"],
    },
    replicas=slots(2),
)


@pytest.mark.parametrize(("name", "given"), [("gemma-3-270m-cpu", ON_CPU), ("two-cards", ON_TWO_CARDS)])
def test_the_command_line_is_the_golden_one(name: str, given: object) -> None:
    assert written(adapter.launch_specs(given)) == (GOLDEN / f"llama_cpp-{name}.txt").read_text()  # type: ignore[arg-type]


def test_every_flag_exists_in_llama_server() -> None:
    if not HELP.exists():
        pytest.skip(f"needs llama-server's recorded help text at {HELP}")
    known = HELP.read_text()
    ours = {part for given in (ON_CPU, ON_TWO_CARDS) for part in adapter.launch_specs(given)[0].argv}
    for flag in sorted(set(EXTRA_FLAGS) | {part for part in ours if part.startswith("--")}):
        assert flag in known, flag


def test_a_named_template_switches_jinja_off_and_a_jinja_template_does_not() -> None:
    """With Jinja on, llama.cpp takes the word "gemma" itself for the template."""
    assert "--no-jinja" in adapter.launch_specs(ON_CPU)[0].argv
    own = replace(ON_CPU, options={"chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"})
    assert "--no-jinja" not in adapter.launch_specs(own)[0].argv


def test_an_engine_on_the_cpu_sees_no_card() -> None:
    launch = adapter.launch_specs(ON_CPU)[0]
    assert launch.env["CUDA_VISIBLE_DEVICES"] == ""
    assert launch.argv[launch.argv.index("--n-gpu-layers") + 1] == "0"


def test_only_gguf_files_are_served() -> None:
    with pytest.raises(InvalidOptions, match="is not one"):
        adapter.launch_specs(replace(ON_CPU, model=replace(GEMMA, source="/models/folder")))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"chat_template": "gema"}, "Did you mean gemma?"),
        ({"extra_args": ["--api-key", "x"]}, "--api-key is not among the flags"),
        ({"extra_args": ["--swa-ful"]}, "did you mean --swa-full?"),
        ({"extra_args": ["--n-cpu-moe"]}, "--n-cpu-moe is missing its value"),
        ({"extra_args": ["--n-cpu-moe", "--host"]}, "cannot take the value"),
        ({"cache_type_v": "q4_0", "flash_attention": "off"}, "needs flash_attention"),
        ({"context_size": 5}, "Unknown option"),
    ],
)
def test_a_wrong_option_is_explained(options: dict[str, object], words: str) -> None:
    with pytest.raises(InvalidOptions) as caught:
        adapter.check(options)
    assert words in str(caught.value)


FAILURES = [
    (
        "0.00.004 E gguf_init_from_file: failed to open GGUF file '/nope/x.gguf' (No such file or directory)\n"
        "0.00.004 E llama_model_load: error loading model: llama_model_loader: failed to load model from /nope/x.gguf",
        Cause.MODEL_MISSING,
        "/nope/x.gguf",
    ),
    ("E srv start: couldn't bind HTTP server socket, hostname: 127.0.0.1, port: 18101", Cause.PORT_BUSY, "18101"),
    ("error: invalid argument: --nonsense", Cause.BAD_FLAG, "--nonsense"),
    (
        "failed to allocate buffer of size 9216196608\nfailed to initialize the context: failed to allocate buffer for "
        "kv cache",
        Cause.KV_CACHE_TOO_SMALL,
        "context",
    ),
    ("ggml_backend_cuda_buffer_type_alloc_buffer: cudaMalloc failed: out of memory", Cause.OUT_OF_MEMORY, "GPU"),
    ("error loading model: unknown model architecture: 'new'", Cause.WRONG_QUANTIZATION, "unknown model architecture"),
    ("ModuleNotFoundError: No module named 'xllamacpp'", Cause.ENGINE_MISSING, "starter"),
    (
        "0.01.386.103 E llama_model_load: error loading model: device RPC0 does not support split buffers",
        Cause.UNSUPPORTED_SPLIT,
        "RPC0 does not support split buffers",
    ),
    ("write error: No space left on device", Cause.DISK_FULL, "full"),
]


@pytest.mark.parametrize(("line", "cause", "words"), FAILURES)
def test_a_failure_is_recognised(line: str, cause: Cause, words: str) -> None:
    found = adapter.diagnose(f"I srv load_model: loading model\n{line}\nE srv: exiting due to model loading error\n", 1)
    assert found.cause is cause
    assert words in found.summary
    assert found.evidence


def test_a_start_goes_forward_through_its_phases() -> None:
    lines = (
        "0.00.545 I srv          init: initializing ...\n",
        "0.00.931 I srv    load_model: loading model '/models/gemma.gguf'\n",
        "0.01.780 I cmn          init: llama threadpool init, n_threads = 2\n",
        "0.01.641 I srv    load_model: initializing, n_slots = 1, n_ctx_slot = 2048\n",
        "0.01.449 I srv          init: model loaded\n",
    )
    seen = [adapter.readiness("".join(lines[:end]), HealthProbe(503)) for end in range(1, len(lines) + 1)]
    assert [v.phase for v in seen] == ["process", "weights", "cache", "server", "server"]
    assert [v.fraction for v in seen] == sorted(v.fraction for v in seen)


def test_a_fatal_line_ends_the_wait_before_the_process_does() -> None:
    log = "0.00.73 E srv          init: exiting due to model loading error\n"
    assert adapter.readiness(log, HealthProbe(None)).state is ReadinessState.FAILED


def test_metrics_are_normalised() -> None:
    text = (
        "# TYPE llamacpp:prompt_tokens_total counter\nllamacpp:prompt_tokens_total 31\n"
        "llamacpp:tokens_predicted_total 64\nllamacpp:n_decode_total 80\n"
        "llamacpp:requests_processing 1\nllamacpp:requests_deferred 2\n"
    )
    found = adapter.parse_metrics(text)
    assert (found.requests_running, found.requests_waiting) == (1, 2)
    assert (found.prompt_tokens_total, found.generation_tokens_total, found.steps_total) == (31, 64, 80)
    assert found.kv_cache_usage_ratio is None
