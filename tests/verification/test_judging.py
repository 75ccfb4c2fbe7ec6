"""What each check makes of what was found. Judging is pure: data in, verdict and words out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from apps.verification.checks import SUITES, check_get, suite_checks
from apps.verification.checks.pcie_width import device_folder, number_in
from apps.verification.judging import Judgement
from apps.verification.models import Verdict

GIB = 2**30


def judge(name: str, data: dict[str, Any], accepted: dict[str, Any] | None = None) -> Judgement:
    return check_get(name).judge(data, accepted)


def cards(**columns: list[Any]) -> dict[str, Any]:
    count = len(next(iter(columns.values())))
    return {"cards": [{"index": i, "uuid": f"GPU-{i}"} | {k: v[i] for k, v in columns.items()} for i in range(count)]}


def test_the_quick_suite_has_its_nine_checks_each_with_a_title() -> None:
    assert [c.NAME for c in suite_checks("quick")] == list(SUITES["quick"])
    assert len({c.TITLE for c in suite_checks("quick")}) == 9


@pytest.mark.parametrize(
    ("present", "lost", "accepted", "verdict", "words"),
    [
        (4, [], None, Verdict.PASS, ""),
        (3, [], None, Verdict.FAIL, "undersized supply"),
        (3, [2], None, Verdict.FAIL, "GPU 2 no longer answers"),
        (5, [], None, Verdict.WARN, "more cards than expected"),
        (1, [], 1, Verdict.PASS, ""),
        (1, [], 2, Verdict.FAIL, "1 fewer than expected"),
    ],
)
def test_gpu_count(present: int, lost: list[int], accepted: int | None, verdict: Verdict, words: str) -> None:
    data = {"present": [f"GPU-{i}" for i in range(present)], "lost": lost, "missing": []}
    before = {"present": [f"GPU-{i}" for i in range(accepted)]} if accepted is not None else None
    judgement = judge("gpu_count", data, before)
    assert judgement.verdict == verdict
    assert words in judgement.advice


def test_an_exchanged_card_is_noticed() -> None:
    judgement = judge("gpu_count", {"present": ["GPU-new"], "lost": [], "missing": [0]}, {"present": ["GPU-old"]})
    assert (judgement.verdict, judgement.expected) == (Verdict.WARN, "1, the accepted ones")


def test_a_card_with_less_memory_is_a_look_at_first_and_a_failure_once_more_was_accepted() -> None:
    full, small = 24576 * 2**20, 12 * GIB
    assert judge("gpu_memory", cards(bytes=[full] * 4)).verdict == Verdict.PASS
    assert judge("gpu_memory", cards(bytes=[full] * 4)).measured == "24.0 GiB on all 4"
    judgement = judge("gpu_memory", cards(bytes=[full, small]))
    assert judgement.verdict == Verdict.WARN
    assert "GPU 1 has less memory" in judgement.advice
    assert judge("gpu_memory", cards(bytes=[full, small]), cards(bytes=[full, full])).verdict == Verdict.FAIL
    assert judge("gpu_memory", cards(bytes=[small]), cards(bytes=[small])).verdict == Verdict.PASS
    assert judge("gpu_memory", cards(bytes=[full, None])).verdict == Verdict.UNKNOWN


@pytest.mark.parametrize(
    ("driver", "accepted", "verdict"),
    [
        ("610.43", None, Verdict.PASS),
        ("560.35.03", None, Verdict.PASS),
        ("550.90", None, Verdict.FAIL),
        (None, None, Verdict.UNKNOWN),
        ("610.43", "610.43", Verdict.PASS),
        ("615.01", "610.43", Verdict.WARN),
    ],
)
def test_driver(driver: str | None, accepted: str | None, verdict: Verdict) -> None:
    judgement = judge("driver", {"driver": driver, "cuda": None}, {"driver": accepted} if accepted else None)
    assert judgement.verdict == verdict


def lanes(
    width: list[int | None], card_max: int | None = 16, port_max: int | None = 16, gen: int | None = 1
) -> dict[str, Any]:
    n = len(width)
    return cards(width=width, card_max=[card_max] * n, port_max=[port_max] * n, gen=[gen] * n, gen_max=[4] * n)


def test_an_idle_card_at_generation_1_passes_because_only_the_width_is_judged() -> None:
    judgement = judge("pcie_width", lanes([16] * 4))
    assert judgement.verdict == Verdict.PASS
    assert "x16 on all 4" in judgement.measured
    assert "generation 1 now" in judgement.measured


def test_a_card_that_lost_lanes_fails_and_is_named() -> None:
    judgement = judge("pcie_width", lanes([16, 8, 16, 16]))
    assert (judgement.verdict, judgement.expected) == (Verdict.FAIL, "x16 on all 4")
    assert "GPU 1 uses fewer lanes" in judgement.advice


def test_a_slot_wired_with_eight_lanes_is_a_limit_of_the_board_and_passes_once_accepted() -> None:
    narrow = lanes([8, 8], port_max=8)
    judgement = judge("pcie_width", narrow)
    assert judgement.verdict == Verdict.WARN
    assert "a limit of the board, not a fault" in judgement.advice
    assert judge("pcie_width", narrow, narrow).verdict == Verdict.PASS


def test_a_card_that_lost_lanes_in_a_narrow_slot_fails_even_where_the_slot_was_accepted() -> None:
    assert judge("pcie_width", lanes([4, 8], port_max=8), lanes([8, 8], port_max=8)).verdict == Verdict.FAIL


def test_a_width_that_nobody_reports_is_not_known_rather_than_fine() -> None:
    assert judge("pcie_width", lanes([16, None], card_max=None, port_max=None)).verdict == Verdict.UNKNOWN


def test_sysfs_is_read_for_card_and_port_and_odd_values_are_not_known(tmp_path: Path) -> None:
    port = tmp_path / "devices" / "pci0000:00" / "0000:00:01.0"
    card = port / "0000:41:00.0"
    card.mkdir(parents=True)
    (tmp_path / "bus" / "pci" / "devices").mkdir(parents=True)
    (tmp_path / "bus" / "pci" / "devices" / "0000:41:00.0").symlink_to(card)
    (card / "current_link_width").write_text("8\n")
    (card / "max_link_width").write_text("255\n")
    (port / "max_link_width").write_text("8\n")
    folder = device_folder(tmp_path, "00000000:41:00.0")
    assert folder is not None
    assert number_in(folder, "current_link_width") == 8
    assert number_in(folder, "max_link_width") is None
    assert number_in(folder.resolve().parent, "max_link_width") == 8
    assert number_in(folder, "no_such_file") is None
    assert device_folder(tmp_path, "00000000:99:00.0") is None


def pair(first: int, second: int, active: int = 4) -> dict[str, Any]:
    uuids = [f"GPU-{first}", f"GPU-{second}"]
    return {"uuids": uuids, "gpus": [first, second], "active": active, "total": 4, "gb_per_s": 14.0625}


def bridges(*pairs: dict[str, Any], gpus: int = 4) -> dict[str, Any]:
    return {"gpus": gpus, "pairs": list(pairs)}


@pytest.mark.parametrize("pairing", [((0, 1), (2, 3)), ((0, 2), (1, 3))])
def test_two_whole_bridges_pass_wherever_they_are(pairing: tuple[tuple[int, int], ...]) -> None:
    judgement = judge("nvlink_pairs", bridges(*(pair(*p) for p in pairing)))
    assert judgement.verdict == Verdict.PASS
    assert "4 of 4 lanes, 56 GB/s" in judgement.measured


def test_a_bridge_with_a_dead_lane_fails_and_says_which() -> None:
    judgement = judge("nvlink_pairs", bridges(pair(0, 1), pair(2, 3, active=3)))
    assert judgement.verdict == Verdict.FAIL
    assert "bridge 2-3 carries less" in judgement.advice


def test_a_bridge_that_vanished_fails_once_it_was_accepted_and_is_a_look_at_before() -> None:
    both, one = bridges(pair(0, 1), pair(2, 3)), bridges(pair(0, 1))
    assert judge("nvlink_pairs", one).verdict == Verdict.WARN
    assert judge("nvlink_pairs", one, both).verdict == Verdict.FAIL
    assert judge("nvlink_pairs", one, one).verdict == Verdict.PASS
    assert judge("nvlink_pairs", both, one).verdict == Verdict.WARN
    assert judge("nvlink_pairs", bridges(gpus=1)).verdict == Verdict.PASS


def test_numa_nodes() -> None:
    def nodes(*found: int | None, host: int | None = 1) -> dict[str, Any]:
        return cards(node=list(found)) | {"host_nodes": host}

    assert judge("numa_node", nodes(0, 0, 0, 0)).verdict == Verdict.PASS
    split = judge("numa_node", nodes(0, 0, 1, 1, host=2))
    assert split.verdict == Verdict.WARN
    assert "NPS1" in split.advice
    assert judge("numa_node", nodes(0, 1, host=2), nodes(0, 1, host=2)).verdict == Verdict.PASS
    assert judge("numa_node", nodes(None, None)).verdict == Verdict.PASS
    assert judge("numa_node", nodes(None, None, host=2)).verdict == Verdict.UNKNOWN


def test_persistence() -> None:
    assert judge("persistence", cards(on=[True] * 4)).verdict == Verdict.PASS
    off = judge("persistence", cards(on=[True, False]))
    assert off.verdict == Verdict.WARN
    assert "GPU 1" in off.advice
    assert judge("persistence", cards(on=[True, None])).verdict == Verdict.UNKNOWN


@pytest.mark.parametrize(("free", "verdict"), [(200, Verdict.PASS), (30, Verdict.WARN), (2, Verdict.FAIL)])
def test_disk_space_goes_by_the_fuller_disk(free: int, verdict: Verdict) -> None:
    roomy = {"what": "data", "path": "/srv", "free": 10**12, "total": 2 * 10**12}
    places = [{"what": "models", "path": "/srv/models", "free": free * 10**9, "total": 10**12}, roomy]
    assert judge("disk_space", {"places": places}).verdict == verdict


def test_host_memory() -> None:
    def memory(total: int, available: int, simulated: bool = False) -> dict[str, Any]:
        return {"simulated": simulated, "total": total * GIB, "available": available * GIB}

    assert judge("host_memory", memory(128, 100)).verdict == Verdict.PASS
    assert judge("host_memory", memory(16, 10)).verdict == Verdict.WARN
    assert judge("host_memory", memory(16, 10, simulated=True)).verdict == Verdict.PASS
    assert judge("host_memory", memory(128, 3)).verdict == Verdict.WARN
    assert judge("host_memory", memory(96, 80), memory(128, 80)).verdict == Verdict.FAIL


@pytest.mark.parametrize("name", ["gpu_memory", "pcie_width", "numa_node", "persistence"])
def test_without_any_card_nothing_passes(name: str) -> None:
    assert judge(name, {"cards": [], "host_nodes": 1}).verdict == Verdict.FAIL
