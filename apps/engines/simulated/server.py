"""The simulated engine's process: ``python -m apps.engines.simulated.server --model ... --port ...``.

Loads for as long as it is told, in vLLM's phases and words, holds memory on the simulated cards,
then serves. The key comes from ``VLLM_API_KEY``. Ends with 0 on SIGTERM.
"""

# ruff: noqa: T201 - standard output and error are this program's log

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
import time

from apps.engines.protocol import ExpectedMemory
from apps.engines.simulated import texts
from apps.engines.simulated.api import Engine
from apps.engines.simulated.hardware import CardHold, HoldRefused
from apps.engines.simulated.http import serve
from apps.engines.simulated.memory import DEFAULT_UTILIZATION, CachePlan, plan_cache
from apps.engines.simulated.metrics import Settings

SHARDS = 8
SLEEPER_BYTES = 1_127 << 20
# How the load time is shared out; eager skips compile and graphs.
SHARE = {"weights": 0.55, "compile": 0.25, "graphs": 0.15, "server": 0.05}
# Without GPUs or figures about the model there is still a context to talk about.
FALLBACK_CONTEXT = 8192
FALLBACK_KV_BYTES_PER_TOKEN = 131072
NATURAL_PHASE = {
    "out_of_memory": "weights",
    "model_missing": "weights",
    "unsupported_split": "weights",
    "bad_flag": "weights",
    "wrong_quantization": "weights",
    "nccl": "weights",
    "kv_cache_too_small": "compile",
    "disk_full": "compile",
    "killed": "weights",
    "crashed": "graphs",
    "port_busy": "server",
}
NATURAL_CAUSE = {
    "weights": "out_of_memory",
    "compile": "crashed",
    "graphs": "out_of_memory",
    "server": "port_busy",
}


class StartFailedError(Exception):
    """The start ends here; the message is the last thing the log says of the cause."""

    def __init__(self, message: str, exit_code: int = 1, in_engine: bool = True) -> None:
        self.exit_code = exit_code
        self.in_engine = in_engine
        super().__init__(message)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vllm", allow_abbrev=False, description="a simulated serving engine")
    add = parser.add_argument
    add("--model", required=True)
    add("--served-model-name", required=True)
    add("--host", default="127.0.0.1")
    add("--port", type=int, required=True)
    add("--tensor-parallel-size", type=int, default=1)
    add("--pipeline-parallel-size", type=int, default=1)
    add("--weights-bytes", type=int, default=0)
    add("--kv-bytes-per-token", type=int)
    add("--model-max-tokens", type=int)
    add("--gpu-uuids", default="")
    add("--gpu-memory-bytes", default="")
    add("--hardware-socket")
    add("--load-seconds", type=float, default=3.0)
    add("--max-model-len")
    add("--gpu-memory-utilization", type=float, default=DEFAULT_UTILIZATION)
    add("--kv-cache-memory-bytes", type=int)
    add("--expected-memory", type=lambda text: ExpectedMemory(**json.loads(text)))
    add("--max-num-seqs", type=int, default=256)
    add("--enforce-eager", action="store_true")
    add("--tokens-per-second", type=float, default=40.0)
    add("--slow-first-token-seconds", type=float, default=0.0)
    add("--fail-phase", choices=tuple(SHARE))
    add("--fail-cause", choices=tuple(NATURAL_PHASE))
    add("--hang-phase", choices=tuple(SHARE))
    add("--enable-sleep-mode", action="store_true")
    add("--fail-sleep", action="store_true")
    add("--fail-wake", action="store_true")
    add("--ignore-sigterm", action="store_true")
    add("--error-500", action="store_true")
    add("--fail-requests", type=int, default=0)
    add("--crash-after-requests", type=int)
    return parser


class Start:
    """One load from the first line to ready, or to StartFailedError."""

    def __init__(self, args: argparse.Namespace, hold: CardHold) -> None:
        self.args = args
        self.hold = hold
        self.gpus = max(1, args.tensor_parallel_size * args.pipeline_parallel_size)
        self.gpu_memory = [int(n) for n in args.gpu_memory_bytes.split(",") if n]
        cause = args.fail_cause or (NATURAL_CAUSE[args.fail_phase] if args.fail_phase else None)
        self.fail_cause: str | None = cause
        self.fail_phase = args.fail_phase or (NATURAL_PHASE[cause] if cause else None)

    def core(self, place: str, message: str) -> None:
        process = "EngineCore" if self.gpus == 1 else "Worker_TP0"
        texts.say(process, place, message)

    async def load(self) -> tuple[CachePlan | None, int]:
        """Returns the cache plan (None without GPUs) and the longest context served."""
        args = self.args
        texts.say("APIServer", "api_utils.py:345", "  simulated engine, in the words of vLLM version 0.33.0")
        texts.say("APIServer", "model.py:623", "Resolved architecture: SimulatedForCausalLM")
        limit = args.model_max_tokens
        wanted = int(args.max_model_len) if args.max_model_len not in (None, "auto") else None
        if wanted is not None and limit and wanted > limit:
            raise StartFailedError(
                "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n  "
                + texts.too_long(wanted, limit),
                in_engine=False,
            )
        texts.say(
            "EngineCore",
            "core.py:116",
            f"Initializing a V1 LLM engine (v0.33.0) with config: model='{args.model}'",
        )
        plan = self._plan()
        if plan is not None:
            await self._check_free_memory(plan)
        await self._weights(plan)
        if not args.enforce_eager:
            await self._compile()
        context = self._size_cache(plan, wanted or limit, automatic=args.max_model_len == "auto")
        if plan is not None:
            await self._take(plan.parts.context_bytes + plan.weights_bytes + plan.overhead_bytes + plan.available_bytes)
        if not args.enforce_eager:
            await self._graphs(plan)
        if plan is not None:
            self._tell_memory(plan)
        await self._phase("server")
        self.core(
            "core.py:340",
            f"init engine (profile, create kv cache, warmup model) took {args.load_seconds:.2f} s",
        )
        return plan, context

    def _plan(self) -> CachePlan | None:
        if not self.gpu_memory:
            return None
        return plan_cache(
            total_bytes=min(self.gpu_memory),  # all ranks take the smallest
            utilization=self.args.gpu_memory_utilization,
            weights_bytes=self.args.weights_bytes,
            kv_bytes_per_token=self.args.kv_bytes_per_token or FALLBACK_KV_BYTES_PER_TOKEN,
            gpus=self.gpus,
            kv_cache_memory_bytes=self.args.kv_cache_memory_bytes,
            expected=self.args.expected_memory,
        )

    async def _check_free_memory(self, plan: CachePlan) -> None:
        used = await self.hold.used_bytes()
        for device, (total, taken) in enumerate(zip(self.gpu_memory, used, strict=False)):
            if taken is not None and total - taken < plan.requested_bytes:
                raise StartFailedError(
                    texts.memory_taken(
                        total - taken, total, self.args.gpu_memory_utilization, plan.requested_bytes, device
                    )
                )

    async def _take(self, count: int) -> None:
        try:
            await self.hold.declare(count)
        except HoldRefused as error:
            total = self.gpu_memory[0] if self.gpu_memory else 0
            raise StartFailedError(f"{error}\n{texts.out_of_memory(count - self.hold.memory_bytes, total)}") from error

    async def _weights(self, plan: CachePlan | None) -> None:
        self.core("gpu_model_runner.py:4120", "Starting to load model " + self.args.model + "...")
        share = plan.weights_bytes if plan is not None else 0
        context = plan.parts.context_bytes if plan is not None else 0
        await self._take(context)
        begun = time.monotonic()
        step = self._seconds("weights") / SHARDS
        for shard in range(SHARDS + 1):
            if shard == SHARDS // 2:
                await self._scripted("weights")
            if shard:
                await asyncio.sleep(step)
                await self._take(context + share * shard // SHARDS if plan is not None else 0)
            print(
                f"Loading safetensors checkpoint shards: {shard * 100 // SHARDS:3d}% Completed | "
                f"{shard}/{SHARDS} "
                f"[{time.monotonic() - begun:.2f}s]",
                flush=True,
            )
        seconds = time.monotonic() - begun
        self.core(
            "gpu_model_runner.py:4187",
            f"Model loading took {texts.gib(share)} GiB memory and {seconds:.6f} seconds",
        )

    async def _compile(self) -> None:
        seconds = self._seconds("compile")
        self.core("backends.py:1155", f"Dynamo bytecode transform time: {seconds * 0.3:.2f} s")
        await self._phase("compile")
        expected = self.args.expected_memory
        if expected is None or expected.compiles:
            self.core("backends.py:393", f"Compiling a graph for compile range (1, 2048) takes {seconds * 0.7:.2f} s")
        else:
            self.core("backends.py:278", f"Directly load the compiled graph(s) from the cache, took {seconds:.3f} s")
        self.core("monitor.py:53", f"torch.compile took {seconds:.2f} s in total")

    def _size_cache(self, plan: CachePlan | None, wanted: int | None, automatic: bool) -> int:
        if plan is None:
            return wanted or FALLBACK_CONTEXT
        self.core("gpu_worker.py:560", f"Available KV cache memory: {texts.gib(plan.available_bytes)} GiB")
        if plan.available_bytes <= 0:
            raise StartFailedError(texts.no_cache_memory())
        context = wanted or FALLBACK_CONTEXT
        if plan.longest_request_tokens < context:
            if not automatic:
                raise StartFailedError(texts.cache_too_small(context, plan))
            self.core(
                "kv_cache_utils.py:1985",
                f"Auto-fit max_model_len: reduced from {context} to {plan.longest_request_tokens} to fit "
                f"in available "
                f"GPU memory ({texts.gib(plan.available_bytes)} GiB available for KV cache)",
            )
            context = max(1, plan.longest_request_tokens)
        self.core(
            "kv_cache_utils.py:2177",
            f"GPU KV cache size: {plan.tokens:,} tokens, Maximum concurrency for {context:,} tokens per "
            f"request: "
            f"{plan.tokens / context:.2f}x",
        )
        return context

    async def _graphs(self, plan: CachePlan | None) -> None:
        steps = 4
        for step in range(steps + 1):
            percent = step * 100 // steps
            print(f"Capturing CUDA graphs (PIECEWISE): {percent:3d}%|          | {step}/{steps}", flush=True)
            if step < steps:
                await asyncio.sleep(self._seconds("graphs") / steps)
            if step == steps // 2:
                await self._scripted("graphs")
        seconds = self._seconds("graphs")
        took = plan.parts.cuda_graph_bytes if plan is not None else 0
        self.core(
            "gpu_model_runner.py:5210",
            f"Graph capturing finished in {seconds:.0f} secs, took {texts.gib(took)} GiB",
        )

    def _tell_memory(self, plan: CachePlan) -> None:
        """The line in which vLLM 0.33 lists every term of its budget."""
        parts, total = plan.parts, min(self.gpu_memory)
        graphs = 0 if self.args.enforce_eager else parts.cuda_graph_bytes
        self.core(
            "gpu_worker.py:857",
            f"Free memory on device ({texts.gib(total - parts.context_bytes)}/{texts.gib(total)} GiB) on startup. "
            f"Desired GPU memory utilization is ({self.args.gpu_memory_utilization}, "
            f"{texts.gib(plan.requested_bytes)} GiB). "
            f"Actual usage is {texts.gib(parts.weights_bytes + parts.non_torch_bytes)} GiB for consumed memory "
            f"(weights + non-torch), {texts.gib(parts.activation_bytes)} GiB for peak activation, and "
            f"{texts.gib(graphs)} GiB for CUDAGraph memory. Current kv cache memory in use "
            f"is {texts.gib(plan.available_bytes)} GiB.",
        )

    async def _phase(self, phase: str) -> None:
        await asyncio.sleep(self._seconds(phase) / 2)
        await self._scripted(phase)
        await asyncio.sleep(self._seconds(phase) / 2)

    def _seconds(self, phase: str) -> float:
        return float(self.args.load_seconds) * SHARE[phase]

    async def _scripted(self, phase: str) -> None:
        """Half-way through a phase: hang or fail if that was asked for."""
        if self.args.hang_phase == phase:
            await asyncio.Event().wait()
        if self.fail_phase != phase or self.fail_cause is None:
            return
        cause = self.fail_cause
        total = min(self.gpu_memory, default=24 << 30)
        if cause == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if cause == "out_of_memory":
            raise StartFailedError(texts.out_of_memory(2 << 30, total))
        if cause == "kv_cache_too_small":
            small = plan_cache(
                total_bytes=total,
                utilization=0.5,
                weights_bytes=total // 3,
                kv_bytes_per_token=262144,
                gpus=1,
            )
            raise StartFailedError(texts.cache_too_small(32768, small))
        message = texts.SCRIPTED[cause].format(model=self.args.model, tp=self.gpus)
        raise StartFailedError(message, exit_code=2 if cause == "bad_flag" else 1, in_engine=cause != "bad_flag")


async def run(args: argparse.Namespace) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        if args.ignore_sigterm:
            signal.signal(number, signal.SIG_IGN)
        else:
            loop.add_signal_handler(number, stop.set)
    hold = CardHold(args.hardware_socket, args.served_model_name, [u for u in args.gpu_uuids.split(",") if u])
    settings = Settings(
        served_name=args.served_model_name,
        model=args.model,
        api_key=os.environ.pop("VLLM_API_KEY", ""),
        max_model_len=FALLBACK_CONTEXT,
        max_num_seqs=args.max_num_seqs,
        tokens_per_second=args.tokens_per_second,
        slow_first_token_seconds=args.slow_first_token_seconds,
        error_500=args.error_500,
        fail_requests=args.fail_requests,
        crash_after_requests=args.crash_after_requests,
        sleep_mode=args.enable_sleep_mode,
        fail_sleep=args.fail_sleep,
        fail_wake=args.fail_wake,
        gpu_memory_utilization=args.gpu_memory_utilization,
    )
    # One request already keeps a card busy, since decoding is bound by memory bandwidth.
    engine = Engine(settings, lambda n: hold.set_utilization(min(1.0, 0.75 + n / 32) if n else 0.0), crash)
    awake_bytes = 0

    async def on_sleep(asleep: bool) -> str:
        """A sleeper keeps its context and graphs on each card: 1.0-1.1 GiB were measured. Returns what went wrong."""
        nonlocal awake_bytes
        wanted = SLEEPER_BYTES if asleep else awake_bytes
        if (asleep and hold.memory_bytes <= SLEEPER_BYTES) or not wanted:
            return ""
        before, held = hold.memory_bytes, awake_bytes
        try:
            awake_bytes = before if asleep else 0
            await hold.declare(wanted)
        except HoldRefused as error:
            hold.memory_bytes, awake_bytes = before, held
            return str(error)
        return ""

    engine.on_sleep = on_sleep
    try:
        server = await serve(engine.handle, args.host, args.port)
    except OSError as error:
        print(
            f"(APIServer pid={os.getpid()}) OSError: [Errno {error.errno}] {os.strerror(error.errno or 0)}",
            flush=True,
        )
        return 1
    keeper = asyncio.create_task(hold.keep())
    loading = asyncio.create_task(Start(args, hold).load())
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({loading, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not loading.done():
            return 0
        plan, settings.max_model_len = loading.result()
        settings.kv_cache_tokens = plan.tokens if plan is not None else settings.max_model_len * 8
        texts.say("APIServer", "api_server.py:677", f"Starting vLLM server on http://{args.host}:{args.port}")
        print(f"(APIServer pid={os.getpid()}) INFO:     Application startup complete.", flush=True)
        engine.ready = True  # after the line, as vLLM's health answers
        await stopping
        print(f"(APIServer pid={os.getpid()}) INFO:     Application shutdown complete.", flush=True)
        return 0
    except StartFailedError as error:
        texts.say("EngineCore", "core.py:946", "EngineCore failed to start.", "ERROR")
        print(f"({'EngineCore' if error.in_engine else 'APIServer'} pid={os.getpid()}) {error}", flush=True)
        if error.in_engine:
            print(f"(APIServer pid={os.getpid()}) {texts.ENGINE_FAILED}", flush=True)
        return error.exit_code
    finally:
        server.close()
        for task in (loading, keeper, stopping):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, StartFailedError):
                await task


def crash() -> None:
    """As when vLLM's engine process dies: the server follows, in the middle of its answers."""
    print(texts.SCRIPTED["crashed"], flush=True)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(asyncio.run(run(make_parser().parse_args())))
