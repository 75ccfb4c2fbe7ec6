"""Do the bridges carry traffic on all lanes, between the pairs where they were?

Pairs are known by the cards' UUIDs: on real rigs 0-1/2-3 and 0-2/1-3 are both common.
"""

from __future__ import annotations

from typing import Any

from apps.verification.judging import CheckContext, Data, Judgement
from apps.verification.models import Verdict

NAME = "nvlink_pairs"
TITLE = "NVLink pairs"
NEEDS_CARDS = True
DEFAULT_PAIRS = 2


def collect(context: CheckContext) -> Data:
    index = {g.uuid: g.index for g in context.cards.gpus}
    pairs: dict[tuple[str, ...], dict[str, Any]] = {}
    for link in context.cards.links:
        ends = tuple(sorted((link.gpu_uuid, link.peer_uuid))) if link.peer_uuid else (link.gpu_uuid,)
        known = pairs.get(ends)
        # Both ends may report one bridge; what the worse end sees counts.
        if known is None or link.active_lanes < known["active"]:
            pairs[ends] = {
                "uuids": list(ends),
                "gpus": sorted(index[u] for u in ends if u in index),
                "active": link.active_lanes,
                "total": link.total_lanes,
                "gb_per_s": link.gigabytes_per_second_per_lane,
            }
    return {"gpus": len(context.cards.gpus), "pairs": sorted(pairs.values(), key=lambda p: (p["gpus"], p["uuids"]))}


def judge(data: Data, accepted: Data | None) -> Judgement:
    working = [p for p in data["pairs"] if p["active"] > 0]
    measured = ", ".join(_told(p) for p in data["pairs"]) or "none"
    if accepted:
        wanted = [p for p in accepted["pairs"] if p["active"] > 0]
        expected = ", ".join(_told(p) for p in wanted) or "none"
        now = {tuple(p["uuids"]): p for p in data["pairs"]}
        lost = [p for p in wanted if now.get(tuple(p["uuids"]), {"active": 0})["active"] < p["active"]]
        if lost:
            return Judgement(Verdict.FAIL, expected, measured, _advice(lost))
        if len(working) > len(wanted):
            return Judgement(
                Verdict.WARN, expected, measured, "There is a bridge more than before: accept this run as normal."
            )
        return Judgement(Verdict.PASS, expected, measured)
    expected = f"{DEFAULT_PAIRS} pairs, all lanes" if data["gpus"] >= 4 else "all lanes of each bridge"
    if weak := [p for p in data["pairs"] if p["active"] < p["total"]]:
        return Judgement(Verdict.FAIL, expected, measured, _advice(weak))
    if data["gpus"] >= 4 and len(working) < DEFAULT_PAIRS:
        advice = (
            "Fewer bridges than this kind of rig has. If there are two, reseat them and look at `nvidia-smi "
            "nvlink --status`; if there are none, accept this run as normal: tensor parallel over a bridged pair "
            "was measured 35–49 % faster with long prompts."
        )
        return Judgement(Verdict.WARN, expected, measured, advice)
    return Judgement(Verdict.PASS, expected, measured)


def _told(pair: Data) -> str:
    ends = "-".join(map(str, pair["gpus"])) or "unknown"
    lanes = f"{pair['active']} of {pair['total']} lanes"
    speed = f", {pair['active'] * pair['gb_per_s']:.0f} GB/s" if pair["gb_per_s"] and pair["active"] else ""
    return f"{ends} ({lanes}{speed})"


def _advice(pairs: list[Any]) -> str:
    ends = " and ".join("-".join(map(str, p["gpus"])) for p in pairs)
    return (
        f"The bridge {ends} carries less than it should. Power off, reseat it, clean its contacts, and look at "
        "`nvidia-smi nvlink -e` for errors. Until then a replica on this pair exchanges over PCIe."
    )
