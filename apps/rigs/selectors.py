"""Reads of rigs and cards."""

from __future__ import annotations

from django.conf import settings
from django.db.models import QuerySet

from apps.common.errors import NotFound
from apps.rigs.models import Gpu, Link, Rig


def rig_get(reference: str | int) -> Rig:
    """By slug or id. Raises NotFound."""
    query = {"pk": int(reference)} if str(reference).isdecimal() else {"slug": str(reference)}
    rig = Rig.objects.filter(**query).first()
    if rig is None:
        raise NotFound(f"There is no rig {reference!r}.")
    return rig


def rig_here() -> Rig:
    """This machine's rig; its row is made on first use."""
    rig, _ = Rig.objects.get_or_create(slug=settings.RIG_NAME)
    return rig


def rig_default() -> Rig:
    """The rig that the pages show: this machine's own if it has a row, else the first."""
    return Rig.objects.filter(slug=settings.RIG_NAME).first() or Rig.objects.order_by("pk").first() or rig_here()


def gpu_list(rig: Rig) -> QuerySet[Gpu]:
    """Cards by index, the missing ones too."""
    return rig.gpus.filter(retired_at=None).order_by("index", "pk")


def gpus_in_slot_order(rig: Rig) -> list[Gpu]:
    """As they stand in the machine. The driver renumbers its cards when one falls off, the PCI bus does
    not: a missing card keeps its place where every card's bus id is known."""
    gpus = list(gpu_list(rig))
    return sorted(gpus, key=lambda g: g.pci_bus_id.lower()) if all(g.pci_bus_id for g in gpus) else gpus


def link_list(rig: Rig) -> list[Link]:
    """The bridges between cards that are not retired."""
    links = rig.links.select_related("first", "second").filter(first__retired_at=None, second__retired_at=None)
    return list(links.order_by("first__index", "pk"))
