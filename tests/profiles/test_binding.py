"""What a replica is bound to: the node its cards hang on and NCCL's settings for its bridges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from apps.profiles import host_facts
from apps.profiles.binding import Binding, NumaHost, bind
from apps.profiles.host_facts import numa_host
from apps.profiles.placement import RigFacts, place
from tests.profiles.test_placement import CROSSED, NEIGHBOURS, rig

TWO_NODES = NumaHost({0: "0-15,32-47", 1: "16-31,48-63"}, numactl=True)
SPLIT = rig((0, 1), (2, 3), numa={0: 0, 1: 0, 2: 1, 3: 1})


def bindings(facts: RigFacts, replicas: int, ranks: int, host: NumaHost | None = TWO_NODES) -> list[Binding]:
    placement = place(facts, replicas=replicas, tensor_parallel_size=ranks)
    return [bind(c, facts, gpus_per_replica=ranks, host=host, speaks_nccl=True) for c in placement.replicas]


def test_each_replica_is_bound_to_the_node_of_its_pair() -> None:
    first, second = bindings(SPLIT, 2, 2)
    assert first.argv_prefix == ("numactl", "--cpunodebind=0", "--preferred=0")
    assert second.argv_prefix == ("numactl", "--cpunodebind=1", "--preferred=1")
    assert "GPUs 2 and 3 hang on NUMA node 1" in second.reasons[0]


def test_without_numactl_the_processors_are_named() -> None:
    (first,) = bindings(SPLIT, 1, 2, NumaHost(TWO_NODES.nodes))
    assert first.argv_prefix == ("taskset", "--cpu-list", "0-15,32-47")
    assert "is not installed" in first.reasons[0]


def test_what_cannot_be_bound_says_why() -> None:
    (four,) = bindings(SPLIT, 1, 4)
    assert four.argv_prefix == ()
    assert "nodes 0 and 1" in four.reasons[0]
    unknown = rig((0, 1), numa={0: None, 1: None})  # type: ignore[dict-item]
    (pair,) = bindings(unknown, 1, 2)
    assert pair.argv_prefix == ()
    assert "does not say which node" in pair.reasons[0]
    for host in (None, NumaHost({0: "0-15"})):
        (quiet,) = bindings(NEIGHBOURS, 1, 2, host)
        assert quiet.argv_prefix == ()
        assert all(reason.startswith("NCCL") for reason in quiet.reasons)


@pytest.mark.parametrize(
    ("facts", "replicas", "ranks", "wanted"),
    [
        (NEIGHBOURS, 1, 4, "NCCL_P2P_LEVEL"),
        (CROSSED, 2, 2, "NCCL_P2P_LEVEL"),
        (rig(), 1, 2, "NCCL_P2P_DISABLE"),
        (rig((0, 1), (2, 3), dead={(0, 1), (2, 3)}), 1, 4, "NCCL_P2P_DISABLE"),
    ],
)
def test_ncc_ls_settings_follow_the_bridges(facts: RigFacts, replicas: int, ranks: int, wanted: str) -> None:
    for binding in bindings(facts, replicas, ranks):
        assert binding.nccl is not None
        assert {"NCCL_P2P_LEVEL", "NCCL_P2P_DISABLE"} & set(binding.nccl) == {wanted}
        assert binding.nccl["NCCL_IB_DISABLE"] == "1"
        assert any(reason.startswith(wanted) for reason in binding.reasons)


def test_one_dead_bridge_disables_only_its_own_replica() -> None:
    first, second = bindings(rig((0, 1), (2, 3), dead={(0, 1)}), 2, 2)
    assert first.nccl is not None
    assert second.nccl is not None
    assert "NCCL_P2P_DISABLE" in first.nccl
    assert "NCCL_P2P_LEVEL" in second.nccl


def test_single_cards_exchange_nothing() -> None:
    assert all(binding.nccl is None for binding in bindings(NEIGHBOURS, 4, 1))


def test_the_kernels_nodes_are_read_here_only(
    tmp_path: Path, db: None, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.factories.rigs import RigFactory

    for node, cpus in ((0, "0-3"), (1, "4-7")):
        (tmp_path / f"node{node}").mkdir()
        (tmp_path / f"node{node}" / "cpulist").write_text(f"{cpus}\n")
    (tmp_path / "possible").write_text("0-1")
    monkeypatch.setattr(host_facts.shutil, "which", lambda _: None)
    real = RigFactory(slug="bench-01", hardware_source="nvml")
    settings.RIG_NAME = "bench-01"
    assert numa_host(real, tmp_path) == NumaHost({0: "0-3", 1: "4-7"})
    assert numa_host(real, tmp_path / "absent") is None
    assert numa_host(RigFactory(slug="other", hardware_source="nvml"), tmp_path) is None
    real.hardware_source = "simulated"
    assert numa_host(real, tmp_path) is None
