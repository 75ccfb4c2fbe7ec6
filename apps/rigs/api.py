"""Rigs in the API: what is in them."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from django.db.models import QuerySet
from django.http import HttpRequest
from ninja import Router, Schema
from ninja.pagination import paginate

from apps.common.api import Paged, needs
from apps.common.roles import Role
from apps.rigs.models import Gpu, Link, Rig
from apps.rigs.selectors import gpu_list, rig_get

router = Router(tags=["rigs"])


class PcieOut(Schema):
    bus_id: str | None
    width_max: int | None
    gen_max: int | None


class GpuOut(Schema):
    """``present`` is false for a card that was there once and is gone."""

    index: int
    uuid: str
    name: str
    memory_total_bytes: int | None
    pcie: PcieOut
    numa_node: int | None
    present: bool

    @staticmethod
    def resolve_pcie(gpu: Gpu) -> dict[str, Any]:
        return {"bus_id": gpu.pci_bus_id or None, "width_max": gpu.pcie_width_max, "gen_max": gpu.pcie_gen_max}


class LinkOut(Schema):
    """``first`` and ``second`` are indices of cards; ``second`` is null when the far end was not reported."""

    first: int
    second: int | None
    active_lanes: int
    total_lanes: int
    gigabytes_per_second: float | None

    @staticmethod
    def resolve_first(link: Link) -> int:
        return link.first.index

    @staticmethod
    def resolve_second(link: Link) -> int | None:
        return link.second.index if link.second else None


class RigOut(Schema):
    id: int
    slug: str
    hardware_source: str | None
    hardware_error: str | None
    is_simulated: bool
    driver_version: str | None
    cuda_version: str | None
    host_memory_bytes: int | None
    cpu_count: int | None
    inventory_at: datetime | None
    gpus: list[GpuOut]
    links: list[LinkOut]

    @staticmethod
    def resolve_gpus(rig: Rig) -> list[Gpu]:
        return list(gpu_list(rig))

    @staticmethod
    def resolve_links(rig: Rig) -> list[Link]:
        return list(rig.links.select_related("first", "second").order_by("pk"))

    @staticmethod
    def resolve_hardware_source(rig: Rig) -> str | None:
        return rig.hardware_source or None

    @staticmethod
    def resolve_hardware_error(rig: Rig) -> str | None:
        return rig.hardware_error or None

    @staticmethod
    def resolve_driver_version(rig: Rig) -> str | None:
        return rig.driver_version or None

    @staticmethod
    def resolve_cuda_version(rig: Rig) -> str | None:
        return rig.cuda_version or None


@router.get("/rigs", response=list[RigOut], auth=needs(Role.VIEWER), summary="List rigs")
@paginate(Paged)
def list_rigs(request: HttpRequest) -> QuerySet[Rig]:
    return Rig.objects.order_by("slug")


@router.get("/rigs/{rig}", response=RigOut, auth=needs(Role.VIEWER), summary="One rig: cards and bridges")
def get_rig(request: HttpRequest, rig: str) -> Rig:
    return rig_get(rig)
