"""What the panel asks of a serving engine: options in, exact command lines and verdicts out.

Adapters are small and pure. They import nothing of Django; golden argv files prove them without
a GPU. Facts about an install (its executable, version and accepted flags) come in as values.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol, runtime_checkable


class EngineKind(StrEnum):
    VLLM = "vllm"
    RAY_SERVE = "ray_serve"
    LLAMA_CPP = "llama_cpp"
    SIMULATED = "simulated"


@dataclass(frozen=True, slots=True)
class OptionError:
    """One thing wrong with a profile's options: ``field`` as typed, a sentence, maybe a fix."""

    field: str
    message: str


class InvalidOptions(Exception):
    """A profile's options, or its model, cannot be used; ``errors`` has an entry for each reason."""

    def __init__(self, errors: Sequence[OptionError]) -> None:
        self.errors = tuple(errors)
        super().__init__("; ".join(f"{e.field}: {e.message}" for e in errors))


@dataclass(frozen=True, slots=True)
class Install:
    """An engine install as an adapter needs it: ``command`` is the argv prefix of the server.

    ``flags`` are those that its own help names, for vLLM with what the help tells of each (its ``flags.py``); None
    where it was never asked."""

    kind: EngineKind
    version: str
    command: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    flags: Collection[str] | None = None


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What an engine must know of the model: where its weights lie and how it is called."""

    served_name: str
    source: str  # a folder, a GGUF file, or a hub repository
    chat_template: str | None = None
    architecture: str | None = None
    weights_bytes: int | None = None
    # parts of the cache for the simulated engine's and the planner's arithmetic
    kv_bytes_per_token: int | None = None
    max_context_tokens: int | None = None
    request_cache_bytes: int | None = None  # on the CPU: KV cache of one full request, on each rank
    tool_parser: str | None = None
    reasoning_parser: str | None = None
    quantization: str | None = None


@dataclass(frozen=True, slots=True)
class ReplicaSlot:
    """Where one server goes: a replica's own, or one for several.

    ``gpu_indices`` and ``gpu_uuids`` are empty for ``device: cpu``."""

    launch_id: str
    host: str
    port: int
    api_key: str
    gpu_indices: tuple[int, ...] = ()
    gpu_uuids: tuple[str, ...] = ()
    gpu_memory_total_bytes: tuple[int, ...] = ()
    # as the driver read it when the launch was made; empty, or None for a card, where it did not say
    gpu_memory_free_bytes: tuple[int | None, ...] = ()
    # NCCL's settings for these cards' bridges; None leaves the engine's own for two bridged pairs
    nccl_env: Mapping[str, str] | None = None
    argv_prefix: tuple[str, ...] = ()  # what binds a process to the NUMA node of this slot's cards


# What a quad-3090 with its two bridges wants; the placement may know better.
NCCL_DEFAULT = {"NCCL_P2P_LEVEL": "NVL", "NCCL_IB_DISABLE": "1", "NCCL_CUMEM_ENABLE": "0"}


@dataclass(frozen=True, slots=True)
class ExpectedMemory:
    """What the planner expects of the fullest GPU, in bytes; ``kv_token_bytes`` is what one token of cache takes there.

    The simulated engine boots with it, so that a simulated start agrees with the plan that a person read.
    """

    weights_bytes: int
    activation_bytes: int
    cuda_graph_bytes: int
    non_torch_bytes: int
    context_bytes: int
    kv_token_bytes: float | None = None
    compiles: bool = True  # this boot runs torch.compile afresh


@dataclass(frozen=True, slots=True)
class LaunchContext:
    """Everything ``launch_specs`` may use; it reads no settings, files or clocks."""

    model: ModelSpec
    options: Mapping[str, Any]
    replicas: tuple[ReplicaSlot, ...]
    install: Install
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1  # replicas behind each server; a slot then holds the cards of all of them in turn
    nvlinked: bool = False  # every replica's GPUs are bridged with each other
    cache_dir: str | None = None
    simulation_socket: str | None = None  # the sampler's socket, for the simulated engine
    stand_in_for: EngineKind | None = None  # the simulated engine in another one's place
    expected: ExpectedMemory | None = None


class ReadinessState(StrEnum):
    WAITING = "waiting"
    READY = "ready"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Readiness:
    """A verdict from the log so far and the health endpoint's last answer.

    ``phase`` is a short word ("weights", "compile", "graphs", "server"); ``fraction`` is 0..1
    over the whole start; ``count`` says how far the phase is where the engine counts ("3 of 8 shards").
    """

    state: ReadinessState
    phase: str
    fraction: float
    detail: str = ""
    count: str = ""


@dataclass(frozen=True, slots=True)
class HealthProbe:
    """The last answer of GET ``health_path``; ``status`` is None when nothing answered."""

    status: int | None
    body: str = ""


@dataclass(frozen=True, slots=True)
class EngineMetrics:
    """Normalised from an engine's /metrics; ``None`` where it does not say.

    ``steps_total``: passes over the model. llama.cpp counts an answer's tokens only when it has ended, and these as
    they are made."""

    requests_running: float | None = None
    requests_waiting: float | None = None
    kv_cache_usage_ratio: float | None = None  # 0..1
    prompt_tokens_total: float | None = None
    generation_tokens_total: float | None = None
    steps_total: float | None = None
    kv_cache_tokens: int | None = None
    preemptions_total: float | None = None
    time_to_first_token_seconds_sum: float | None = None
    time_to_first_token_count: float | None = None


class Cause(StrEnum):
    KV_CACHE_TOO_SMALL = "kv_cache_too_small"
    OUT_OF_MEMORY = "out_of_memory"
    PORT_BUSY = "port_busy"
    MODEL_MISSING = "model_missing"
    UNSUPPORTED_SPLIT = "unsupported_split"
    NCCL = "nccl"
    DISK_FULL = "disk_full"
    KILLED = "killed"
    BAD_FLAG = "bad_flag"
    WRONG_QUANTIZATION = "wrong_quantization"
    UNKNOWN_ARCHITECTURE = "unknown_architecture"
    DRIVER = "driver"
    ENGINE_MISSING = "engine_missing"
    TIMEOUT = "timeout"
    CRASHED = "crashed"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Why an engine did not come up, or went: a cause, the log lines that show it, and one
    suggested change to the options (``{}`` when none is known)."""

    cause: Cause
    summary: str  # a full sentence for a tired person
    evidence: tuple[str, ...] = ()
    suggestion: str = ""
    suggested_options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EngineLaunch:
    """An adapter's half of a LaunchSpec: the deployment adds directories and limits.

    ``replica`` is the index of the slot this process serves; one process may serve several.
    """

    launch_id: str
    argv: tuple[str, ...]
    env: dict[str, str]
    secret_env: dict[str, str]
    replica: int
    stop_signals: tuple[tuple[str, float], ...]
    ask_first_seconds: float = 0.0  # see LaunchSpec
    binds_itself: bool = False  # it has used the slots' ``argv_prefix``: one for the whole launch would be wrong


@dataclass(frozen=True, slots=True)
class StartCheck:
    """What the log of a successful start says of how it came up: ``warnings`` are sentences about what is not as
    it was meant, ``facts`` plain JSON values (bytes, counts) that show it, ``discard`` files that it wrote and that the
    next start must not find."""

    warnings: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    discard: tuple[str, ...] = ()


@runtime_checkable
class ChecksItsStart(Protocol):
    """An adapter whose engine can come up and answer, and still not be what was asked for."""

    def check_start(self, log: str, argv: Sequence[str]) -> StartCheck:
        """Judge the whole log of a start that is ready, against the command line that made it."""


@runtime_checkable
class EngineAdapter(Protocol):
    kind: EngineKind
    health_path: str
    metrics_path: str
    start_timeout_seconds: float

    def check(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Validate and normalise a profile's options. Raises InvalidOptions, naming the nearest
        known option for an unknown one and refusing what the panel owns (host, port, keys)."""

    def launch_specs(self, context: LaunchContext) -> tuple[EngineLaunch, ...]:
        """The exact processes to start, one or more per replica."""

    def readiness(self, log: str, probe: HealthProbe) -> Readiness:
        """Judge a start from the log so far and the health endpoint."""

    def parse_metrics(self, text: str) -> EngineMetrics:
        """Normalise a Prometheus exposition; never raises on odd input."""

    def diagnose(self, log: str, exit_code: int | None) -> Diagnosis:
        """Say why a start failed or an engine ended; unknown says unknown."""


@dataclass(frozen=True, slots=True)
class ReplicaCondition:
    """One replica behind a shared address: whether it serves, and its engine's own word for how it is."""

    index: int
    healthy: bool
    state: str


@dataclass(frozen=True, slots=True)
class SharedReport:
    """What a shared address says of its replicas, and the engine's own message about them."""

    replicas: tuple[ReplicaCondition, ...]
    message: str = ""


@runtime_checkable
class CanSleep(Protocol):
    """What an adapter has besides, when its engine can give its cards back and keep its weights in the host's memory.

    Asleep it answers its health path as ever and lets completions hang: nothing may be routed to it.
    """

    sleep_path: str  # POST
    wake_path: str  # POST
    asleep_path: str  # GET

    def may_sleep(self, options: Mapping[str, Any]) -> bool:
        """Whether the profile asks for it."""

    def is_asleep(self, text: str) -> bool | None:
        """What ``asleep_path`` said; None where that is no answer."""


@runtime_checkable
class CompilesPerKey(Protocol):
    """What an adapter has besides, when some of its versions compile anew for a key that they have not seen."""

    def compiles_per_key(self, version: str) -> bool:
        """Whether this version does; its launches then share one key per profile version."""


@runtime_checkable
class SharesOneAddress(Protocol):
    """What an adapter has besides, when its one launch serves all replicas behind the first slot's address.

    Such an engine balances between its replicas and starts one that died again by itself; the panel asks how they are
    at ``replicas_path``, with the launch's key.
    """

    replicas_path: str

    def parse_report(self, text: str) -> SharedReport | None:
        """None where the text is no report."""
