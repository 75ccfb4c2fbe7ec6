"""Where a layout lies on a rig's cards. Pure: facts in, placement or a sentence out.

The replicas take free cards first, and occupied ones only where nothing else suffices; among those choices tensor
parallel groups sit on NVLink pairs wherever these are (0-1/2-3 and 0-2/1-3 are both common), then on one NUMA node,
then where no pair is torn apart, then on the widest PCIe links, the cooler cards, the lowest slots. The same facts
always give the same placement.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

# Measured on 3090 pairs, bridge against PCIe: facts of club-3090 (decode 2-5 %, prefill 35-49 %).
WARMTH_STEP = 10.0
NO_BRIDGE_COST = "pairs with a bridge were measured 2–5 % faster at decode and 35–49 % faster with long prompts"


@dataclass(frozen=True, slots=True)
class Card:
    """``numa_node`` is None where the host does not say. ``present`` is False for a card that is gone."""

    index: int
    uuid: str
    memory_total_bytes: int | None
    numa_node: int | None
    present: bool
    cuda_total_bytes: int | None = None  # what engines see of ``memory_total_bytes``
    pcie_width: int | None = None  # lanes in use now where they were read, else the card's most
    temperature_celsius: float | None = None


@dataclass(frozen=True, slots=True)
class Bridge:
    """An NVLink bridge; without active lanes it is dead. A 3090's bridge has 4 lanes."""

    first_uuid: str
    second_uuid: str
    active_lanes: int


@dataclass(frozen=True, slots=True)
class RigFacts:
    cards: tuple[Card, ...]
    bridges: tuple[Bridge, ...]
    compute_capability: tuple[int, int] = (8, 6)  # the lowest of its cards; a 3090's where none is reported


@dataclass(frozen=True, slots=True)
class Placement:
    """``replicas``: per replica its cards in rank order, pipeline stage after pipeline stage.

    ``nvlinked``: any two cards of a tensor parallel group have a working bridge between them, which
    vLLM's own all-reduce asks for (TP4 on two pairs has not). ``warnings`` are sentences about costs.
    """

    replicas: tuple[tuple[Card, ...], ...]
    nvlinked: bool
    warnings: tuple[str, ...]

    @property
    def cards(self) -> tuple[Card, ...]:
        return tuple(card for cards in self.replicas for card in cards)


class DoesNotFit(Exception):
    """The sentence why the layout cannot lie on this rig."""


Pairs = dict[frozenset[str], int]  # two uuids → active lanes; 0 is a dead bridge


def place(
    facts: RigFacts,
    *,
    replicas: int,
    tensor_parallel_size: int,
    pipeline_parallel_size: int = 1,
    avoid: frozenset[str] = frozenset(),
    resting: frozenset[str] = frozenset(),
    slept_on: frozenset[str] = frozenset(),
) -> Placement:
    """Choose cards for a layout.

    Each set holds uuids. ``avoid`` are occupied cards, ``slept_on`` those on which others only sleep, ``resting`` those
    that may not be loaded for a while. Raises DoesNotFit when the rig has too few cards.
    """
    per_replica = tensor_parallel_size * pipeline_parallel_size
    if min(replicas, tensor_parallel_size, pipeline_parallel_size) < 1:
        raise DoesNotFit("Replicas, tensor parallel size and pipeline parallel size must each be at least 1.")
    needed = replicas * per_replica
    cards = sorted((c for c in facts.cards if c.present), key=lambda c: (c.index, c.uuid))
    if needed > len(cards):
        raise DoesNotFit(_too_few(facts, needed, len(cards)))
    pairs: Pairs = {frozenset((b.first_uuid, b.second_uuid)): b.active_lanes for b in facts.bridges}
    choices = _choices(cards, needed, avoid, resting, slept_on)
    best = min(
        (_divide(chosen, replicas, per_replica, tensor_parallel_size, pairs) for chosen in choices),
        key=lambda groups: (
            _unbridged(groups, tensor_parallel_size, pairs),
            _split_numa(groups),
            _widowed(groups, cards, pairs),
            -sum(c.pcie_width or 0 for replica in groups for c in replica),
            sum(_warmth(c) for replica in groups for c in replica),
            [c.index for replica in groups for c in replica],
        ),
    )
    groups = _tensor_parallel_groups(best, tensor_parallel_size)
    return Placement(
        replicas=best,
        nvlinked=_nvlinked(groups, tensor_parallel_size, pairs),
        warnings=tuple(_warnings(best, groups, pairs)),
    )


def _choices(
    cards: Sequence[Card], needed: int, avoid: frozenset[str], resting: frozenset[str], slept_on: frozenset[str]
) -> Iterable[tuple[Card, ...]]:
    """Of grade after grade all cards, and any of the first grade that suffices.

    One that rests is waited for sooner than that somebody is stopped; where that spares nobody, it comes after all that
    may be loaded at once."""
    unoccupied = [c for c in cards if c.uuid not in avoid]
    rests = [c for c in unoccupied if c.uuid in resting]
    beside = [c for c in unoccupied if c.uuid in slept_on and c not in rests]
    free = [c for c in unoccupied if c not in rests and c not in beside]
    occupied = [c for c in cards if c.uuid in avoid]
    sound = [c for c in occupied if c.uuid not in resting]
    if len(unoccupied) >= needed:
        grades = [free, beside, rests]
    else:
        grades = [free, beside, sound, rests, [c for c in occupied if c not in sound]]
    taken: tuple[Card, ...] = ()
    for grade in grades:
        if len(taken) + len(grade) >= needed:
            break
        taken += tuple(grade)
    return (taken + more for more in combinations(grade, needed - len(taken)))


Groups = tuple[tuple[Card, ...], ...]


def is_nvlinked(replicas: Groups, tensor_parallel_size: int, facts: RigFacts) -> bool:
    """``Placement.nvlinked`` of cards that were chosen before."""
    pairs: Pairs = {frozenset((b.first_uuid, b.second_uuid)): b.active_lanes for b in facts.bridges}
    return _nvlinked(_tensor_parallel_groups(replicas, tensor_parallel_size), tensor_parallel_size, pairs)


def _nvlinked(groups: Iterable[tuple[Card, ...]], tensor_parallel_size: int, pairs: Pairs) -> bool:
    return tensor_parallel_size > 1 and all(
        pairs.get(frozenset((a.uuid, b.uuid)), 0) > 0 for g in groups for a, b in combinations(g, 2)
    )


def _divide(cards: tuple[Card, ...], count: int, size: int, tensor_parallel_size: int, pairs: Pairs) -> Groups:
    """Cut the chosen cards into replicas, and order each replica by its tensor parallel groups."""
    replicas = _cut(cards, count, size, pairs)
    ordered = (
        tuple(c for group in _cut(replica, size // tensor_parallel_size, tensor_parallel_size, pairs) for c in group)
        for replica in replicas
    )
    return tuple(sorted(ordered, key=lambda replica: min(c.index for c in replica)))


def _cut(cards: tuple[Card, ...], count: int, size: int, pairs: Pairs) -> Groups:
    """``count`` groups of ``size``, the group with most bridges first."""
    left = sorted(cards, key=lambda c: (c.index, c.uuid))
    groups = []
    for _ in range(count):
        group = min(
            combinations(left, size),
            key=lambda g: (-_bridged_cards(g, pairs), -_lanes(g, pairs), len(_numa_nodes(g)), [c.index for c in g]),
        )
        groups.append(group)
        left = [c for c in left if c not in group]
    return tuple(sorted(groups, key=lambda g: g[0].index))


def _tensor_parallel_groups(replicas: Groups, size: int) -> list[tuple[Card, ...]]:
    return [replica[at : at + size] for replica in replicas for at in range(0, len(replica), size)]


def _bridged_cards(group: Iterable[Card], pairs: Pairs) -> int:
    """How many cards of the group have a working bridge to another card of it."""
    uuids = {c.uuid for c in group}
    return len({uuid for pair, lanes in pairs.items() if lanes > 0 and pair <= uuids for uuid in pair})


def _lanes(group: Iterable[Card], pairs: Pairs) -> int:
    return sum(pairs.get(frozenset((a.uuid, b.uuid)), 0) for a, b in combinations(group, 2))


def _unbridged(replicas: Groups, tensor_parallel_size: int, pairs: Pairs) -> tuple[int, int]:
    """Cards without a partner in their group (none matter at TP1), then minus the lanes in use."""
    if tensor_parallel_size == 1 and all(len(r) == 1 for r in replicas):
        return (0, 0)
    groups = replicas if tensor_parallel_size == 1 else _tensor_parallel_groups(replicas, tensor_parallel_size)
    return sum(len(g) - _bridged_cards(g, pairs) for g in groups), -sum(_lanes(g, pairs) for g in groups)


def _numa_nodes(group: Iterable[Card]) -> set[int]:
    return {c.numa_node for c in group if c.numa_node is not None}


def _split_numa(replicas: Groups) -> int:
    return sum(len(_numa_nodes(r)) > 1 for r in replicas)


def _warmth(card: Card) -> int:
    """In steps of ten degrees: a placement must not change with every reading."""
    return int((card.temperature_celsius or 0) // WARMTH_STEP)


def _widowed(replicas: Groups, cards: list[Card], pairs: Pairs) -> int:
    """Working pairs of which this placement takes one card only: such a pair is lost for the next profile."""
    taken = {c.uuid for replica in replicas for c in replica}
    present = {c.uuid for c in cards}
    return sum(1 for pair, lanes in pairs.items() if lanes > 0 and pair <= present and len(pair & taken) == 1)


def named(cards: Iterable[Card]) -> str:
    names = [str(c.index) for c in cards]
    if len(names) == 1:
        return f"GPU {names[0]}"
    return f"GPUs {', '.join(names[:-1])} and {names[-1]}"


def _too_few(facts: RigFacts, needed: int, present: int) -> str:
    missing = sorted((c for c in facts.cards if not c.present), key=lambda c: c.index)
    has = "none" if present == 0 else f"only {present}"
    sentence = f"This layout needs {needed} GPU{'s' if needed > 1 else ''}; the rig has {has}"
    if missing:
        sentence += f" ({named(missing)} {'is' if len(missing) == 1 else 'are'} missing)"
    return f"{sentence}. Choose a smaller layout{' or bring the missing card back' if missing else ''}."


def _warnings(replicas: Groups, groups: list[tuple[Card, ...]], pairs: Pairs) -> Iterable[str]:
    most_lanes = max(pairs.values(), default=0)
    for group in groups:
        if len(group) < 2:
            continue
        inside = {p: n for p, n in pairs.items() if p <= {c.uuid for c in group}}
        for pair, lanes in inside.items():
            ends = named(c for c in group if c.uuid in pair)
            if lanes == 0:
                yield (
                    f"The NVLink bridge between {ends} is dead, so they exchange over PCIe; {NO_BRIDGE_COST}. "
                    "Reseat the bridge and look at `nvidia-smi nvlink --status`."
                )
            elif lanes < most_lanes:
                yield f"The NVLink bridge between {ends} runs on {lanes} of {most_lanes} lanes; reseat it."
        if len(group) == 2 and not inside:
            yield f"{named(group)} have no NVLink bridge between them, so they exchange over PCIe; {NO_BRIDGE_COST}."
        narrow = _narrow(group)
        if narrow and not _all_bridged(group, pairs):
            yield narrow
        if len(group) > 2:
            yield _wide_group(group, {p for p, lanes in inside.items() if lanes > 0})
    for replica in replicas:
        if len(_numa_nodes(replica)) > 1:
            yield (
                f"{named(replica)} hang on different NUMA nodes: part of their traffic crosses the link between the "
                "processors' memories, and processes on the wrong node lose speed silently."
            )


def _all_bridged(group: Iterable[Card], pairs: Pairs) -> bool:
    return all(pairs.get(frozenset((a.uuid, b.uuid)), 0) > 0 for a, b in combinations(group, 2))


def _narrow(group: tuple[Card, ...]) -> str:
    """The sentence about a card with fewer PCIe lanes than its partners; empty where all are alike."""
    known = [c for c in group if c.pcie_width]
    widest = max((c.pcie_width or 0 for c in known), default=0)
    slow = [c for c in known if (c.pcie_width or 0) < widest]
    if not slow:
        return ""
    lanes = min(c.pcie_width or 0 for c in slow)
    one = len(slow) == 1
    return (
        f"{named(slow)} {'runs' if one else 'run'} on {lanes} PCIe lanes and the others on {widest}: the slowest link "
        "sets the pace of their exchange. Check slot and riser."
    )


def _wide_group(group: tuple[Card, ...], working: set[frozenset[str]]) -> str:
    size = len(group)
    if not working:
        return f"TP{size} on {named(group)} has no working NVLink bridge: all exchange goes over PCIe."
    names = sorted(
        (sorted(c.index for c in group if c.uuid in pair) for pair in working),
    )
    shown = " and ".join("-".join(map(str, pair)) for pair in names)
    return (
        f"TP{size} uses the NVLink pair{'s' if len(names) > 1 else ''} {shown}; the rest goes over PCIe, "
        "and vLLM turns its custom all-reduce off there, which is expected. More small replicas give more tokens per "
        "second in total where the model fits."
    )
