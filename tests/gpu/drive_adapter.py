"""The panel's own vLLM adapter, process runner and NVML driver on a real NVIDIA card: ``drive_adapter.py PART OUT``.

Needs nothing of Django: pydantic, psutil and nvidia-ml-py, and a vLLM started by RIGPANEL_VLLM (default ``vllm``).
Models without weights are enough (``--load-format dummy``); their folders lie under RIGPANEL_GPU_MODELS. The budget
per engine is that of a 24 GB card. Parts: ``boots`` (estimate against two boots, cold and from the compile cache),
``sleep`` (two sleepers, wake, switch), ``die`` (kill -9 of the engine process, SIGTERM in the middle of a start,
failures). Writes one JSON line per fact to OUT/facts.jsonl and each engine's log beside it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import signal
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from apps.engines.protocol import (  # noqa: E402
    EngineKind,
    HealthProbe,
    Install,
    LaunchContext,
    ModelSpec,
    ReadinessState,
    ReplicaSlot,
)
from apps.engines.vllm.adapter import VllmAdapter  # noqa: E402
from apps.engines.vllm.boot import boot_facts  # noqa: E402
from apps.hardware.nvml import NvmlDriver  # noqa: E402
from apps.profiles import fit  # noqa: E402
from apps.runners.process import ProcessRunner  # noqa: E402
from apps.runners.protocol import LaunchSpec, ProcessState  # noqa: E402

GIB = 1 << 30
BUDGET_GIB = 23.07  # what 0.98 of a 3090's 23.55 GiB leaves
MODELS = Path(os.environ.get("RIGPANEL_GPU_MODELS", "/opt/models"))
VLLM = os.environ.get("RIGPANEL_VLLM", "vllm")
VERSION = os.environ.get("RIGPANEL_GPU_VLLM_VERSION", "0.26.0")
CODER, SEVEN, SMALL = "coder-32b-awq", "qwen-7b-bf16", "qwen-0.5b-bf16"
CATALOGUE = {CODER: "qwen2-5-coder-32b-instruct-awq"}
QUANTIZED = {CODER: "awq int4 g128"}
WEIGHTS = {CODER: 19_328_804_864, SEVEN: 15_231_233_024, SMALL: 988_065_536}
adapter = VllmAdapter()


KEY = f"re-{secrets.token_urlsafe(12)}"  # one for all launches, as the panel gives a vLLM that compiles anew per key


class Bench:
    """The card, the runner and where facts go."""

    def __init__(self, out: Path) -> None:
        self.out = out
        out.mkdir(parents=True, exist_ok=True)
        self.file = (out / "facts.jsonl").open("a", buffering=1)
        self.driver = NvmlDriver()
        inventory = self.driver.inventory()
        self.gpu = inventory.gpus[0]
        self.total = int(self.gpu.memory_total_bytes or 0)
        self.runner = ProcessRunner(Path("/tmp/rigpanel-launches"))
        self.ports = iter(range(28100, 28190))
        self.began = time.monotonic()
        self.fact("inventory", gpu=self.gpu.name, total_gib=round(self.total / GIB, 2), uuid=self.gpu.uuid)

    def fact(self, kind: str, **values: Any) -> None:
        line = json.dumps({"t": round(time.monotonic() - self.began, 1), "kind": kind, **values}, default=str)
        self.file.write(line + "\n")
        print(line[:1500], flush=True)

    def used(self) -> int:
        return int(self.driver.read().gpus[0].memory_used_bytes or 0)

    def options(self, **more: Any) -> dict[str, Any]:
        return {
            "load_format": "dummy",
            "gpu_memory_utilization": round(BUDGET_GIB * GIB / self.total, 4),
            "max_model_len": 8192,
            "max_num_seqs": 32,
            "max_num_batched_tokens": 2048,
            **more,
        }


class Engine:
    def __init__(self, bench: Bench, name: str, model: str, options: Mapping[str, Any]) -> None:
        self.bench, self.name, self.model, self.port = bench, name, model, next(bench.ports)
        slot = ReplicaSlot(
            launch_id=f"{name}-{secrets.token_hex(3)}",
            host="127.0.0.1",
            port=self.port,
            api_key=KEY,
            gpu_indices=(0,),
            gpu_uuids=(bench.gpu.uuid,),
            gpu_memory_total_bytes=(bench.total,),
        )
        spec = ModelSpec(
            served_name=model,
            source=str(MODELS / model),
            weights_bytes=WEIGHTS[model],
            quantization=QUANTIZED.get(model),
        )
        context = LaunchContext(
            model=spec,
            options=adapter.check(options),
            replicas=(slot,),
            install=Install(EngineKind.VLLM, VERSION, (VLLM, "serve")),
            cache_dir="/tmp/vcache",
        )
        (launch,) = adapter.launch_specs(context)
        self.key, self.begun = slot.api_key, time.monotonic()
        self.handle = bench.runner.launch(
            LaunchSpec(
                launch.launch_id, launch.argv, launch.env, launch.secret_env, "/tmp", stop_signals=launch.stop_signals
            )
        )
        bench.fact("launch", name=name, argv=launch.argv)

    @property
    def log(self) -> str:
        return self.bench.runner.logs(self.handle, 0, 4_000_000).text

    def ask(self, method: str, path: str, body: Any = None, seconds: float = 120.0) -> tuple[int | None, str]:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", method=method)
        request.add_header("Authorization", f"Bearer {self.key}")
        request.add_header("Content-Type", "application/json")
        request.data = None if body is None else json.dumps(body).encode()
        try:
            with urllib.request.urlopen(request, timeout=seconds) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError as error:
            return None, str(error)

    def wait_ready(self, limit: float = 300.0) -> float | None:
        """Seconds from launch to /health; each phase is a fact when it is first seen."""
        phase = ""
        while time.monotonic() - self.begun < limit:
            seen = self.bench.runner.observe(self.handle)
            verdict = adapter.readiness(self.log, HealthProbe(self.ask("GET", "/health", seconds=2)[0]))
            if verdict.phase != phase:
                phase = verdict.phase
                self.bench.fact(
                    "phase",
                    name=self.name,
                    phase=phase,
                    fraction=verdict.fraction,
                    s=round(time.monotonic() - self.begun, 1),
                    detail=verdict.detail,
                )
            if verdict.state is ReadinessState.READY:
                took = round(time.monotonic() - self.begun, 1)
                self.bench.fact("ready", name=self.name, s=took, used_mib=self.bench.used() >> 20)
                return took
            if seen.state is not ProcessState.RUNNING or verdict.state is ReadinessState.FAILED:
                time.sleep(3)
                self.told("failed")
                return None
            time.sleep(0.2)
        self.told("timeout")
        return None

    def told(self, kind: str) -> None:
        seen = self.bench.runner.observe(self.handle)
        found = adapter.diagnose(self.log, seen.exit_code)
        self.bench.fact(kind, name=self.name, exit_code=seen.exit_code, **dataclasses.asdict(found))

    def first_token(self) -> float:
        begun = time.monotonic()
        body = {"model": self.model, "prompt": "def main():", "max_tokens": 1, "temperature": 0}
        status, text = self.ask("POST", "/v1/completions", body)
        assert status == 200, text
        return time.monotonic() - begun

    def sleep(self) -> float:
        begun = time.monotonic()
        status, text = self.ask("POST", adapter.sleep_path)
        assert status == 200, text
        return time.monotonic() - begun

    def wake(self) -> float:
        begun = time.monotonic()
        status, text = self.ask("POST", adapter.wake_path)
        assert status == 200, text
        return time.monotonic() - begun

    def asleep(self) -> bool | None:
        return adapter.is_asleep(self.ask("GET", adapter.asleep_path)[1])

    def stop(self) -> None:
        begun = time.monotonic()
        seen = self.bench.runner.stop(self.handle)
        took = time.monotonic() - begun
        self.bench.fact(
            "stopped", name=self.name, exit_code=seen.exit_code, s=round(took, 2), used_mib=self.bench.used() >> 20
        )
        self.keep_log()

    def keep_log(self) -> None:
        (self.bench.out / f"{self.name}.log").write_text(self.log)


def estimate(bench: Bench, model: str, options: Mapping[str, Any]) -> None:
    """What the planner says before, for the same card and options."""
    catalogue = json.loads((REPOSITORY / "apps/catalog/data/models.json").read_text())
    models = catalogue if isinstance(catalogue, list) else catalogue["models"]
    facts = next(m for m in models if m["slug"] == CATALOGUE[model])
    known = {f.name for f in dataclasses.fields(fit.EngineOptions)}
    wanted = fit.EngineOptions(**{k: v for k, v in options.items() if k in known})
    rig = fit.RigMemory(cards=(fit.CardMemory(bench.total, bench.used()),), compute_capability=(9, 0))
    found = fit.estimate(fit.model_facts(facts), fit.Layout(), wanted, rig)
    bench.fact("estimate", model=model, estimate=dataclasses.asdict(found))


def boots(bench: Bench) -> None:
    for name in ("coder-first", "coder-second"):
        options = bench.options()
        estimate(bench, CODER, options)
        engine = Engine(bench, name, CODER, options)
        if engine.wait_ready(280) is not None:
            engine.first_token()
            facts = boot_facts(engine.log)
            bench.fact(
                "boot", name=name, trusted=facts.trusted, keep=facts.plan_may_be_kept, **dataclasses.asdict(facts)
            )
        engine.stop()


def sleep(bench: Bench) -> None:
    awake = bench.used()
    options = bench.options(enable_sleep_mode=True, enforce_eager=True)
    first = Engine(bench, "sleeper-32b", CODER, options)
    assert first.wait_ready() is not None
    facts = boot_facts(first.log)
    bench.fact("boot", name="sleeper-32b", trusted=facts.trusted, **dataclasses.asdict(facts))
    bench.fact("first-sleep", name="sleeper-32b", s=round(first.sleep(), 2), residue_mib=(bench.used() - awake) >> 20)
    bench.fact("is-asleep", answer=first.asleep(), health=first.ask("GET", "/health")[0])
    before = bench.used()
    second = Engine(bench, "sleeper-7b", SEVEN, options)
    assert second.wait_ready() is not None
    second.sleep()
    bench.fact("first-sleep", name="sleeper-7b", residue_mib=(bench.used() - before) >> 20)
    first.wake()
    bench.fact("awake", answer=first.asleep(), ttft=round(first.first_token(), 3))
    for turn in range(6):
        old, new = (first, second) if turn % 2 == 0 else (second, first)
        begun = time.monotonic()
        slept, woken, token = old.sleep(), new.wake(), new.first_token()
        bench.fact(
            "switch",
            to=new.name,
            click_to_first_token=round(time.monotonic() - begun, 3),
            sleep=round(slept, 3),
            wake=round(woken, 3),
            ttft=round(token, 3),
            used_mib=bench.used() >> 20,
        )
    first.stop()
    second.stop()


def die(bench: Bench) -> None:
    options = bench.options(enforce_eager=True)
    engine = Engine(bench, "killed-core", SMALL, options)
    assert engine.wait_ready() is not None
    cores = [
        p for p in bench.runner.observe(engine.handle).pids if b"EngineCore" in Path(f"/proc/{p}/cmdline").read_bytes()
    ]
    bench.fact("kill", pids=cores)
    begun = time.monotonic()
    for pid in cores:
        os.kill(pid, signal.SIGKILL)
    health: list[Any] = []
    while time.monotonic() - begun < 40:
        status = engine.ask("GET", "/health", seconds=2)[0]
        if not health or health[-1][1] != status:
            health.append((round(time.monotonic() - begun, 2), status))
        if bench.runner.observe(engine.handle).state is not ProcessState.RUNNING:
            break
        time.sleep(0.1)
    bench.fact("after-kill", s=round(time.monotonic() - begun, 2), health=health, used_mib=bench.used() >> 20)
    engine.told("diagnosis")
    engine.keep_log()

    starting = Engine(bench, "stopped-while-starting", SMALL, options)
    while "Loading model from scratch" not in starting.log and time.monotonic() - starting.begun < 90:
        time.sleep(0.2)
    starting.stop()

    for name, change in (
        ("too-long", {"max_model_len": 32768}),
        ("no-room", {"gpu_memory_utilization": round(17.5 * GIB / bench.total, 4)}),
        ("bad-quantization", {"quantization": "gptq"}),
    ):
        failing = Engine(bench, name, CODER, {**options, **change})
        failing.wait_ready(150)
        failing.stop()


def main() -> None:
    part, out = sys.argv[1], Path(sys.argv[2])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # a time limit still ends the engines, below
    bench = Bench(out)
    try:
        {"boots": boots, "sleep": sleep, "die": die}[part](bench)
    finally:
        for directory in bench.runner.root.glob("*"):
            handle = bench.runner.recover(directory.name)
            if handle is not None and bench.runner.observe(handle).state is ProcessState.RUNNING:
                bench.runner.stop(handle)
        bench.driver.close()


if __name__ == "__main__":
    main()
