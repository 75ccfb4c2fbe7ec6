"""What a replica's processes are bound to: NUMA node and NCCL environment, each with its reason. Pure.

NCCL's settings are those of vLLM set-ups on 3090s without NVSwitch (club-3090); a node binding follows from where the
cards hang. ``numactl`` where the rig has it; else ``taskset``, which comes with every Linux and leaves the memory to
the kernel's first touch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

from apps.engines.protocol import EngineLaunch, ReplicaSlot
from apps.profiles.placement import Card, RigFacts, named


@dataclass(frozen=True, slots=True)
class NumaHost:
    """``nodes``: each node's CPUs as the kernel lists them (``0-15,32-47``)."""

    nodes: Mapping[int, str]
    numactl: bool = False


@dataclass(frozen=True, slots=True)
class Binding:
    """``argv_prefix`` comes before the engine's command; ``nccl`` is None where nothing is exchanged between GPUs."""

    argv_prefix: tuple[str, ...] = ()
    nccl: Mapping[str, str] | None = None
    reasons: tuple[str, ...] = field(default=())


def bind(
    cards: Sequence[Card], facts: RigFacts, *, gpus_per_replica: int, host: NumaHost | None, speaks_nccl: bool
) -> Binding:
    """For one server and its cards, replica after replica.

    ``host`` is None where the machine is another one, or only simulated. ``speaks_nccl``: see ``exchanges``.
    """
    prefix, why = _node(cards, host)
    nccl: dict[str, str] | None = None
    reasons = [why] if why else []
    if speaks_nccl and gpus_per_replica > 1:
        replicas = [cards[at : at + gpus_per_replica] for at in range(0, len(cards), gpus_per_replica)]
        nccl, told = _nccl(replicas, facts)
        reasons += told
    return Binding(prefix, nccl, tuple(reasons))


def _nccl(replicas: Iterable[Sequence[Card]], facts: RigFacts) -> tuple[dict[str, str], list[str]]:
    working = {frozenset((b.first_uuid, b.second_uuid)) for b in facts.bridges if b.active_lanes > 0}
    bridged = any(frozenset((a.uuid, b.uuid)) in working for r in replicas for a, b in combinations(r, 2))
    if bridged:
        environment = {"NCCL_P2P_LEVEL": "NVL"}
        reasons = [
            "NCCL_P2P_LEVEL=NVL: cards reach into each other's memory across NVLink only; everything else goes through "
            "host memory, because drivers refuse it over PCIe on these cards."
        ]
    else:
        environment = {"NCCL_P2P_DISABLE": "1"}
        reasons = [
            "NCCL_P2P_DISABLE=1: no working NVLink bridge lies between these cards, and drivers refuse peer access "
            "over PCIe on them; NCCL goes through host memory without trying."
        ]
    environment |= {"NCCL_IB_DISABLE": "1", "NCCL_CUMEM_ENABLE": "0"}
    reasons.append("NCCL_IB_DISABLE=1: all cards are in one machine, so there is no InfiniBand to look for.")
    reasons.append("NCCL_CUMEM_ENABLE=0: as published vLLM set-ups of 3090 pairs run.")
    return environment, reasons


def _node(cards: Sequence[Card], host: NumaHost | None) -> tuple[tuple[str, ...], str]:
    if host is None or not cards or len(host.nodes) < 2:
        return (), ""
    on = {c.numa_node for c in cards}
    if None in on:
        return (), f"No NUMA binding: the host does not say which node {named(cards)} hang{_s(cards)} on."
    if len(on) > 1:
        nodes = " and ".join(str(n) for n in sorted(n for n in on if n is not None))
        return (), f"No NUMA binding: {named(cards)} hang on nodes {nodes}, and a binding would slow one side down."
    (node,) = on
    if node is None or not host.nodes.get(node):
        return (), f"No NUMA binding: node {node} of {named(cards)} has no processors of its own."
    why = f"{named(cards)} hang{_s(cards)} on NUMA node {node}; processes on another node lose speed silently."
    if host.numactl:
        # Preferred, not bound: pinned memory for sleeping models can be larger than one node.
        return ("numactl", f"--cpunodebind={node}", f"--preferred={node}"), f"numactl: {why}"
    cpus = host.nodes[node]
    return ("taskset", "--cpu-list", cpus), f"CPUs {cpus}: {why} (numactl, which binds memory too, is not installed.)"


def _s(cards: Sequence[Card]) -> str:
    return "s" if len(cards) == 1 else ""


def exchanges(engine: str, device: str) -> bool:
    """Whether the engine's GPUs speak NCCL with each other."""
    return engine in ("vllm", "ray_serve") and device == "gpu"


def bound(launches: Iterable[EngineLaunch], bindings: Sequence[Binding]) -> tuple[EngineLaunch, ...]:
    """The launches with their prefixes; each serves the slot that ``replica`` names."""
    return tuple(
        replace(launch, argv=(*bindings[launch.replica].argv_prefix, *launch.argv))
        if launch.replica < len(bindings) and not launch.binds_itself
        else launch
        for launch in launches
    )


def with_nccl(slots: Sequence[ReplicaSlot], bindings: Sequence[Binding]) -> tuple[ReplicaSlot, ...]:
    return tuple(
        replace(slot, nccl_env=bindings[at].nccl, argv_prefix=bindings[at].argv_prefix) if at < len(bindings) else slot
        for at, slot in enumerate(slots)
    )
