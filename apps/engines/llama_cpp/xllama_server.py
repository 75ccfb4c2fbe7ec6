"""llama.cpp's own server from the ``xllamacpp`` wheel, behind llama-server's flags.

Run by the starter install's Python, in whose environment only xllamacpp is installed:
``python xllama_server.py --model FILE --alias NAME --host 127.0.0.1 --port N ...``. The key comes
from ``LLAMA_API_KEY``, as llama-server takes it. Ends with 0 on SIGTERM, and with 1 and
llama-server's own log lines where llama-server would.
"""

# ruff: noqa: T201 - standard output and error are this program's log

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from importlib import import_module, metadata
from typing import Any

FLASH_ATTENTION = {"on": "ENABLED", "off": "DISABLED", "auto": "AUTO"}


class LlamaParser(argparse.ArgumentParser):
    """Says what llama-server says, so that one table of failures fits both."""

    def error(self, message: str) -> Any:
        if message.startswith("unrecognized arguments: "):
            print(f"error: invalid argument: {message.partition(': ')[2]}", file=sys.stderr)
        else:
            print(f"error while handling argument: {message}", file=sys.stderr)
        sys.exit(1)


def make_parser() -> argparse.ArgumentParser:
    parser = LlamaParser(prog="xllama_server", allow_abbrev=False, description="llama.cpp's server from xllamacpp")
    add = parser.add_argument
    add("--version", action="store_true", help="show the version and exit")
    add("-m", "--model", help="the GGUF file")
    add("-a", "--alias", help="the model's name, or several with commas")
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=8080)
    add("-c", "--ctx-size", type=int, help="context of all slots together; 0: the model's own")
    add("-np", "--parallel", type=int, default=1)
    add("-ngl", "--gpu-layers", "--n-gpu-layers", dest="gpu_layers", help="a number, auto or all")
    add("-sm", "--split-mode", choices=("none", "layer", "row", "tensor"))
    add("-ts", "--tensor-split", help="proportions, e.g. 3,1")
    add("-mg", "--main-gpu", type=int)
    add("--fit", choices=("on", "off"), help="whether what was not given is adjusted to the devices' memory")
    add("-b", "--batch-size", type=int)
    add("-ub", "--ubatch-size", type=int)
    add("-t", "--threads", type=int)
    add("-tb", "--threads-batch", type=int)
    add("--threads-http", type=int)
    add("-fa", "--flash-attn", choices=tuple(FLASH_ATTENTION))
    add("-ctk", "--cache-type-k")
    add("-ctv", "--cache-type-v")
    add("--cache-ram", type=int, help="prompt cache in MiB")
    add("--chat-template", help="a name (with --no-jinja) or a Jinja template")
    add("--jinja", action=argparse.BooleanOptionalAction, default=True)
    add("--reasoning-format", choices=("none", "deepseek", "deepseek-legacy", "auto"))
    add("--embedding", "--embeddings", dest="embeddings", action="store_true")
    add("--pooling", choices=("none", "mean", "cls", "last", "rank"))
    add("--metrics", action="store_true")
    add("--props", action="store_true")
    add("--no-slots", action="store_true")
    add("--no-webui", "--no-ui", dest="no_ui", action="store_true")
    add("--no-warmup", action="store_true")
    add("--context-shift", action="store_true")
    add("--kv-unified", action="store_true")
    add("--swa-full", action="store_true")
    add("--no-kv-offload", action="store_true")
    add("--mmproj", help="the multimodal projector's file")
    add("--sleep-idle-seconds", type=int)
    add("--seed", type=int)
    add("--temp", type=float)
    add("--top-k", type=int)
    add("--top-p", type=float)
    add("--min-p", type=float)
    add("-lv", "--verbosity", type=int)
    return parser


def known_flags() -> frozenset[str]:
    """Every spelling that this module takes, for the adapter that writes its command lines."""
    return frozenset(make_parser()._option_string_actions)


def make_params(xllamacpp: Any, args: argparse.Namespace, api_keys: list[str]) -> Any:
    """Translate the flags into the fields of CommonParams; what was not given keeps its default."""
    params = xllamacpp.CommonParams()
    params.model.path = args.model
    if args.alias:
        params.model_alias = {name.strip() for name in args.alias.split(",") if name.strip()}
    params.hostnames = [args.host]
    params.port = args.port
    params.api_keys = api_keys
    params.n_parallel = args.parallel
    params.use_jinja = args.jinja
    params.endpoint_metrics = args.metrics
    params.endpoint_props = args.props
    params.endpoint_slots = not args.no_slots
    params.ui = not args.no_ui
    params.warmup = not args.no_warmup
    params.ctx_shift = args.context_shift
    params.embedding = args.embeddings
    params.kv_unified = args.kv_unified
    params.swa_full = args.swa_full
    params.no_kv_offload = args.no_kv_offload
    given = {
        "n_ctx": args.ctx_size,
        "main_gpu": args.main_gpu,
        "n_batch": args.batch_size,
        "n_ubatch": args.ubatch_size,
        "n_threads_http": args.threads_http,
        "cache_ram_mib": args.cache_ram,
        "chat_template": args.chat_template,
        "sleep_idle_seconds": args.sleep_idle_seconds,
        "verbosity": args.verbosity,
        "split_mode": _member(xllamacpp, "llama_split_mode", "LLAMA_SPLIT_MODE_", args.split_mode),
        "pooling_type": _member(xllamacpp, "llama_pooling_type", "LLAMA_POOLING_TYPE_", args.pooling),
        "cache_type_k": _member(xllamacpp, "ggml_type", "GGML_TYPE_", args.cache_type_k),
        "cache_type_v": _member(xllamacpp, "ggml_type", "GGML_TYPE_", args.cache_type_v),
        "flash_attn_type": _member(
            xllamacpp, "llama_flash_attn_type", "LLAMA_FLASH_ATTN_TYPE_", FLASH_ATTENTION.get(args.flash_attn)
        ),
        "reasoning_format": _member(
            xllamacpp, "common_reasoning_format", "COMMON_REASONING_FORMAT_", args.reasoning_format
        ),
        "fit_params": None if args.fit is None else args.fit == "on",
        "n_gpu_layers": None if args.gpu_layers is None else _gpu_layers(args.gpu_layers),
    }
    for name, value in given.items():
        if value is not None:
            setattr(params, name, value)
    if args.mmproj:
        params.mmproj.path = args.mmproj
    if args.tensor_split:
        shares = [float(part) for part in args.tensor_split.split(",")]
        params.tensor_split = shares + [0.0] * (len(params.tensor_split) - len(shares))
    if args.threads is not None:
        params.cpuparams.n_threads = args.threads
        params.cpuparams_batch.n_threads = args.threads
    if args.threads_batch is not None:
        params.cpuparams_batch.n_threads = args.threads_batch
    for name, value in {
        "seed": args.seed,
        "temp": args.temp,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "min_p": args.min_p,
    }.items():
        if value is not None:
            setattr(params.sampling, name, value)
    return params


def _member(xllamacpp: Any, enum: str, prefix: str, value: str | None) -> Any:
    """A name as llama-server spells it, as a member of llama.cpp's enumeration."""
    if value is None:
        return None
    try:
        return getattr(getattr(xllamacpp, enum), prefix + value.upper().replace("-", "_"))
    except AttributeError:
        print(f"error while handling argument: {value!r} is not a {enum}", file=sys.stderr)
        sys.exit(1)


def _gpu_layers(value: str) -> int:
    """llama.cpp's own numbers: -1 auto, -2 all (common/arg.cpp)."""
    return {"auto": -1, "all": -2}.get(value) or int(value)


def main(argv: list[str]) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.version:
        print(f"version: xllamacpp {metadata.version('xllamacpp')}")
        return 0
    if not args.model:
        parser.error("--model is missing")
    xllamacpp = import_module("xllamacpp")  # only the starter install's Python has it
    key = os.environ.pop("LLAMA_API_KEY", "")
    params = make_params(xllamacpp, args, [part for part in key.split(",") if part])
    # While the model loads, SIGTERM keeps its default and ends the process at once (-15), as it
    # does with llama-server; a Python handler would only run after the load.
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as error:
        print(
            f"E srv    llama_server: exiting due to model loading error ({error})",
            file=sys.stderr,
            flush=True,
        )
        return 1
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    stop.wait()
    print(f"I xllama_server: stopping, {server.listening_address} cuts its open streams", file=sys.stderr, flush=True)
    # Not by the server's destructor: it waits for open streams to end by themselves (measured: more
    # than 10 s), where llama-server cuts them. There is no state to save.
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
