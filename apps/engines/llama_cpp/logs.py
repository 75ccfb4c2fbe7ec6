"""What llama-server's log lines mean (read from builds b10434, b11434 and xllamacpp 2026.10)."""

from __future__ import annotations

import re

from apps.engines.diagnosis import DISK_FULL, Builder, Table, words
from apps.engines.protocol import Cause

# (pattern, phase, fraction of the whole start when the line appears), in the order of a start.
PHASES = (
    (re.compile(r"load_model: loading model|main: loading model"), "weights", 0.1),
    (re.compile(r"load_tensors:|offloaded \d+/\d+ layers"), "weights", 0.3),
    (re.compile(r"llama_context:|llama_kv_cache|threadpool init"), "cache", 0.8),
    (re.compile(r"warming up"), "warmup", 0.85),
    (re.compile(r"load_model: initializing|initializing slots"), "server", 0.9),
    (re.compile(r"model loaded|listening on|server is listening"), "server", 0.95),
)

FATAL = re.compile(r"exiting due to [^\n]*error|error: invalid argument|error while handling argument")


def _memory(what: str) -> Builder:
    return words(
        Cause.OUT_OF_MEMORY,
        f"There was not enough memory for {what}.",
        "Lower context_tokens or parallel, use a quantised cache (cache_type_k q8_0), "
        "or put fewer layers on the GPU (gpu_layers).",
    )


_cache = words(
    Cause.KV_CACHE_TOO_SMALL,
    "There was not enough memory for the KV cache of this context length.",
    "Lower context_tokens or parallel, or use a quantised cache (cache_type_k q8_0).",
)

_missing = words(
    Cause.MODEL_MISSING,
    "The model file {1} does not exist or cannot be read.",
    "Download the model again, or correct its path.",
)

_port = words(
    Cause.PORT_BUSY,
    "Port {1} is taken by another process.",
    "Start again: the panel chooses another port. Or end what listens there.",
)

_flag = words(
    Cause.BAD_FLAG,
    "This llama-server does not know {1}.",
    "Remove the option, or install a llama-server that has it.",
)

_unreadable = words(
    Cause.WRONG_QUANTIZATION,
    "This llama-server cannot read the model: {1}.",
    "The file may be damaged, or newer than this llama-server: check its sum, or update the engine.",
)

_split = words(
    Cause.UNSUPPORTED_SPLIT,
    "The model cannot be split this way: {1}.",
    "Split by layers instead (split_mode = layer), which every device can do.",
    split_mode="layer",
)

_instruction = words(
    Cause.CRASHED,
    "This llama-server was built for another processor (illegal instruction).",
    "Install a build for this machine's processor.",
)

TABLE: Table = (
    *DISK_FULL,
    (re.compile(r"error loading model: (device \S+ does not support split buffers|[^\n]*SPLIT_MODE_[^\n]*)"), _split),
    (re.compile(r"Illegal instruction|SIGILL"), _instruction),
    (re.compile(r"couldn't bind HTTP server socket.*?port: (\d+)"), _port),
    (
        re.compile(r"(?:failed to open GGUF file|failed to open) '([^']+)' \(No such file or directory\)"),
        _missing,
    ),
    (
        re.compile(r"(?:failed to open GGUF file|failed to open) '([^']+)' \((?:Permission denied|Is a directory)\)"),
        _missing,
    ),
    (re.compile(r"failed to allocate buffer for kv cache"), _cache),
    (
        re.compile(r"CUDA error: out of memory|cudaMalloc failed: out of memory"),
        _memory("the model on the GPU"),
    ),
    (
        re.compile(r"failed to allocate (?:\w+ )?buffer(?: of size \d+)?|std::bad_alloc|unable to allocate"),
        _memory("the model"),
    ),
    (re.compile(r"error: (?:invalid argument: ([^\n]+))"), _flag),
    (re.compile(r"error while handling argument \"([^\"]+)\""), _flag),
    (re.compile(r"error: unrecognized arguments: ([^\n]+)"), _flag),
    (
        re.compile(r"((?:unknown model architecture|invalid magic characters|tensor '[^']+' data is not)[^\n]*)"),
        _unreadable,
    ),
    (
        re.compile(r"(No module named 'xllamacpp')"),
        words(
            Cause.ENGINE_MISSING,
            "The starter engine's package is not installed in its environment.",
            "Install the starter engine again.",
        ),
    ),
    (re.compile(r"error loading model: ([^\n]+)"), _unreadable),
)
