"""What the launcher's log means: its own lines, Ray's and Serve's, and vLLM's from the replicas."""

from __future__ import annotations

import re

from apps.engines.diagnosis import DISK_FULL, Table, words
from apps.engines.protocol import Cause, Diagnosis, HealthProbe, Readiness, ReadinessState
from apps.engines.vllm.logs import TABLE as VLLM_TABLE
from apps.engines.vllm.logs import judge_start as judge_vllm_start

FAILED = re.compile(r"^\[rigpanel\] failed: ([^\n]*)", re.MULTILINE)
# (pattern, phase, fraction of the whole start). The rest of the way, from REPLICAS on, is vLLM's own.
PHASES = (
    (re.compile(r"^\[rigpanel\] starting Ray's head", re.MULTILINE), "ray head", 0.02),
    (re.compile(r"^\[rigpanel\] Ray's head answers", re.MULTILINE), "raylets", 0.10),
    (re.compile(r"^\[rigpanel\] \d+ raylets joined", re.MULTILINE), "application", 0.14),
    (re.compile(r"^\[rigpanel\] application submitted", re.MULTILINE), "application", 0.15),
    (re.compile(r"^\[rigpanel\] application \w+: .*STARTING", re.MULTILINE), "replicas", 0.18),
)
REPLICAS = 0.18


def judge_start(log: str, probe: HealthProbe) -> Readiness:
    """The door answers /health with 200 once the application runs with all of its replicas."""
    if probe.status == 200:
        return Readiness(ReadinessState.READY, "server", 1.0)
    if (failed := FAILED.search(log)) is not None:
        return Readiness(ReadinessState.FAILED, "failed", 0.0, failed[1])
    phase, fraction = "process", 0.0
    for pattern, name, reached in PHASES:
        if pattern.search(log):
            phase, fraction = name, reached
    if phase == "replicas":
        # A replica that could not start says so in vLLM's words, but Serve tries again: its verdict counts, not ours.
        of_vllm = judge_vllm_start(log, HealthProbe(None))
        if of_vllm.state == ReadinessState.WAITING and of_vllm.fraction > 0:
            return Readiness(
                ReadinessState.WAITING,
                of_vllm.phase,
                round(REPLICAS + (1 - REPLICAS) * of_vllm.fraction, 3),
                of_vllm.detail,
            )
    return Readiness(ReadinessState.WAITING, phase, fraction)


def _no_place(match: re.Match[str]) -> Diagnosis:
    needs = f" It needs {match[1]}." if match[1] else ""
    return Diagnosis(
        Cause.UNSUPPORTED_SPLIT,
        f"Ray found no place for a replica: the cards of one raylet do not suffice for it.{needs}",
        suggestion="Check that all cards of the layout are visible (nvidia-smi), or choose a smaller layout.",
    )


_port = words(
    Cause.PORT_BUSY,
    "A port that Ray needs is taken: {0}.",
    "Start again: ports are chosen anew each time. Or end the other Ray on this machine.",
)

_worker_ports = words(
    Cause.PORT_BUSY,
    "Two parts of Ray were given the same port.",
    "Start again: ports are chosen anew each time. RAY_* variables in the panel's environment that name "
    "ports are the other way to get this.",
)

_token = words(
    Cause.CRASHED,
    "Ray refused the token that the panel made for this start: another Ray answers on its port, or RAY_AUTH_MODE "
    "is set in the engine's environment.",
    "End other Ray clusters on this machine (ray stop), then start again.",
)

_module = words(
    Cause.ENGINE_MISSING,
    "Ray's environment has no {1}.",
    "Install ray[serve], vllm, pyarrow and pandas into one environment.",
)

_argument = words(
    Cause.BAD_FLAG,
    "The vLLM that Ray uses has no argument {1}.",
    "Remove the option, or use a vLLM version that has it: ray[llm] pins an older one.",
)

_kernel_memory = words(
    Cause.KILLED,
    "Ray ended a replica because the host's memory was nearly full.",
    "Leave more host memory free; RAY_memory_usage_threshold moves the limit (0.95 of the memory).",
)

_refused = words(
    Cause.BAD_FLAG,
    "Serve did not take the application: {1}.",
    "Compare the profile's options with what this Ray and its vLLM accept.",
)

_head = words(
    Cause.CRASHED,
    "{1}.",
    "The lines below it in the log are Ray's own; a full /dev/shm or /tmp is the most common reason.",
)


def _gave_up(match: re.Match[str]) -> Diagnosis:
    return Diagnosis(
        Cause.CRASHED,
        "Serve gave up: its replicas could not be started." + (f" {match[1].strip()[:300]}" if match[1] else ""),
        suggestion="Look at the replicas' lines in the log above it.",
    )


# 0.32's attention kernel uses AMX without asking the kernel for it, on processors that have it (measured).
_illegal_instruction = words(
    Cause.CRASHED,
    "vLLM's CPU build used an instruction that this machine refused it (SIGILL).",
    "Set dtype to float32: the kernels for bfloat16 are the ones that do so.",
    dtype="float32",
)

TABLE: Table = (
    *DISK_FULL,
    (re.compile(r"No module named '(pyarrow|pandas|ray\.serve|ray\.llm|vllm|aiohttp|ray)[^']*'"), _module),
    (re.compile(r"(?:No module named|ModuleNotFoundError:.*?) '?(pyarrow|pandas|vllm)"), _module),
    (re.compile(r"Unknown engine argument: (\w+)"), _argument),
    (
        re.compile(r"is trying to use a port number \d+ that is used by|Ray component [\w_]+ is trying to use"),
        _worker_ports,
    ),
    (
        re.compile(r"failed: Ray's head refused our token|Missing authentication token|Invalid authentication token"),
        _token,
    ),
    (
        re.compile(
            r"failed: \[Errno 98\][^\n]*|Ray is trying to start at [^\n]*but is already running at[^\n]*"
            r"|(?:Failed to (?:bind|start)|gcs_server)[^\n]*[Aa]ddress already in use[^\n]*"
        ),
        _port,
    ),
    (re.compile(r"ray\.exceptions\.OutOfMemoryError|killed due to the node running low on memory"), _kernel_memory),
    (re.compile(r"Worker proc \S+ died unexpectedly \(exit code: -4\)"), _illegal_instruction),
    *VLLM_TABLE,
    (
        re.compile(r"failed: Ray found no place for a replica\.(?: It needs, on one raylet: ([^\n]*))?"),
        _no_place,
    ),
    (re.compile(r"failed: Serve refused the application ([^\n]*)"), _refused),
    (
        re.compile(r"failed: (Ray's head [^\n]*|No replica came back [^\n]*|Only \d+ of \d+ raylets joined[^\n]*)"),
        _head,
    ),
    (re.compile(r"failed: Serve gave up on the application\.\n?(?:\[rigpanel\] ([^\n]*))?"), _gave_up),
)
