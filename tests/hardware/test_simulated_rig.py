"""What runs on the simulated rig, and what can be broken on it."""

from __future__ import annotations

import threading
import time

import pytest

from apps.hardware.protocol import GpuProcess, HardwareError, HostReading
from apps.hardware.simulated import SimulatedDriver, SimulatedRig
from apps.hardware.simulated_slots import MEMORY_FOR_PROCESSES_BYTES, MEMORY_IDLE_BYTES

GIB = 1 << 30


@pytest.fixture
def rig() -> SimulatedRig:
    return SimulatedRig(host=lambda: HostReading(None, None, None))


def share(index: int, memory: int = 10 * GIB, utilization: float = 0.5) -> dict[str, object]:
    return {"index": index, "memory_used_bytes": memory, "utilization": utilization}


def test_the_rig_is_four_3090s_in_two_bridged_pairs(rig: SimulatedRig) -> None:
    inventory = rig.inventory()
    assert inventory.source == "simulated"
    assert [gpu.name for gpu in inventory.gpus] == ["NVIDIA GeForce RTX 3090"] * 4
    assert [gpu.memory_total_bytes for gpu in inventory.gpus] == [24 * GIB] * 4
    indexes = {gpu.uuid: gpu.index for gpu in inventory.gpus}
    assert [(indexes[link.gpu_uuid], indexes[link.peer_uuid or ""]) for link in inventory.links] == [(0, 1), (2, 3)]
    assert [(link.active_lanes, link.total_lanes) for link in inventory.links] == [(4, 4), (4, 4)]


def test_the_pairing_can_be_crossed() -> None:
    inventory = SimulatedRig(pairs=((0, 2), (1, 3))).inventory()
    indexes = {gpu.uuid: gpu.index for gpu in inventory.gpus}
    assert [(indexes[link.gpu_uuid], indexes[link.peer_uuid or ""]) for link in inventory.links] == [(0, 2), (1, 3)]


def test_a_rig_can_be_made_with_a_dead_bridge() -> None:
    rig = SimulatedRig(dead_bridges=((2, 3),))
    assert [link.active_lanes for link in rig.inventory().links] == [4, 0]
    assert [gpu.nvlink_active_lanes for gpu in rig.read().gpus] == [4, 4, 0, 0]


def test_a_card_cannot_have_two_bridges() -> None:
    with pytest.raises(HardwareError, match="one bridge"):
        SimulatedRig(pairs=((0, 1), (1, 2)))


def test_an_unbridged_card_has_no_nvlink_values() -> None:
    card = SimulatedRig(gpu_count=1, pairs=()).read().gpus[0]
    assert (card.nvlink_active_lanes, card.nvlink_tx_bytes, card.nvlink_rx_bytes) == (None, None, None)


def test_cards_keep_their_uuids_over_restarts_and_two_rigs_share_none() -> None:
    first, again, other = (SimulatedRig(name=name).inventory() for name in ("attic", "attic", "cellar"))
    assert [gpu.uuid for gpu in first.gpus] == [gpu.uuid for gpu in again.gpus]
    assert not {gpu.uuid for gpu in first.gpus} & {gpu.uuid for gpu in other.gpus}


def test_a_process_appears_on_its_cards_with_its_memory(rig: SimulatedRig) -> None:
    rig.hold("alice", 4242, "VLLM::Worker", [share(0), share(1)])
    cards = rig.read().gpus
    assert cards[0].processes == cards[1].processes == (GpuProcess(4242, 10 * GIB, "VLLM::Worker"),)
    assert cards[2].processes == ()
    assert cards[0].memory_used_bytes == 10 * GIB + MEMORY_IDLE_BYTES
    assert cards[2].memory_used_bytes == MEMORY_IDLE_BYTES


def test_a_card_can_be_named_by_its_uuid(rig: SimulatedRig) -> None:
    uuid = rig.inventory().gpus[2].uuid
    rig.hold("alice", 1, "x", [{"uuid": uuid, "memory_used_bytes": GIB, "utilization": 0}])
    assert rig.read().gpus[2].processes == (GpuProcess(1, GIB, "x"),)


def test_a_second_hold_of_the_same_owner_replaces_the_first(rig: SimulatedRig) -> None:
    rig.hold("alice", 1, "x", [share(0, 20 * GIB)])
    rig.hold("alice", 1, "x", [share(0, 22 * GIB), share(1)])
    assert [len(gpu.processes or ()) for gpu in rig.read().gpus] == [1, 1, 0, 0]


def test_released_memory_is_free(rig: SimulatedRig) -> None:
    rig.hold("alice", 1, "x", [share(0)])
    rig.release("alice")
    rig.release("alice")
    assert rig.read().gpus[0].memory_used_bytes == MEMORY_IDLE_BYTES


def test_two_owners_share_a_card_until_its_memory_is_full(rig: SimulatedRig) -> None:
    rig.hold("alice", 1, "x", [share(0, 14 * GIB)])
    with pytest.raises(HardwareError, match=r"Out of memory on GPU 0: 14.0 GiB wanted, 9.5 GiB of 23.5 GiB free"):
        rig.hold("bob", 2, "y", [share(1), share(0, 14 * GIB)])
    rig.hold("bob", 2, "y", [share(0, 9 * GIB)])
    assert [process.pid for process in rig.read().gpus[0].processes or ()] == [1, 2]


def test_a_refused_hold_changes_nothing(rig: SimulatedRig) -> None:
    rig.hold("alice", 1, "x", [share(0)])
    with pytest.raises(HardwareError):
        rig.hold("alice", 1, "x", [share(1), share(0, MEMORY_FOR_PROCESSES_BYTES + 1)])
    assert [gpu.memory_used_bytes for gpu in rig.read().gpus][:2] == [10 * GIB + MEMORY_IDLE_BYTES, MEMORY_IDLE_BYTES]


@pytest.mark.parametrize(
    ("pid", "card"),
    [
        (0, share(0)),
        ("12", share(0)),
        (True, share(0)),
        (1, share(4)),
        (1, share(-1)),
        (1, {"index": True}),
        (1, {"uuid": "GPU-of-somebody-else"}),
        (1, {"memory_used_bytes": GIB}),
        (1, share(0, memory=-1)),
        (1, share(0, utilization=1.5)),
        (1, share(0, utilization=float("nan"))),
        (1, "0"),
    ],
)
def test_a_hold_that_makes_no_sense_is_refused_in_words(rig: SimulatedRig, pid: object, card: object) -> None:
    with pytest.raises(HardwareError, match=r"\.$"):
        rig.hold("alice", pid, "x", [card])  # type: ignore[list-item]


def test_one_hold_cannot_name_a_card_twice(rig: SimulatedRig) -> None:
    with pytest.raises(HardwareError, match="twice"):
        rig.hold("alice", 1, "x", [share(0), share(0)])


def test_nothing_can_run_on_a_lost_card(rig: SimulatedRig) -> None:
    rig.fault("lost", 2)
    with pytest.raises(HardwareError, match="GPU 2 has fallen off the bus"):
        rig.hold("alice", 1, "x", [share(2)])


def test_a_lost_card_takes_its_bridge_with_it_and_comes_back_counting_from_zero() -> None:
    now = [1000.0]
    rig = SimulatedRig(now=lambda: now[0])
    now[0] += 100
    assert (rig.read().gpus[0].energy_joules or 0) > 1000
    rig.fault("lost", 0)
    assert [gpu.nvlink_active_lanes for gpu in rig.read().gpus] == [None, 0, 4, 4]
    rig.fault("clear", 0)
    card = rig.read().gpus[0]
    assert not card.lost
    assert card.nvlink_active_lanes == 4
    assert card.energy_joules == 0


def test_a_link_can_train_at_half_its_width(rig: SimulatedRig) -> None:
    rig.fault("width", 1, width=8)
    assert [gpu.pcie_width for gpu in rig.read().gpus] == [16, 8, 16, 16]
    assert rig.inventory().gpus[1].pcie_width_max == 16


def test_an_inactive_lane_is_missing_at_both_ends_of_the_bridge(rig: SimulatedRig) -> None:
    rig.fault("nvlink", 3, lanes=1)
    assert [gpu.nvlink_active_lanes for gpu in rig.read().gpus] == [4, 4, 3, 3]
    assert [link.active_lanes for link in rig.inventory().links] == [4, 3]


def test_clearing_mends_everything(rig: SimulatedRig) -> None:
    rig.fault("width", 0)
    rig.fault("nvlink", 0, lanes=4)
    rig.fault("power_limit", 1, watts=200)
    rig.fault("lost", 2)
    rig.fault("clear")
    cards = rig.read().gpus
    assert [gpu.pcie_width for gpu in cards] == [16] * 4
    assert [gpu.nvlink_active_lanes for gpu in cards] == [4] * 4
    assert [gpu.power_limit_watts for gpu in cards] == [350] * 4


@pytest.mark.parametrize(
    ("kind", "gpu", "details"),
    [
        ("explode", 0, {}),
        ("lost", None, {}),
        ("lost", 9, {}),
        ("width", 0, {"width": 3}),
        ("nvlink", 0, {"lanes": 5}),
        ("fan", 0, {"percent": "full"}),
        ("power_limit", 0, {"watts": 50}),
        ("hang", None, {"seconds": 1e9}),
    ],
)
def test_a_fault_that_makes_no_sense_is_refused_in_words(
    rig: SimulatedRig, kind: str, gpu: int | None, details: dict[str, float]
) -> None:
    with pytest.raises(HardwareError, match=r"\.$"):
        rig.fault(kind, gpu, **details)  # type: ignore[arg-type]


def test_a_card_without_a_bridge_cannot_lose_lanes() -> None:
    with pytest.raises(HardwareError, match="no NVLink bridge"):
        SimulatedRig(gpu_count=2, pairs=()).fault("nvlink", 0)


def test_a_hang_blocks_readings_until_it_is_cleared_but_not_the_engines(rig: SimulatedRig) -> None:
    rig.fault("hang", seconds=600)
    done = threading.Event()

    def read() -> None:
        rig.read()
        done.set()

    threading.Thread(target=read, daemon=True).start()
    assert not done.wait(0.3)
    rig.hold("alice", 1, "x", [share(0)])
    rig.fault("clear")
    assert done.wait(30)


def test_a_hang_ends_by_itself(rig: SimulatedRig) -> None:
    rig.fault("hang", seconds=0.2)
    started_at = time.monotonic()
    rig.read()
    assert time.monotonic() - started_at >= 0.15
    assert not rig.read().gpus[0].lost


def test_closing_the_driver_frees_a_reading_that_hangs(rig: SimulatedRig) -> None:
    driver = SimulatedDriver(rig)
    rig.fault("hang", seconds=600)
    reader = threading.Thread(target=driver.read, daemon=True)
    reader.start()
    driver.close()
    reader.join(30)
    assert not reader.is_alive()
