"""Keeps the rows of rigs, cards and bridges equal to what the driver reports."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime

import psutil
from django.db import transaction
from django.utils import timezone

from apps.common.realtime import page_changed
from apps.hardware.protocol import GpuInfo, Inventory
from apps.rigs.models import Gpu, Link, Rig

# What a row takes from GpuInfo as it is; None stays None, text columns get "".
CARD_FACTS = (
    "index",
    "name",
    "memory_total_bytes",
    "memory_reserved_bytes",
    "pcie_width_max",
    "pcie_gen_max",
    "numa_node",
    "power_limit_default_watts",
    "power_limit_min_watts",
    "power_limit_max_watts",
    "temperature_slowdown_celsius",
    "temperature_shutdown_celsius",
    "persistence_mode",
)


@dataclass(frozen=True, slots=True)
class InventoryChange:
    """UUIDs of cards that came, went missing or were replaced since the last look."""

    appeared: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    retired: tuple[str, ...] = ()


def inventory_sync(
    rig: Rig, inventory: Inventory, lost: Collection[str] = (), *, seen_until: datetime | None = None
) -> InventoryChange:
    """Write what the driver reports; ``lost`` are cards it lists but that no longer answer. ``seen_until`` is
    when those that are missing now were read last, where the caller read them itself.

    A card that is gone keeps its row and its slot with ``present`` false. It is retired when another
    card sits at its PCI address, or when the hardware's source changed: simulated cards must not
    stand as "missing" beside real ones.
    """
    now = timezone.now()
    with transaction.atomic():
        source_changed = rig.hardware_source not in ("", inventory.source)
        rows = {g.uuid: g for g in rig.gpus.all()}
        present_before = {u for u, g in rows.items() if g.present and g.retired_at is None}
        present_now = {info.uuid for info in inventory.gpus if info.uuid not in lost}
        taken = {info.pci_bus_id for info in inventory.gpus if info.pci_bus_id and info.uuid in present_now}
        for info in inventory.gpus:
            is_present = info.uuid in present_now
            values = _card_values(info) | {"present": is_present, "retired_at": None}
            if is_present:
                values["last_seen_at"] = now
            elif info.uuid in rows:
                # A card that does not answer reports nothing either: what it was stays known.
                values = {"present": False, "retired_at": None}
            Gpu.objects.update_or_create(rig=rig, uuid=info.uuid, defaults=values)
        listed = {info.uuid for info in inventory.gpus}
        gone = [g for u, g in rows.items() if u not in listed and g.retired_at is None]
        retired = [g for g in gone if source_changed or (g.pci_bus_id and g.pci_bus_id in taken)]
        Gpu.objects.filter(pk__in=[g.pk for g in gone]).update(present=False)
        if seen_until is not None:
            just_gone = present_before - present_now
            Gpu.objects.filter(rig=rig, uuid__in=just_gone).update(last_seen_at=seen_until)
        Gpu.objects.filter(pk__in=[g.pk for g in retired]).update(retired_at=now)
        _sync_links(rig, inventory)
        rig.hardware_source = inventory.source
        rig.hardware_error = ""
        rig.ran_nvml = rig.ran_nvml or inventory.source == "nvml"
        rig.driver_version = inventory.driver_version or ""
        rig.cuda_version = inventory.cuda_version or ""
        rig.host_memory_bytes = psutil.virtual_memory().total
        rig.cpu_count = psutil.cpu_count()
        rig.inventory_at = now
        rig.save()
        page_changed("rig", rig=rig.pk)
    return InventoryChange(
        appeared=tuple(sorted(present_now - present_before)),
        missing=tuple(sorted(present_before - present_now - {g.uuid for g in retired})),
        retired=tuple(sorted(g.uuid for g in retired)),
    )


def hardware_failed(rig: Rig, source: str, sentence: str) -> None:
    """The driver cannot be read: say so. Cards keep what was known; nothing is made up in their place."""
    with transaction.atomic():
        Rig.objects.filter(pk=rig.pk).update(
            hardware_source=source or rig.hardware_source, hardware_error=sentence[:1000]
        )
        rig.refresh_from_db()
        page_changed("rig", rig=rig.pk)


def _card_values(info: GpuInfo) -> dict[str, object]:
    values: dict[str, object] = {name: getattr(info, name) for name in CARD_FACTS}
    return values | {"pci_bus_id": info.pci_bus_id or "", "compute_capability": info.compute_capability or ""}


def _sync_links(rig: Rig, inventory: Inventory) -> None:
    """Replace the bridges when they differ. One whose card is missing stays: the bridge is still there."""
    gpus = {g.uuid: g for g in rig.gpus.all()}
    reported = {
        (link.gpu_uuid, link.peer_uuid): (link.active_lanes, link.total_lanes, link.gigabytes_per_second_per_lane)
        for link in inventory.links
    }
    stored = {
        (link.first.uuid, link.second.uuid if link.second else None): link
        for link in rig.links.select_related("first", "second")
    }
    for pair, link in stored.items():
        ends = [gpus[u] for u in pair if u is not None]
        if pair not in reported:
            if all(g.present for g in ends):
                link.delete()
            elif link.active_lanes:
                Link.objects.filter(pk=link.pk).update(active_lanes=0)
    for (first, second), (active, total, speed) in reported.items():
        if first not in gpus:
            continue
        values = {"active_lanes": active, "total_lanes": total, "gigabytes_per_second_per_lane": speed}
        Link.objects.update_or_create(rig=rig, first=gpus[first], second=gpus.get(second or ""), defaults=values)
