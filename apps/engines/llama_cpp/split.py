"""How llama.cpp's layers lie on the cards: what was meant, and what its log says.

An engine that put half of its layers on the CPU answers all the same, only many times slower; nothing but the log
tells. Read from builds b10434, b11434 and xllamacpp 2026.10, which write these lines at verbosity 4.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

from apps.engines.protocol import StartCheck

MIB = 1 << 20
GIB = 1 << 30
TOLERANCE = 1.01  # one layer: builds round differently
OFFLOADED = re.compile(r"offloaded (\d+)/(\d+) layers to GPU")
DEVICE = re.compile(r"using device (\S+) \(([^)\n]*)\)")
BUFFER = re.compile(r":\s+(\S.*?)\s+(model|KV|RS) buffer size =\s+([\d.]+) MiB")
CACHE = re.compile(r"size =\s+([\d.]+) MiB \(\s*\d+ cells,\s+(\d+) layers")
NO_GPU = re.compile(r"no usable GPU found|no GPU found|compiled without (?:CUDA|GPU support)", re.IGNORECASE)
HOST = re.compile(r"(?:CPU|Host|BLAS|AMX)|\S*_Host\b")


@dataclass(slots=True)
class DeviceSeen:
    """One card as the engine's log names it; MiB as printed. ``cache_layers`` is the number of layers whose cache
    lies there: whole for a layer split."""

    name: str
    model_mib: float = 0.0
    cache_mib: float = 0.0
    cache_layers: float = 0.0


@dataclass(slots=True)
class SplitSeen:
    """``offloaded`` of ``layers``: the output layer counts as one. None where the log does not say."""

    offloaded: int | None = None
    layers: int | None = None
    devices: list[DeviceSeen] = field(default_factory=list)
    host_model_mib: float = 0.0
    host_cache_mib: float = 0.0
    no_gpu: str = ""


def read_split(log: str) -> SplitSeen:
    """From the log of one start. What a trial run printed before the real load is overwritten by the later lines."""
    seen = SplitSeen()
    found = OFFLOADED.findall(log)
    if found:
        seen.offloaded, seen.layers = int(found[-1][0]), int(found[-1][1])
    if match := NO_GPU.search(log):
        seen.no_gpu = match[0]
    by_name: dict[str, DeviceSeen] = {}
    described = {}
    for name, description in DEVICE.findall(log):
        by_name[name] = DeviceSeen(name)
        described[description] = name
    model: dict[str, float] = {}
    pending: list[tuple[DeviceSeen | None, float]] = []
    for line in log.splitlines():
        if (match := BUFFER.search(line)) is not None:
            owner, kind, mib = match[1], match[2], float(match[3])
            device = None if HOST.match(owner) else _device(owner, by_name, described)
            if kind == "model":
                model[owner] = mib  # the last load's
                continue
            if device is None:
                seen.host_cache_mib += mib
            else:
                device.cache_mib += mib
            pending.append((device, mib))
        elif pending and (match := CACHE.search(line)) is not None:
            # Each cache says its size and number of layers after its buffers: a device's share of the bytes
            # is its share of the layers, also where windows make caches of two sizes.
            size, layers = float(match[1]), int(match[2])
            for device, mib in pending:
                if device is not None and size > 0:
                    device.cache_layers += layers * mib / size
            pending = []
    for owner, mib in model.items():
        if HOST.match(owner):
            seen.host_model_mib += mib
        else:
            _device(owner, by_name, described).model_mib += mib
    seen.devices = list(by_name.values())
    return seen


def _device(owner: str, by_name: dict[str, DeviceSeen], described: dict[str, str]) -> DeviceSeen:
    """``CUDA1``, or ``RPC0[127.0.0.1:18151]``, whose device is called ``RPC1 (127.0.0.1:18151)``."""
    name, _, inside = owner.partition("[")
    name = described.get(inside.rstrip("]"), name) if inside else name.removesuffix("_Split")
    return by_name.setdefault(name, DeviceSeen(name))


def memory_shares(free: Sequence[int | None], total: Sequence[int]) -> tuple[float, ...] | None:
    """Shares for ``--tensor-split``: GiB with one decimal, of what is free, else of what the cards have.

    None where a card says neither. Equal cards get equal shares whatever a driver's kilobytes differ by.
    """
    bytes_ = [f if f is not None else t for f, t in zip(free, total, strict=True)] if free else list(total)
    if not bytes_ or any(b <= 0 for b in bytes_):
        return None
    shares = tuple(round(b / GIB, 1) for b in bytes_)
    return shares if all(s > 0 for s in shares) else None


def intended_layers(shares: Sequence[float], layers: int, offloaded: int) -> list[int]:
    """How many of the layers (output layer included) go to each device for a layer split: llama.cpp gives layer i of
    those offloaded to the first device whose summed share exceeds i/offloaded (``load_tensors`` in llama-model.cpp)."""
    total = sum(shares)
    if total <= 0 or offloaded <= 0:
        return [0] * len(shares)
    bounds = [b / total for b in accumulate(shares)]
    counts = [0] * len(shares)
    for i in range(min(offloaded, layers)):
        at = next((d for d, bound in enumerate(bounds) if i / offloaded < bound), len(shares) - 1)
        counts[at] += 1
    return counts


def value_of(argv: Sequence[str], *names: str) -> str | None:
    """The last value given to a flag, as the engine takes it."""
    found = None
    for flag, value in pairwise(argv):
        if flag in names:
            found = value
    return found


def check_split(log: str, argv: Sequence[str]) -> StartCheck:
    """Whether the layers lie where the command line meant. The panel writes a share for each of several cards."""
    asked = value_of(argv, "--n-gpu-layers", "--gpu-layers", "-ngl") or "auto"
    if asked == "0":
        return StartCheck()
    given = value_of(argv, "--tensor-split", "-ts")
    shares = [float(part) for part in given.split(",")] if given else []
    seen = read_split(log)
    facts = {
        "layers_offloaded": seen.offloaded,
        "layers_total": seen.layers,
        "host_weights_bytes": round(seen.host_model_mib * MIB),
        "devices": [
            {
                "name": d.name,
                "weights_bytes": round(d.model_mib * MIB),
                "kv_cache_bytes": round(d.cache_mib * MIB),
                "kv_layers": round(d.cache_layers, 1),
            }
            for d in seen.devices
        ],
    }
    mode = value_of(argv, "--split-mode", "-sm") or "layer"
    warnings = _on_the_gpus(seen, asked)
    if len(shares) > 1 and mode != "none" and seen.devices:
        warnings += _as_shared(seen, shares, mode)
    return StartCheck(tuple(warnings), facts)


def _on_the_gpus(seen: SplitSeen, asked: str) -> list[str]:
    if seen.no_gpu or (seen.offloaded is not None and not seen.devices):
        said = f" (“{seen.no_gpu}”)" if seen.no_gpu else ""
        return [
            f"llama-server uses no GPU{said}: everything runs on the CPU, many times slower. It was probably built "
            "without CUDA; install a build for these cards."
        ]
    if seen.offloaded is None or seen.layers is None:
        return ["The log does not say how many layers were put on the GPUs, so the split could not be checked."]
    wanted = min(int(asked), seen.layers) if asked.isdecimal() else seen.layers
    if seen.offloaded < wanted:
        return [
            f"Only {seen.offloaded} of {seen.layers} layers are on the GPUs; the rest runs on the CPU, many times "
            "slower. Set gpu_layers = all, and a shorter context or a quantised cache if it does not fit then."
        ]
    if seen.offloaded < seen.layers:
        return [
            f"{seen.offloaded} of {seen.layers} layers are on the GPUs, as gpu_layers = {asked} asks; the rest runs "
            "on the CPU, many times slower."
        ]
    return []


def _as_shared(seen: SplitSeen, shares: Sequence[float], mode: str) -> list[str]:
    written = ",".join(f"{s:g}" for s in shares)
    if len(seen.devices) != len(shares):
        return [f"It uses {len(seen.devices)} of the {len(shares)} GPUs that were reserved for it."]
    empty = [d.name for d, s in zip(seen.devices, shares, strict=True) if s > 0 and d.model_mib == 0]
    if empty:
        return [f"{' and '.join(empty)} holds no weights, against the intended split {written}."]
    if mode != "layer" or not seen.layers or not seen.offloaded:
        return []
    intended = intended_layers(shares, seen.layers, seen.offloaded)
    intended[max(i for i, n in enumerate(intended) if n)] -= 1  # the output layer has no cache
    if abs(sum(d.cache_layers for d in seen.devices) - sum(intended)) > TOLERANCE:
        return []  # layers that share a cache: their number says nothing
    told = [
        f"{d.name} has {d.cache_layers:.0f} instead of {n}"
        for d, n in zip(seen.devices, intended, strict=True)
        if abs(d.cache_layers - n) > TOLERANCE
    ]
    return [f"The layers are not split as {written} asks: {', '.join(told)}."] if told else []
