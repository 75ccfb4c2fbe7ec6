"""Are all cards near the same memory?"""

from __future__ import annotations

from apps.verification.checks.pcie_width import device_folder
from apps.verification.judging import CheckContext, Data, Judgement, same_or_list
from apps.verification.models import Verdict

NAME = "numa_node"
TITLE = "NUMA node"
NEEDS_CARDS = True


def collect(context: CheckContext) -> Data:
    nodes = context.sysfs / "devices" / "system" / "node"
    count = len([n for n in nodes.glob("node[0-9]*") if n.is_dir()])
    cards = []
    for gpu in context.cards.gpus:
        node = gpu.numa_node
        if node is None and not context.simulated and (folder := device_folder(context.sysfs, gpu.pci_bus_id)):
            try:
                node = int((folder / "numa_node").read_text().strip())
            except (OSError, ValueError):
                node = None
        cards.append({"index": gpu.index, "node": node if node is not None and node >= 0 else None})  # -1: not known
    return {"cards": cards, "host_nodes": None if context.simulated else count or None}


def judge(data: Data, accepted: Data | None) -> Judgement:
    expected = "one node for all"
    nodes = {c["index"]: c["node"] for c in data["cards"]}
    if not nodes:
        return Judgement(Verdict.FAIL, expected, "no cards", "There is no card to ask; see the number of GPUs.")
    measured = same_or_list({i: "not reported" if n is None else f"node {n}" for i, n in nodes.items()})
    known = {n for n in nodes.values() if n is not None}
    if len(known) > 1:
        same = accepted is not None and {c["index"]: c["node"] for c in accepted["cards"]} == nodes
        advice = (
            "The cards hang on different processors or quadrants: traffic between them is slower, and an engine "
            "on the wrong node can lose 30 % silently. On a single-socket EPYC set NPS1 in the firmware; else "
            "keep each replica on one node."
        )
        return Judgement(
            Verdict.PASS if same else Verdict.WARN,
            "as accepted" if same else expected,
            measured,
            "" if same else advice,
        )
    if not known:
        if data["host_nodes"] == 1:
            return Judgement(Verdict.PASS, expected, "the machine has one node")
        return Judgement(
            Verdict.UNKNOWN, expected, measured, "The firmware does not say; on one processor that is harmless."
        )
    return Judgement(Verdict.PASS, expected, measured)
