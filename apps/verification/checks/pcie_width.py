"""Does every card use all lanes that card and slot have?

Safe at idle: the width stays while a card sleeps, only the generation drops, so the generation is not judged here. The
width is compared with what card and upstream port can do: a slot that is wired with fewer lanes is a limit of the
board, not a fault.
"""

from __future__ import annotations

from pathlib import Path

from apps.verification.judging import CheckContext, Data, Judgement, named, same_or_list
from apps.verification.models import Verdict

NAME = "pcie_width"
TITLE = "PCIe width"
NEEDS_CARDS = True
DEFAULT_WIDTH = 16


def collect(context: CheckContext) -> Data:
    cards = []
    for gpu in context.cards.gpus:
        reading = context.reading_of(gpu.uuid)
        device = None if context.simulated else device_folder(context.sysfs, gpu.pci_bus_id)
        width = reading.pcie_width if reading else None
        cards.append(
            {
                "index": gpu.index,
                "uuid": gpu.uuid,
                "width": width if width is not None else number_in(device, "current_link_width"),
                "card_max": gpu.pcie_width_max or number_in(device, "max_link_width"),
                "port_max": number_in(device.resolve().parent if device else None, "max_link_width"),
                "gen": reading.pcie_gen if reading else None,
                "gen_max": gpu.pcie_gen_max,
            }
        )
    return {"cards": cards}


def device_folder(sysfs: Path, pci_bus_id: str | None) -> Path | None:
    """NVML writes the domain with eight digits, sysfs with four."""
    if not pci_bus_id:
        return None
    domain, _, rest = pci_bus_id.lower().partition(":")
    folder = sysfs / "bus" / "pci" / "devices" / f"{domain[-4:]}:{rest}"
    return folder if folder.exists() else None


def number_in(folder: Path | None, name: str) -> int | None:
    """A whole number above 0; sysfs says 0, 255 or "Unknown" where it does not know."""
    if folder is None:
        return None
    try:
        value = int((folder / name).read_text().strip())
    except (OSError, ValueError):
        return None
    return value if 0 < value < 64 else None


def judge(data: Data, accepted: Data | None) -> Judgement:
    cards = data["cards"]
    if not cards:
        return Judgement(
            Verdict.FAIL, f"x{DEFAULT_WIDTH}", "no cards", "There is no card to ask; see the number of GPUs."
        )
    before = {c["uuid"]: c["width"] for c in accepted["cards"]} if accepted else {}
    wanted = {c["index"]: _wanted(c) for c in cards}
    widths = {c["index"]: c["width"] for c in cards}
    expected = same_or_list({i: f"x{w}" for i, w in wanted.items()})
    measured = same_or_list({i: "not reported" if w is None else f"x{w}" for i, w in widths.items()})
    gens = {c["gen"] for c in cards if c["gen"] is not None}
    if gens:
        measured += f" (generation {min(gens)} now; it drops at idle and is not judged)"
    if narrow := [i for i, w in widths.items() if w is not None and w < wanted[i]]:
        advice = (
            f"{named(narrow)} uses fewer lanes than card and slot have. Reseat card and riser, clean the "
            "contacts, and look for lane sharing in the firmware's settings: half the lanes cost tensor parallel "
            "serving about 15 % and more."
        )
        return Judgement(Verdict.FAIL, expected, measured, advice)
    if unknown := [i for i, w in widths.items() if w is None]:
        return Judgement(Verdict.UNKNOWN, expected, measured, f"{named(unknown)} does not report its width.")
    limited = [c["index"] for c in cards if c["width"] < DEFAULT_WIDTH and before.get(c["uuid"]) != c["width"]]
    if limited:
        advice = (
            f"The slot of {named(limited)} has fewer than {DEFAULT_WIDTH} lanes: a limit of the board, not a fault. "
            "Use a full slot if there is one, or accept this run as normal."
        )
        return Judgement(Verdict.WARN, expected, measured, advice)
    return Judgement(Verdict.PASS, expected, measured)


def _wanted(card: Data) -> int:
    limits = [limit for limit in (card["card_max"], card["port_max"]) if limit is not None]
    return min(limits, default=DEFAULT_WIDTH)
