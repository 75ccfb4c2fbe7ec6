"""The rows of cards and bridges follow what the driver reports."""

from __future__ import annotations

from dataclasses import replace

import pytest

from apps.hardware.protocol import Inventory
from apps.hardware.simulated import SimulatedRig
from apps.rigs.models import Gpu, Link, Rig
from apps.rigs.selectors import gpus_in_slot_order, link_list
from apps.rigs.services import hardware_failed, inventory_sync

pytestmark = pytest.mark.django_db


@pytest.fixture
def bench() -> Rig:
    return Rig.objects.create(slug="bench-01")


def inventory(**options: object) -> Inventory:
    return SimulatedRig(name="bench-01", **options).inventory()  # type: ignore[arg-type]


def without(found: Inventory, index: int, *, renumber: bool = False) -> Inventory:
    """As a driver lists its cards after one fell off: it may number the rest anew."""
    uuid = found.gpus[index].uuid
    gpus = [g for g in found.gpus if g.uuid != uuid]
    if renumber:
        gpus = [replace(g, index=i) for i, g in enumerate(gpus)]
    return replace(
        found, gpus=tuple(gpus), links=tuple(k for k in found.links if uuid not in (k.gpu_uuid, k.peer_uuid))
    )


def test_four_cards_and_two_bridges_are_written_once(bench: Rig) -> None:
    change = inventory_sync(bench, inventory())
    assert len(change.appeared) == 4
    assert inventory_sync(bench, inventory()).appeared == ()
    assert Gpu.objects.count() == 4
    assert Link.objects.count() == 2


def test_a_card_that_is_not_listed_any_more_stays_in_its_slot(bench: Rig) -> None:
    inventory_sync(bench, inventory())
    change = inventory_sync(bench, without(inventory(), 1, renumber=True))
    assert len(change.missing) == 1
    cards = gpus_in_slot_order(bench)
    assert [g.present for g in cards] == [True, False, True, True]
    assert len(link_list(bench)) == 2
    assert [k.active_lanes for k in link_list(bench)] == [0, 4]


def test_a_card_that_stops_answering_is_missing_although_it_is_listed(bench: Rig) -> None:
    found = inventory()
    inventory_sync(bench, found)
    inventory_sync(bench, found, lost=[found.gpus[3].uuid])
    gone = Gpu.objects.get(uuid=found.gpus[3].uuid)
    assert not gone.present
    assert gone.name == "NVIDIA GeForce RTX 3090"


def test_another_card_in_the_same_slot_retires_the_old_one(bench: Rig) -> None:
    found = inventory()
    inventory_sync(bench, found)
    swapped = replace(found, gpus=(*found.gpus[:3], replace(found.gpus[3], uuid="GPU-new")), links=found.links[:1])
    change = inventory_sync(bench, swapped)
    assert change.retired == (found.gpus[3].uuid,)
    assert change.missing == ()
    assert [g.uuid for g in gpus_in_slot_order(bench)][3] == "GPU-new"
    assert len(gpus_in_slot_order(bench)) == 4


def test_simulated_cards_do_not_stand_as_missing_beside_real_ones(bench: Rig) -> None:
    inventory_sync(bench, inventory())
    real = SimulatedRig(name="other", gpu_count=2, pairs=((0, 1),)).inventory()
    inventory_sync(bench, replace(real, source="nvml"))
    assert len(gpus_in_slot_order(bench)) == 2
    assert all(g.present for g in gpus_in_slot_order(bench))
    assert bench.ran_nvml


def test_a_dead_bridge_shows_its_lanes(bench: Rig) -> None:
    inventory_sync(bench, inventory(dead_bridges=((2, 3),)))
    assert [k.active_lanes for k in link_list(bench)] == [4, 0]


def test_a_driver_failure_is_remembered_until_the_cards_are_read_again(bench: Rig) -> None:
    inventory_sync(bench, inventory())
    hardware_failed(bench, "simulated", "The driver does not answer.")
    assert Rig.objects.get().hardware_error == "The driver does not answer."
    assert Gpu.objects.filter(present=True).count() == 4
    inventory_sync(bench, inventory())
    assert Rig.objects.get().hardware_error == ""
