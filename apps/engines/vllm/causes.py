"""Why a start of vLLM failed, or a served one ended: log lines, the sentence for them, and one change that would help.

Lines of 0.26 were recorded on a GPU, those of 0.32 on the CPU; the others stand in vLLM's, PyTorch's, NCCL's,
Transformers' and the hub library's own sources. More particular patterns come first: a root cause is logged above its
wrappers.
"""

from __future__ import annotations

import re
from dataclasses import replace

from apps.engines.diagnosis import DISK_FULL, Table, killed, words
from apps.engines.protocol import Cause, Diagnosis
from apps.engines.vllm.memory_causes import MEMORY

_port = words(
    Cause.PORT_BUSY,
    "The port is taken by another process.",
    "Switch to it again: the panel chooses another port. Or end what listens there.",
)

_missing = words(
    Cause.MODEL_MISSING,
    "The model's files were not found, neither as a folder nor in the hub's cache.",
    "Download the model first, or correct its path.",
)

_gated = words(
    Cause.MODEL_MISSING,
    "The model is gated: its hub gives it only to accounts that accepted its licence.",
    "Accept the licence on the model's page and give the panel a hub token.",
)

_unauthorised = words(
    Cause.MODEL_MISSING,
    "The hub refused access (401): the model is private or gated, or does not exist under this name.",
    "Correct the repository's name, or give the panel a hub token that may read it.",
)

_incomplete = words(
    Cause.MODEL_MISSING,
    "Files of the model's weights are missing or damaged: its folder is not complete.",
    "Download the model again: what is there and whole is kept.",
)

_chat_template = words(
    Cause.BAD_FLAG,
    "The chat template of the profile is neither a file nor a template.",
    "Leave chat_template out: the model brings its own.",
    chat_template=None,
)


def _parser(match: re.Match[str]) -> Diagnosis:
    option = "reasoning_parser" if "easoning" in match[0] else "tool_call_parser"
    return Diagnosis(
        Cause.BAD_FLAG,
        f"This vLLM has no such {option.replace('_', ' ')}.",
        suggestion=f"Set {option} to none: chat works without it, {'reasoning' if option[0] == 'r' else 'tool calls'} "
        "then come as plain text.",
        suggested_options={option: "none"},
    )


_remote_code = words(
    Cause.BAD_FLAG,
    "The model brings Python code of its own, which is only run when asked for.",
    "Read that code first; then set trust_remote_code.",
    trust_remote_code=True,
)


def _architecture(match: re.Match[str]) -> Diagnosis:
    return Diagnosis(
        Cause.WRONG_QUANTIZATION if "gguf" in match[0].lower() else Cause.UNKNOWN_ARCHITECTURE,
        f"This vLLM does not know the model's architecture: {match[0].strip(' .')[:200]}.",
        suggestion="Install a newer vLLM, or choose an engine that knows the model.",
    )


_bfloat = words(Cause.BAD_FLAG, "This card cannot compute in bfloat16.", "Set dtype to half.", dtype="half")

_fp8_cache = words(
    Cause.BAD_FLAG,
    "This card has no 8 bit floats for the KV cache (they begin with Ada and Hopper).",
    "Set kv_cache_dtype to auto.",
    kv_cache_dtype="auto",
)


def _batch(match: re.Match[str]) -> Diagnosis:
    return Diagnosis(
        Cause.BAD_FLAG,
        f"max_num_batched_tokens {match[1]} is less than max_model_len {match[2]}, and prompts are not cut up.",
        suggestion=f"Set max_num_batched_tokens to {match[2]}.",
        suggested_options={"max_num_batched_tokens": int(match[2])},
    )


_driver = words(
    Cause.DRIVER,
    "The NVIDIA driver and this vLLM do not fit together: {0}.",
    "Update the driver (nvidia-smi shows it and its CUDA), or install a vLLM built for that.",
)

_no_gpu = words(
    Cause.DRIVER,
    "vLLM sees no GPU: the driver is not loaded, or the cards that were reserved for it are gone.",
    "Look at the rig page and at nvidia-smi; a card that fell off the bus needs the machine restarted.",
)

_python = words(
    Cause.ENGINE_MISSING,
    "vLLM's environment does not fit together: {0}.",
    "Install the engine again into an environment of its own.",
)


def _heads(match: re.Match[str]) -> Diagnosis:
    heads, wanted = int(match[1]), int(match[2])
    possible = next((n for n in range(wanted, 0, -1) if heads % n == 0), 1)
    return Diagnosis(
        Cause.UNSUPPORTED_SPLIT,
        f"The model's {heads} attention heads cannot be shared by {wanted} GPUs.",
        suggestion=f"Set the tensor parallel size to {possible}, which divides {heads}.",
        suggested_options={"tensor_parallel_size": possible},
    )


def _world(match: re.Match[str]) -> Diagnosis:
    seen = int(match[2])
    return Diagnosis(
        Cause.UNSUPPORTED_SPLIT,
        f"The layout wants {match[1]} GPUs; vLLM sees {match[2]}.",
        suggestion=f"Set the tensor parallel size to {max(seen, 1)}, or check that all GPUs are visible (nvidia-smi).",
        suggested_options={"tensor_parallel_size": seen} if seen else {},
    )


_indivisible = words(
    Cause.UNSUPPORTED_SPLIT,
    "This model's quantised layers cannot be split that way: {0}.",
    "Choose a smaller tensor parallel size.",
)


def _flag(match: re.Match[str]) -> Diagnosis:
    said = match[1].strip()[:300]
    name = re.search(r"--([a-z][\w-]*)", said)
    option = name[1].replace("-", "_") if name else ""
    return Diagnosis(
        Cause.BAD_FLAG,
        f"This vLLM does not accept {said}." if not said.endswith(".") else f"This vLLM does not accept {said}",
        suggestion=f"Take {option} out of the options, or use a vLLM that has it."
        if option
        else "Take the option out, or use a vLLM that has it.",
        suggested_options={option: None} if option else {},
    )


def _too_long(match: re.Match[str]) -> Diagnosis:
    limit = int(float(match[2]))
    return Diagnosis(
        Cause.BAD_FLAG,
        f"max_model_len {int(match[1]):,} is more than the {limit:,} tokens that the model was made for.",
        suggestion=f"Set max_model_len to {limit} or less.",
        suggested_options={"max_model_len": limit},
    )


_quantization = words(
    Cause.WRONG_QUANTIZATION,
    "The weights' quantisation does not fit: {0}.",
    "Leave the quantization option out: vLLM reads the right one from the model. "
    "GGUF and bitsandbytes need plug-ins; use llama.cpp for GGUF.",
    quantization=None,
)

_nccl = words(
    Cause.NCCL,
    "The GPUs could not talk to each other (NCCL).",
    "Set disable_custom_all_reduce, which leaves the exchange to NCCL alone; run the verify suite's "
    "NVLink and peer-to-peer checks, and look for Xid lines in the kernel log.",
    disable_custom_all_reduce=True,
)

# NCCL is not to blame here, so it takes the exchange over.
_custom_all_reduce = words(
    Cause.NCCL,
    "vLLM's own all-reduce cannot use these cards' memory for each other: {1}.",
    "Set disable_custom_all_reduce, which leaves the exchange to NCCL alone.",
    disable_custom_all_reduce=True,
)

_watchdog = words(
    Cause.NCCL,
    "A GPU waited for the others (NCCL) until its time was up: one of them stands still.",
    "Look for Xid lines in the kernel log, run the verify suite's NVLink and peer-to-peer checks, then start again.",
)


def _process_killed(match: re.Match[str]) -> Diagnosis:
    return killed("One of vLLM's own processes")


_engine_died = words(
    Cause.CRASHED,
    "One of vLLM's own processes died, and the server gave up.",
    "Look for 'Out of memory' in the kernel log: the kernel ends a process so, without a word here. Else look there "
    "for Xid lines, and in this log at the lines before it.",
)


def _died_at_start(match: re.Match[str]) -> Diagnosis:
    return replace(_engine_died(match), evidence=(match[1].strip(),))


_not_installed = words(
    Cause.ENGINE_MISSING,
    "vLLM's environment is not complete: {0}.",
    "Install the engine again.",
)

TABLE: Table = (
    *DISK_FULL,
    (re.compile(r"error: unrecognized arguments: ([^\n]+)"), _flag),
    (re.compile(r"vllm: error: argument ([^\n]+)"), _flag),
    (
        re.compile(r"Total number of attention heads \((\d+)\) must be divisible by tensor parallel size \((\d+)\)"),
        _heads,
    ),
    (re.compile(r"World size \((\d+)\) is larger than the number of available GPUs \((\d+)\)"), _world),
    (
        re.compile(
            r"User-specified max_model_len \((\d+)\) is greater than the derived max_model_len "
            r"\([^=\n]*=([\d.]+)"
        ),
        _too_long,
    ),
    *MEMORY,
    (
        re.compile(r"max_num_batched_tokens \((\d+)\) is smaller than max_model_len \((\d+)\)"),
        _batch,
    ),
    (
        re.compile(
            r"The NVIDIA driver on your system is too old[^\n]*|CUDA driver version is insufficient[^\n]*|"
            r"no kernel image is available for execution[^\n]*|system has unsupported display driver[^\n]*|"
            r"forward compatibility was attempted[^\n]*|Driver/library version mismatch[^\n]*"
        ),
        _driver,
    ),
    (
        re.compile(
            r"No CUDA GPUs are available|libcuda\.so\.1: cannot open|Found no NVIDIA driver|"
            r"CUDA error: no CUDA-capable device|CUDA error: invalid device ordinal|Failed to infer device type"
        ),
        _no_gpu,
    ),
    (
        re.compile(
            r"undefined symbol: [^\n]*|GLIBC(?:XX)?_[\d.]+' not found[^\n]*|operator torchvision::nms does not exist|"
            r"Python version [^\n]* not supported[^\n]*|ImportError: lib(?:cudart|cublas|nccl|torch)[^\n]*"
        ),
        _python,
    ),
    (re.compile(r"Bfloat16 is only supported on GPUs"), _bfloat),
    (
        re.compile(r"FP8 KV cache is not supported|fp8[^\n]* requires SM89|type fp8e4nv not supported", re.IGNORECASE),
        _fp8_cache,
    ),
    (
        re.compile(r"supplied chat template (?:path doesn't exist|string \()|The supplied chat template \("),
        _chat_template,
    ),
    (
        re.compile(
            r"invalid tool call parser[^\n]*|invalid reasoning parser[^\n]*|"
            r"(?:Tool|Reasoning) parser '[^\n]*' not found[^\n]*",
            re.IGNORECASE,
        ),
        _parser,
    ),
    (
        re.compile(r"contains custom code which must be executed|Please pass the argument `trust_remote_code=True`"),
        _remote_code,
    ),
    (
        re.compile(
            r"Model architectures [^\n]* (?:are not supported for now|failed to be inspected)[^\n]*|"
            r"does not recognize this architecture"
        ),
        _architecture,
    ),
    (
        # PyTorch's, for the port that the ranks meet at: the error that is raised, not its warnings before it.
        re.compile(
            r"\[Errno 98\] Address already in use|error while attempting to bind on address|"
            r"Error: The server socket has failed to listen on any local network address[^\n]*"
            r"(?:EADDRINUSE|Address already in use)"
        ),
        _port,
    ),
    (re.compile(r"GatedRepoError|Cannot access gated repo|Access to model \S+ is restricted"), _gated),
    (re.compile(r"401 Client Error|Invalid username or password|Invalid user token"), _unauthorised),
    (
        re.compile(
            r"SafetensorError|Error while deserializing header|No such file or directory: '?[^\n']*\.safetensors|"
            r"weights were not initialized from checkpoint|safetensors[^\n]*FileNotFoundError|"
            r"Cannot find any model weights|No model weights found"
        ),
        _incomplete,
    ),
    (
        re.compile(
            r"Repo id must be in the form|RepositoryNotFoundError|LocalEntryNotFoundError|"
            r"OfflineModeIsEnabled|"
            r"does not appear to have a file named config\.json|Invalid repository ID or local directory"
        ),
        _missing,
    ),
    (
        re.compile(
            r"Unknown quantization method[^\n]*|Quantization method specified in the model config[^\n]*|"
            r"The quantization method \S+ is not supported for the current GPU[^\n]*|"
            r"Cannot find the config file for \w+|\S{1,60} quantization is currently not supported in [^\n]*"
        ),
        _quantization,
    ),
    (
        re.compile(
            r"(?m:^[^\n]*is not divisible by) (?:weight )?(?:tensor parallel size|min_thread_[nk]|the group "
            r"size)[^\n]*|The (?:in|out)put size is not aligned with the quantized weight shape[^\n]*"
        ),
        _indivisible,
    ),
    (
        # Other errors that it reports, as of an illegal access, come from kernels before it.
        re.compile(
            r"Failed: (?:Cuda error )?\S*custom_all_reduce\.cuh:\d+ "
            r"'(peer access is not supported between these two devices|invalid argument)'"
        ),
        _custom_all_reduce,
    ),
    # Above NCCL: a peer that was killed breaks the exchange of the others.
    (
        re.compile(
            r"Worker proc \S+ died unexpectedly \(exit code: -9\)|Process \S+ \(PID: \d+\) died with exit code -9\b|"
            r"[Ff]ailed (?:core|frontend) proc\(s\): \{[^}\n]*: -9\b"
        ),
        _process_killed,
    ),
    (
        re.compile(r"NCCL error[^\n]*|ncclSystemError|ncclInternalError|ncclUnhandledCudaError|ncclRemoteError"),
        _nccl,
    ),
    (re.compile(r"Watchdog caught collective operation timeout: WorkNCCL"), _watchdog),
    (
        re.compile(r"No module named '(?:vllm|torch)[^']*'|No package metadata was found for vllm"),
        _not_installed,
    ),
    # A process that fails by itself says so: where none did, it was ended. (An exit code is not always there in time.)
    *(
        (re.compile(rf"\A(?![\s\S]*(?:{said}|spawn_main))(?:[\s\S]*\n)?([^\n]*{line}[^\n]*)"), _died_at_start)
        for said, line in (
            (
                r"WorkerProc failed to start|Process (?:VllmWorker|SpawnProcess)\S*:",
                "WorkerProc initialization failed due to an exception in a background process",
            ),
            (r"EngineCore failed to start|Process EngineCore\w*:", r"Failed core proc\(s\): \{\}"),
        )
    ),
    (
        re.compile(r"EngineDeadError|EngineCore encountered a fatal error|Worker proc \S+ died unexpectedly"),
        _engine_died,
    ),
)
