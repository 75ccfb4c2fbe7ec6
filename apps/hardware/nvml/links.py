"""From NVLink lanes as each card reports them to one link per bridge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from apps.hardware.protocol import Link


@dataclass(frozen=True, slots=True)
class Lane:
    """One lane of one card; ``peer_uuid`` is ``None`` where the far end is unknown or no GPU of this machine.
    ``to_switch``: it ends at an NVSwitch, and so leads to every card that has such lanes."""

    active: bool
    peer_uuid: str | None
    gigabytes_per_second: float | None
    to_switch: bool = False


def links_from_lanes(lanes: Mapping[str, Sequence[Lane]]) -> tuple[Link, ...]:
    """Links in the order of the cards in ``lanes`` (uuid to its lanes), each bridge once; through an NVSwitch one
    between any two cards, with the lanes of the one that has fewer.

    An inactive lane does not name its far end. If all named ones of a card lead to the same peer,
    it belongs to that bridge; a card with no named lane gets a link to nowhere, so that a dead
    bridge can be seen.
    """
    switched = {uuid: found for uuid, own in lanes.items() if (found := [lane for lane in own if lane.to_switch])}
    if len(switched) > 1:
        lanes = {uuid: [lane for lane in own if not lane.to_switch] for uuid, own in lanes.items()}
    links = [
        _link(first, second, min(switched[first], switched[second], key=_active))
        for first, second in combinations(switched, 2)
    ]
    seen: set[frozenset[str]] = set()
    for uuid, own in lanes.items():
        named = {lane.peer_uuid for lane in own if lane.peer_uuid is not None}
        only_peer = next(iter(named)) if len(named) == 1 else None
        by_peer: dict[str | None, list[Lane]] = {}
        for lane in own:
            peer = lane.peer_uuid
            if peer is None and not lane.active:
                peer = only_peer
            by_peer.setdefault(peer, []).append(lane)
        for peer, group in by_peer.items():
            if peer is not None:
                bridge = frozenset((uuid, peer))
                if bridge in seen:
                    continue
                seen.add(bridge)
            links.append(_link(uuid, peer, group))
    return tuple(links)


def _link(uuid: str, peer: str | None, group: Sequence[Lane]) -> Link:
    speeds = [lane.gigabytes_per_second for lane in group if lane.gigabytes_per_second is not None]
    return Link(uuid, peer, _active(group), len(group), speeds[0] if speeds else None)


def _active(group: Sequence[Lane]) -> int:
    return sum(lane.active for lane in group)
