"""The vLLM adapter: exact command lines for the seed models, and verdicts over real logs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from apps.engines.protocol import (
    Cause,
    EngineKind,
    HealthProbe,
    InvalidOptions,
    LaunchContext,
    ModelSpec,
    ReadinessState,
)
from apps.engines.vllm.adapter import VllmAdapter
from apps.engines.vllm.flags import FlagKind, flags_from_dict, flags_to_dict, parse_help, shipped_flags
from tests.engines.contexts import CODER, INSTALLS, MIXTRAL, R1_DISTILL, context, slots, written

GOLDEN = Path(__file__).parent / "golden"
FIXTURES = Path(__file__).resolve().parents[3] / "shared" / "fixtures"
TINY = ModelSpec(served_name="tiny", source="/models/tiny-llama", max_context_tokens=1024)
NOTHING = HealthProbe(status=None)
adapter = VllmAdapter()


def seed(model: str) -> LaunchContext:
    vllm = INSTALLS[EngineKind.VLLM]
    return {
        "mixtral-8x22b-tp4": context(
            MIXTRAL,
            vllm,
            {"max_model_len": 32768, "gpu_memory_utilization": 0.9, "max_num_seqs": 32},
            replicas=slots(4),
            tensor_parallel_size=4,
            cache_dir="/var/lib/rigpanel/cache/vllm",
        ),
        "r1-distill-70b-tp4": context(
            R1_DISTILL,
            vllm,
            {"max_model_len": 98304, "gpu_memory_utilization": 0.9, "max_num_seqs": 32},
            replicas=slots(4),
            tensor_parallel_size=4,
        ),
        "qwen25-coder-32b-2xtp2": context(
            CODER,
            vllm,
            {"max_model_len": 32768, "gpu_memory_utilization": 0.9, "max_num_seqs": 32},
            replicas=slots(2, replicas=2),
            tensor_parallel_size=2,
            nvlinked=True,
        ),
        "qwen25-coder-32b-tp4": context(
            CODER,
            vllm,
            {"max_model_len": 32768, "gpu_memory_utilization": 0.9, "max_num_seqs": 32},
            replicas=slots(4),
            tensor_parallel_size=4,
        ),
        "qwen25-coder-32b-dp2": context(
            CODER,
            vllm,
            {"max_model_len": 32768, "gpu_memory_utilization": 0.9, "max_num_seqs": 32, "data_parallel": True},
            replicas=slots(4),
            tensor_parallel_size=2,
            data_parallel_size=2,
            nvlinked=True,
        ),
        "tiny-llama-cpu": context(
            TINY, vllm, {"max_model_len": 512, "enforce_eager": True}, replicas=slots(0), tensor_parallel_size=2
        ),
    }[model]


GOLDEN_NAMES = [
    *("mixtral-8x22b-tp4", "r1-distill-70b-tp4", "qwen25-coder-32b-2xtp2", "qwen25-coder-32b-tp4"),
    *("qwen25-coder-32b-dp2", "tiny-llama-cpu"),
]


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_the_command_line_of_a_seed_profile_is_the_golden_one(name: str) -> None:
    assert written(adapter.launch_specs(seed(name))) == (GOLDEN / f"vllm-{name}.txt").read_text()


def test_every_flag_of_a_golden_line_exists_in_vllm() -> None:
    help_text = FIXTURES / "vllm-serve-help.txt"
    if not help_text.exists():
        pytest.skip(f"needs vLLM's recorded help text at {help_text}")
    known = help_text.read_text()
    for name in GOLDEN_NAMES:
        for launch in adapter.launch_specs(seed(name)):
            for part in launch.argv:
                if part.startswith("--"):
                    assert f"  {part}" in known, part


def test_two_bridged_cards_keep_vllms_own_all_reduce_and_two_pairs_do_not() -> None:
    pair = adapter.launch_specs(seed("qwen25-coder-32b-2xtp2"))[0]
    four = adapter.launch_specs(seed("qwen25-coder-32b-tp4"))[0]
    assert "--disable-custom-all-reduce" not in pair.argv
    assert "--disable-custom-all-reduce" in four.argv
    assert pair.env["NCCL_P2P_LEVEL"] == four.env["NCCL_P2P_LEVEL"] == "NVL"


def test_each_replica_has_its_own_cards_port_and_key() -> None:
    first, second = adapter.launch_specs(seed("qwen25-coder-32b-2xtp2"))
    assert first.env["CUDA_VISIBLE_DEVICES"].split(",") != second.env["CUDA_VISIBLE_DEVICES"].split(",")
    assert first.secret_env != second.secret_env
    assert first.argv != second.argv


def test_a_profile_can_switch_the_models_tool_parser_off() -> None:
    plain = replace(seed("mixtral-8x22b-tp4"), options={"tool_call_parser": "none"})
    assert "--tool-call-parser" not in adapter.launch_specs(plain)[0].argv


def test_a_model_from_the_hub_may_be_downloaded() -> None:
    hub = replace(seed("mixtral-8x22b-tp4"), model=replace(MIXTRAL, source="someone/mixtral-awq"))
    assert "HF_HUB_OFFLINE" not in adapter.launch_specs(hub)[0].env


@pytest.mark.parametrize(
    ("options", "field", "words"),
    [
        ({"swap_space": 4}, "swap_space", "no longer has --swap-space"),
        ({"max_model_length": 4096}, "max_model_length", "Did you mean max_model_len?"),
        ({"gpu_memory_utilization": 1.4}, "gpu_memory_utilization", "less than or equal to 1"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size", "the profile's layout"),
        ({"revision": "--api-key=x"}, "revision", "starts with '-'"),
        ({"kv_cache_dtype": "fp4"}, "kv_cache_dtype", "Input should be"),
    ],
)
def test_a_wrong_option_is_explained(options: dict[str, object], field: str, words: str) -> None:
    with pytest.raises(InvalidOptions) as caught:
        adapter.check(options)
    assert [e.field for e in caught.value.errors] == [field]
    assert words in caught.value.errors[0].message


def test_dashes_and_underscores_mean_the_same_option() -> None:
    assert adapter.check({"--max-model-len": "8192", "enforce-eager": True}) == {
        "max_model_len": 8192,
        "enforce_eager": True,
    }


@pytest.mark.parametrize("asked", ["auto", -1, "-1"])
def test_a_context_as_long_as_fits_has_one_spelling(asked: object) -> None:
    assert adapter.check({"max_model_len": asked}) == {"max_model_len": "auto"}
    argv = adapter.launch_specs(replace(seed("mixtral-8x22b-tp4"), options={"max_model_len": asked}))[0].argv
    assert argv[argv.index("--max-model-len") + 1] == "auto"


def test_a_switched_off_option_becomes_its_no_form() -> None:
    off = replace(seed("mixtral-8x22b-tp4"), options={"enable_prefix_caching": False})
    assert "--no-enable-prefix-caching" in adapter.launch_specs(off)[0].argv


# Lines as vLLM printed them; the comment says where.
FAILURES = [
    (  # 0.26 on an H200
        "ValueError: To serve at least one request with the model's max seq len (32768), (8.0 GiB KV cache is needed, "
        "which is larger than the available KV cache memory (3.94 GiB). Based on the available memory, the estimated "
        "maximum model length is 16128. Try increasing `gpu_memory_utilization` (which also controls ...",
        1,
        Cause.KV_CACHE_TOO_SMALL,
        {"max_model_len": 16128},
    ),
    (
        "ValueError: No available memory for the cache blocks. Try increasing ...",
        1,
        Cause.KV_CACHE_TOO_SMALL,
        {"gpu_memory_utilization": 0.95},
    ),
    (
        "ValueError: Free memory on device cuda:0 (115.23/139.8 GiB) on startup is less than desired GPU memory "
        "utilization (0.97, 135.61 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes.",
        1,
        Cause.OUT_OF_MEMORY,
        {"gpu_memory_utilization": 0.81},
    ),
    ("OSError: [Errno 98] Address already in use", 1, Cause.PORT_BUSY, {}),  # 0.32 on the CPU
    (
        "huggingface_hub.errors.HFValidationError: Repo id must be in the form 'repo_name' or 'namespace/repo_name': "
        "'/nope/model'. Use `repo_type` argument if needed.",
        1,
        Cause.MODEL_MISSING,
        {},
    ),
    (
        "Value error, Total number of attention heads (4) must be divisible by tensor parallel size (3).",
        1,
        Cause.UNSUPPORTED_SPLIT,
        {"tensor_parallel_size": 2},
    ),
    (
        "Value error, World size (2) is larger than the number of available GPUs (1) in this node.",
        1,
        Cause.UNSUPPORTED_SPLIT,
        {"tensor_parallel_size": 1},
    ),
    ("vllm: error: unrecognized arguments: --no-such-flag 3", 2, Cause.BAD_FLAG, {"no_such_flag": None}),
    (
        "User-specified max_model_len (4096) is greater than the derived max_model_len "
        "(max_position_embeddings=1024.0 or model_max_length=None in model's config.json).",
        1,
        Cause.BAD_FLAG,
        {"max_model_len": 1024},
    ),
    (
        "torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a total capacity of "
        "23.55 GiB of which 1.20 GiB is free.",
        1,
        Cause.OUT_OF_MEMORY,
        {"gpu_memory_utilization": 0.85},
    ),
    ("torch.OutOfMemoryError: CUDA out of memory.", 1, Cause.OUT_OF_MEMORY, {"gpu_memory_utilization": 0.85}),
    ("RuntimeError: NCCL error: unhandled system error", 1, Cause.NCCL, {"disable_custom_all_reduce": True}),
    ("OSError: [Errno 28] No space left on device", 1, Cause.DISK_FULL, {}),
    (
        "Value error, Quantization method specified in the model config (awq) does not match the quantization method "
        "specified in the `quantization` argument (gptq).",
        1,
        Cause.WRONG_QUANTIZATION,
        {"quantization": None},
    ),
    (
        "Value error, Unknown quantization method: gguf. Must be one of ...",
        1,
        Cause.WRONG_QUANTIZATION,
        {"quantization": None},
    ),
    (
        "ValueError: Available memory on node 0 (21.29/23.54 GiB) on startup is less than desired CPU memory "
        "utilization (0.92, 21.66 GiB). On the CPU backend, ...",
        1,
        Cause.OUT_OF_MEMORY,
        {"gpu_memory_utilization": 0.8},
    ),
    (
        "ValueError: Available memory on node 0 (21.77/23.54 GiB) on kv cache allocation is less than requested memory "
        "for kv (100.0 GiB). Decrease --kv-cache-memory-bytes, ...",
        1,
        Cause.KV_CACHE_TOO_SMALL,
        {"kv_cache_memory_bytes": 10 << 30},
    ),
    (
        "huggingface_hub.errors.GatedRepoError: 401 Client Error. (Request ID: x) Cannot access gated repo for url ...",
        1,
        Cause.MODEL_MISSING,
        {},
    ),
    ("huggingface_hub.errors.RepositoryNotFoundError: 401 Client Error.", 1, Cause.MODEL_MISSING, {}),
    ("safetensors_rust.SafetensorError: Error while deserializing header", 1, Cause.MODEL_MISSING, {}),
    (
        "FileNotFoundError: the supplied chat template path doesn't exist",
        1,
        Cause.BAD_FLAG,
        {"chat_template": None},
    ),
    (
        "KeyError: \"Reasoning parser 'deepthought' not found. Available parsers: ...\"",
        1,
        Cause.BAD_FLAG,
        {"reasoning_parser": "none"},
    ),
    (
        "ValueError: The repository /models/x contains custom code which must be executed to correctly load the model.",
        1,
        Cause.BAD_FLAG,
        {"trust_remote_code": True},
    ),
    (
        "ValueError: Bfloat16 is only supported on GPUs with compute capability of ...",
        1,
        Cause.BAD_FLAG,
        {"dtype": "half"},
    ),
    (
        "ValueError: FP8 KV cache is not supported by the Triton attention backend on NVIDIA GeForce RTX 3090",
        1,
        Cause.BAD_FLAG,
        {"kv_cache_dtype": "auto"},
    ),
    ("RuntimeError: The NVIDIA driver on your system is too old (found version 12020).", 1, Cause.DRIVER, {}),
    ("RuntimeError: No CUDA GPUs are available", 1, Cause.DRIVER, {}),
    ("KeyError: \"Tool parser 'wrench' not found.\"", 1, Cause.BAD_FLAG, {"tool_call_parser": "none"}),
    (
        "ValueError: gptq quantization is currently not supported in cpu.",
        1,
        Cause.WRONG_QUANTIZATION,
        {"quantization": None},
    ),
    (
        "ValueError: Following weights were not initialized from checkpoint: {'lm_head.weight'}",
        1,
        Cause.MODEL_MISSING,
        {},
    ),
    ("ImportError: libcudart.so.13: cannot open shared object file", 1, Cause.ENGINE_MISSING, {}),
    (
        "ValueError: Model architectures ['FooForCausalLM'] are not supported for now. Supported architectures: ...",
        1,
        Cause.UNKNOWN_ARCHITECTURE,
        {},
    ),
    ("/opt/vllm/bin/python: No module named 'vllm'", 1, Cause.ENGINE_MISSING, {}),
    # kill -9 of the engine's own process: the server leaves with 0
    ("vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue.", 0, Cause.CRASHED, {}),
    # From here to the next comment as the sources of vLLM 0.32, PyTorch and NCCL write them.
    (
        "ValueError: To serve at least one request with the model's max seq len (4096), (0.5 GiB KV cache is needed, "
        "which is larger than the available KV cache memory (0.02 GiB). Try increasing `gpu_memory_utilization` ...",
        1,
        Cause.KV_CACHE_TOO_SMALL,
        {"gpu_memory_utilization": 0.95},
    ),
    (
        "ValueError: Cannot auto-fit max_model_len: not enough GPU memory available to serve even a single token. Try "
        "increasing `gpu_memory_utilization`.",
        1,
        Cause.KV_CACHE_TOO_SMALL,
        {"gpu_memory_utilization": 0.95},
    ),
    (
        "Failed: Cuda error /workspace/csrc/custom_all_reduce.cuh:455 'peer access is not supported between these two "
        "devices'",
        1,
        Cause.NCCL,
        {"disable_custom_all_reduce": True},
    ),
    (
        "Failed: Cuda error /workspace/csrc/custom_all_reduce.cuh:455 'invalid argument'\n"
        "Worker proc VllmWorker-0 died unexpectedly (exit code: None), shutting down executor.",
        1,
        Cause.NCCL,
        {"disable_custom_all_reduce": True},
    ),
    (  # the first call that notices another kernel's error, so the exchange is not the reason
        "Failed: Cuda error /workspace/csrc/custom_all_reduce.cuh:455 'an illegal memory access was encountered'",
        1,
        Cause.UNKNOWN,
        {},
    ),
    (
        "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=1580, OpType=ALLREDUCE, NumelIn=8, "
        "NumelOut=8, Timeout(ms)=600000) ran for 600004 milliseconds before timing out.",
        1,
        Cause.NCCL,
        {},
    ),
    (
        "torch.distributed.DistNetworkError: The server socket has failed to listen on any local network address. "
        "port: 29500, useIpv6: false, code: -98, name: EADDRINUSE, message: address already in use",
        1,
        Cause.PORT_BUSY,
        {},
    ),
    (  # a warning: it goes on with another address
        "[W socket.cpp:401] [c10d] The server socket has failed to bind to [::]:29500 (errno: 98 - Address already in "
        "use).",
        1,
        Cause.UNKNOWN,
        {},
    ),
    (
        "ValueError: The input size is not aligned with the quantized weight shape. This can be caused by too large "
        "tensor parallel size.",
        1,
        Cause.UNSUPPORTED_SPLIT,
        {},
    ),
    # 0.32's sources: the kernel ends a process of vLLM's own, and the server leaves with 1
    (
        "Worker proc VllmWorker-1 died unexpectedly (exit code: -9), shutting down executor.\n"
        "vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue.",
        1,
        Cause.KILLED,
        {},
    ),
    ("RuntimeError: See root cause above. Failed core proc(s): {'EngineCore_DP0': -9}", 1, Cause.KILLED, {}),
    ("RuntimeError: Failed core proc(s): {'EngineCore_DP0': 1, 'EngineCore_DP1': -9}", 1, Cause.KILLED, {}),
    ("RuntimeError: See root cause above. Failed frontend proc(s): {'ApiServer_1': -9}", 1, Cause.KILLED, {}),
    ("RuntimeError: Process ApiServer_1 (PID: 612) died with exit code -9", 1, Cause.KILLED, {}),
    ("Worker proc VllmWorker-1 died unexpectedly (exit code: -6), shutting down executor.", 1, Cause.CRASHED, {}),
    ("RuntimeError: Failed core proc(s): {'EngineCore_DP0': -91}", 1, Cause.UNKNOWN, {}),
    ("INFO everything is fine", -9, Cause.KILLED, {}),
    ("INFO everything is fine", -11, Cause.CRASHED, {}),
    ("", 1, Cause.UNKNOWN, {}),
]


@pytest.mark.parametrize(("line", "exit_code", "cause", "suggested"), FAILURES)
def test_a_failure_is_recognised_below_its_wrapper(
    line: str, exit_code: int, cause: Cause, suggested: dict[str, object]
) -> None:
    log = (
        "(APIServer pid=9) INFO 11-23 18:24:00 [api_utils.py:286] non-default args: {'gpu_memory_utilization': 0.9}\n"
        "(APIServer pid=9) INFO 11-23 18:24:05 [model.py:623] Resolved architecture: Qwen2ForCausalLM\n"
        "(EngineCore pid=600) ERROR 11-23 18:24:33 [core.py:946] EngineCore failed to start.\n"
        f"(EngineCore pid=600) ERROR 11-23 18:24:33 [core.py:946] {line}\n"
        "(APIServer pid=9) RuntimeError: Engine core initialization failed. See root cause above. "
        "Failed core proc(s): {}\n"
    )
    found = adapter.diagnose(log, exit_code)
    assert (found.cause, dict(found.suggested_options)) == (cause, suggested)
    assert found.summary.endswith((".", ")")) or found.cause is Cause.WRONG_QUANTIZATION
    if cause is not Cause.UNKNOWN and exit_code >= 0:
        assert any(line[:60] in shown for shown in found.evidence)


@pytest.mark.parametrize(
    ("last", "cause", "suggested"),
    [
        ("Cuda failure 2 'out of memory'", Cause.OUT_OF_MEMORY, {"gpu_memory_utilization": 0.85}),
        ("Cuda failure 'out of memory'", Cause.OUT_OF_MEMORY, {"gpu_memory_utilization": 0.85}),
        ("Cuda failure 1 'invalid argument'", Cause.NCCL, {"disable_custom_all_reduce": True}),
        (
            "Error while creating shared memory segment /dev/shm/nccl-Ewjreo (size 33030528), error: No space left on "
            "device (28)",
            Cause.DISK_FULL,
            {},
        ),
        (
            "Error while creating shared memory segment /dev/shm/nccl-NzwJ7O (size 9637888)",
            Cause.NCCL,
            {"disable_custom_all_reduce": True},
        ),
    ],
)
def test_what_nccl_names_as_its_last_error_is_the_reason(last: str, cause: Cause, suggested: dict[str, object]) -> None:
    log = (
        "INFO non-default args: {'gpu_memory_utilization': 0.9}\n"
        "torch.distributed.DistBackendError: NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:77, "
        "unhandled cuda error (run with NCCL_DEBUG=INFO for details), NCCL version 2.27.3\n"
        "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n"
    )
    found = adapter.diagnose(log + last + "\n", 1)
    assert (found.cause, dict(found.suggested_options)) == (cause, suggested)


@pytest.mark.parametrize("begun", ["Loading model from scratch...", "Starting to load model /models/x..."])
def test_memory_that_ran_out_while_weights_were_read_is_no_matter_of_utilization(begun: str) -> None:
    """gpu_memory_utilization sizes the KV cache, which is made after the weights."""
    start = f"INFO non-default args: {{'gpu_memory_utilization': 0.92}}\nINFO {begun}\n"
    error = "ERROR torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.\n"
    loading = adapter.diagnose(start + error, 1)
    assert (loading.cause, dict(loading.suggested_options)) == (Cause.OUT_OF_MEMORY, {})
    assert "weights" in loading.summary
    assert "quantisation" in loading.suggestion
    loaded = start + "INFO Model loading took 18.49 GiB memory and 2.35 seconds\n"
    assert adapter.diagnose(loaded + error, 1).suggested_options == {"gpu_memory_utilization": 0.87}
    again = adapter.diagnose(loaded + start + error, 1)  # a second start in the same log
    assert dict(again.suggested_options) == {}


def test_a_cache_of_fixed_size_that_is_too_small_is_made_larger() -> None:
    log = (
        "INFO non-default args: {'kv_cache_memory_bytes': 1073741824, 'gpu_memory_utilization': 0.9}\n"
        "ValueError: To serve at least one request with the model's max seq len (262144), (36.0 GiB KV cache is "
        "needed, which is larger than the available KV cache memory (0.02 GiB). Try increasing ...\n"
    )
    found = adapter.diagnose(log, 1)
    assert found.cause is Cause.KV_CACHE_TOO_SMALL
    assert found.suggested_options == {"kv_cache_memory_bytes": 37 << 30}
    assert "262,144 tokens needs 36.0 GiB" in found.summary


def test_shared_memory_that_is_full_is_not_called_a_full_disk() -> None:
    nccl = (
        "Error while creating shared memory segment /dev/shm/nccl-Ewj (size 33030528), error: No space left on device"
    )
    torch = "RuntimeError: unable to allocate shared memory(shm) for file </torch_6>: No space left on device (28)"
    for line in (nccl, torch):
        found = adapter.diagnose(f"{line}\nOSError: [Errno 28] No space left on device\n", 1)
        assert found.cause is Cause.DISK_FULL
        assert "/dev/shm" in found.summary
        assert "--shm-size" in found.suggestion


START = "(EngineCore pid=20622) ERROR 11-30 19:34:46 [core.py:1510] "
WORKER_LOST = (
    f"{START}EngineCore failed to start.\n"
    f"{START}Exception: WorkerProc initialization failed due to an exception in a background process. See stack trace "
    "for root cause.\n"
    "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}\n"
)
CORE_LOST = (
    "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': -9}\n"
)
LOST_LATER = (
    "(EngineCore pid=6962) ERROR 11-30 19:29:49 [multiproc_executor.py:315] Worker proc VllmWorker-0 died unexpectedly "
    "(exit code: None), shutting down executor.\n"
)


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        (CORE_LOST, Cause.KILLED),
        (CORE_LOST.replace("'EngineCore': -9", ""), Cause.CRASHED),  # vLLM looked before the kernel had the code
        (WORKER_LOST, Cause.CRASHED),
        (LOST_LATER, Cause.CRASHED),
        # A worker that failed by itself says so, and then its own words count.
        ("ERROR WorkerProc failed to start.\nERROR Exception: something new\n" + WORKER_LOST, Cause.UNKNOWN),
        (
            "ERROR EngineCore failed to start.\nERROR Exception: new\n" + CORE_LOST.replace("'EngineCore': -9", ""),
            Cause.UNKNOWN,
        ),
    ],
)
def test_processes_that_sigkill_ended_under_a_real_vllm(log: str, cause: Cause) -> None:
    """Recorded from 0.32 under kill -9 (the second and the last two: what its sources can make of it)."""
    found = adapter.diagnose(log, 1)
    assert found.cause is cause
    if cause is not Cause.UNKNOWN:
        assert "Out of memory" in found.suggestion
        assert len(found.evidence) == 1
        assert found.evidence[0] in log


def test_a_process_that_the_kernel_ended_is_no_crash_and_does_not_hide_a_reason_above_it() -> None:
    killed = "Worker proc VllmWorker-1 died unexpectedly (exit code: -9), shutting down\n"
    found = adapter.diagnose(killed, 1)
    assert found.cause is Cause.KILLED
    assert "SIGKILL" in found.summary
    assert "kernel log" in found.suggestion
    assert adapter.diagnose("torch.OutOfMemoryError: CUDA out of memory.\n" + killed, 1).cause is Cause.OUT_OF_MEMORY


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("E1-toolong.log", Cause.KV_CACHE_TOO_SMALL),
        ("E2-noroom.log", Cause.KV_CACHE_TOO_SMALL),
        ("E3-busy.log", Cause.OUT_OF_MEMORY),
        ("E5-tp2.log", Cause.UNSUPPORTED_SPLIT),
    ],
)
def test_recorded_failures_of_a_real_gpu_are_recognised(name: str, cause: Cause) -> None:
    log = _recorded(f"vllm-gpu/{name}")
    assert adapter.diagnose(log, 1).cause is cause
    assert adapter.readiness(log, NOTHING).state is ReadinessState.FAILED


@pytest.mark.parametrize("name", ["A1-awq32-cold.log", "second-identical-boot.log", "startup-plan-applied.log"])
def test_a_recorded_start_goes_forward_through_its_phases(name: str) -> None:
    lines = _recorded(f"vllm-gpu/{name}").splitlines()
    seen = []
    for end in range(1, len(lines) + 1, 5):
        verdict = adapter.readiness("\n".join(lines[:end]), NOTHING)
        assert verdict.state is ReadinessState.WAITING
        seen.append(verdict)
        if "Application startup complete" in lines[end - 1]:
            break
    fractions = [v.fraction for v in seen]
    assert fractions == sorted(fractions)
    assert fractions[-1] > 0.9
    assert {"weights", "server"} <= {v.phase for v in seen}


def test_health_decides_that_it_is_ready() -> None:
    assert adapter.readiness("", HealthProbe(status=200)).state is ReadinessState.READY
    assert adapter.readiness("", HealthProbe(status=503)).state is ReadinessState.WAITING


def test_weights_progress_moves_the_fraction() -> None:
    line = "Loading safetensors checkpoint shards: {:3d}% Completed | 1/4 [00:00<00:02,  1.2it/s]\n"
    quarter = adapter.readiness(line.format(25), NOTHING)
    half = adapter.readiness(line.format(25) + line.format(50), NOTHING)
    assert quarter.phase == half.phase == "weights"
    assert quarter.count == "1 of 4 shards"
    graphs = "Capturing CUDA graphs (PIECEWISE):  27%|██▋       | 3/11 [00:00<00:01,  7.52it/s]"
    assert adapter.readiness(line.format(50) + graphs, NOTHING).count == "3 of 11 graphs"
    assert quarter.fraction < half.fraction


def test_metrics_of_a_busy_engine_are_normalised() -> None:
    found = adapter.parse_metrics(_recorded("vllm-gpu/metrics-A1-awq32-cold-c16.txt"))
    assert found.requests_running == 16
    assert found.requests_waiting == 0
    assert found.kv_cache_tokens == 11728
    assert found.kv_cache_usage_ratio == pytest.approx(0.43, abs=0.01)
    assert found.time_to_first_token_count is not None


def test_counters_of_a_recorded_scrape_are_found() -> None:
    found = adapter.parse_metrics(_recorded("vllm-metrics.txt"))
    assert (found.prompt_tokens_total, found.generation_tokens_total) == (12, 19)
    assert found.preemptions_total == 0


def test_data_parallel_engines_are_summed_and_their_cache_use_averaged() -> None:
    text = (
        'vllm:num_requests_running{engine="0"} 3\nvllm:num_requests_running{engine="1"} 4\n'
        'vllm:kv_cache_usage_perc{engine="0"} 0.2\nvllm:kv_cache_usage_perc{engine="1"} 0.6\n'
    )
    found = adapter.parse_metrics(text)
    assert found.requests_running == 7
    assert found.kv_cache_usage_ratio == pytest.approx(0.4)


def _recorded(name: str) -> str:
    path = FIXTURES / name
    if not path.exists():
        pytest.skip(f"needs the recording {name} beside the repository")
    return path.read_text(errors="replace")


def test_the_shipped_flags_are_those_of_the_recorded_help() -> None:
    recorded = parse_help(_recorded("vllm-serve-help.txt"))
    assert recorded == shipped_flags()
    assert flags_from_dict(flags_to_dict(recorded)) == recorded
    assert recorded["dtype"].choices == ("auto", "bfloat16", "float", "float16", "float32", "half")
    assert recorded["enable_prefix_caching"].negatable
    assert recorded["stream_interval"].kind is FlagKind.WHOLE
    assert recorded["compilation_config"].kind is FlagKind.JSON
    assert "help" not in recorded


def test_a_flag_that_is_not_written_out_here_gets_its_type_from_the_help() -> None:
    assert adapter.check({"stream_interval": "4", "scheduling_policy": "priority"}) == {
        "stream_interval": 4,
        "scheduling_policy": "priority",
    }
    with pytest.raises(InvalidOptions, match="fcfs"):
        adapter.check({"scheduling_policy": "fastest"})
    with pytest.raises(InvalidOptions, match="integer"):
        adapter.check({"stream_interval": "often"})
    odd = replace(
        seed("mixtral-8x22b-tp4"),
        options={"cudagraph_capture_sizes": [1, 2, 4], "compilation_config": {"cudagraph_mode": "PIECEWISE"}},
    )
    (launch,) = adapter.launch_specs(odd)
    at = launch.argv.index("--cudagraph-capture-sizes")
    assert launch.argv[at + 1 : at + 4] == ("1", "2", "4")
    assert '{"cudagraph_mode":"PIECEWISE"}' in launch.argv


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("uds", "/tmp/socket", "where an engine listens"),
        ("middleware", "os.system", "load code"),
        ("tool_parser_plugin", "/tmp/evil.py", "load code"),
        ("worker_cls", "evil.Worker", "load code"),
        ("config", "/etc/passwd", "opens a file"),
        ("hf_token", "hf_secret", "a secret"),
        ("data_parallel_rank", 1, "layout"),
        ("data_parallel_size", 2, "data_parallel puts them behind one"),
        ("enable_log_requests", True, "what people ask"),
        ("numa_bind", True, "NUMA"),
    ],
)
def test_what_the_panel_owns_is_refused_with_its_reason(name: str, value: object, words: str) -> None:
    with pytest.raises(InvalidOptions) as caught:
        adapter.check({name: value})
    assert words in caught.value.errors[0].message


@pytest.mark.parametrize(
    "options",
    [
        {"tokenizer": "a\nb"},
        {"tokenizer": "--trust-remote-code"},
        {"tokenizer": "x" * 1001},
        {"hf_overrides": {"x": "y" * 9000}},
        {"compilation_config": {"x": "y" * 9000}},
        {"compilation_config": "--help"},
        {"ignore_patterns": ["ok", "--enable-lora"]},
        {"ignore_patterns": []},
        {"max_model_len": "1e99"},
        {"seed": "; rm -rf /"},
        {"--max-model-len 8 --uds": 1},
    ],
)
def test_hostile_values_never_reach_a_command_line(options: dict[str, object]) -> None:
    with pytest.raises(InvalidOptions):
        adapter.check(options)


def test_an_install_is_asked_for_its_own_flags() -> None:
    flags = flags_to_dict({n: f for n, f in shipped_flags().items() if n != "performance_mode"})
    older = replace(INSTALLS[EngineKind.VLLM], version="0.26.0", flags=flags)
    wanted = replace(seed("mixtral-8x22b-tp4"), install=older, options={"performance_mode": "throughput"})
    with pytest.raises(InvalidOptions, match="The chosen vLLM has no --performance-mode"):
        adapter.launch_specs(wanted)
    newer = flags | {"brand_new_thing": {"kind": "whole"}}
    assert adapter.check_against(newer, {"brand_new_thing": 3}) == {"brand_new_thing": 3}
    with pytest.raises(InvalidOptions, match="Did you mean max_model_len"):
        adapter.check_against(newer, {"max_model_length": 3})
    with pytest.raises(InvalidOptions, match="no longer has --swap-space"):
        adapter.check_against(newer, {"swap_space": 4})


def asleep_profile(**changes: object) -> LaunchContext:
    options = {"gpu_memory_utilization": 0.9, "enable_sleep_mode": True}
    return replace(seed("mixtral-8x22b-tp4"), options=options, **changes)


def test_sleep_opens_the_developer_endpoints_on_loopback_alone() -> None:
    (launch,) = adapter.launch_specs(asleep_profile())
    assert launch.env["VLLM_SERVER_DEV_MODE"] == "1"
    assert "--enable-sleep-mode" in launch.argv
    plain = adapter.launch_specs(seed("mixtral-8x22b-tp4"))[0]
    assert "VLLM_SERVER_DEV_MODE" not in plain.env
    elsewhere = tuple(replace(slot, host="10.0.0.7") for slot in slots(4))
    with pytest.raises(InvalidOptions, match="loopback"):
        adapter.launch_specs(asleep_profile(replicas=elsewhere))


@pytest.mark.parametrize(("version", "words"), [("0.16.0", "does not give the memory back"), ("", "does not tell")])
def test_a_vllm_that_sleeps_badly_is_not_put_to_sleep(version: str, words: str) -> None:
    install = replace(INSTALLS[EngineKind.VLLM], version=version)
    with pytest.raises(InvalidOptions, match=words):
        adapter.launch_specs(asleep_profile(install=install))


def test_older_vllm_is_told_the_cache_size_of_a_quantised_sleeper() -> None:
    """0.26 sized it 3.6 to 4.4 GiB too big for a card of 24 GB."""
    awq = replace(MIXTRAL, quantization="awq int4 g128")
    older = replace(INSTALLS[EngineKind.VLLM], version="0.26.0")
    (launch,) = adapter.launch_specs(asleep_profile(model=awq, install=older))
    size = int(launch.argv[launch.argv.index("--kv-cache-memory-bytes") + 1])
    assert 0.5 < size / (1 << 30) < 2.5  # 21.2 budget - 17.7 weights - 2.4
    for install, model in ((INSTALLS[EngineKind.VLLM], awq), (older, MIXTRAL)):
        (launch,) = adapter.launch_specs(asleep_profile(model=model, install=install))
        assert "--kv-cache-memory-bytes" not in launch.argv


def test_the_cpu_build_pauses_without_the_flag_that_it_refuses() -> None:
    (launch,) = adapter.launch_specs(replace(seed("tiny-llama-cpu"), options={"enable_sleep_mode": True}))
    assert "--enable-sleep-mode" not in launch.argv
    assert launch.env["VLLM_SERVER_DEV_MODE"] == "1"


def test_the_answer_to_is_sleeping_is_understood() -> None:
    assert adapter.is_asleep('{"is_sleeping": true}') is True
    assert adapter.is_asleep('{"is_sleeping":false}') is False
    assert adapter.is_asleep('{"detail":"Not Found"}') is None
