"""The checks, one module each: ``collect`` reads the rig, ``judge`` compares. Judging is pure.

A module has ``NAME``, ``TITLE``, ``NEEDS_CARDS``, ``collect(context)`` and ``judge(data, accepted)``.
``data`` is plain JSON; ``accepted`` is the data of the run that people accepted as this rig's normal, or None.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Protocol, cast

from apps.common.errors import NotFound
from apps.verification.judging import CheckContext, Data, Judgement


class Check(Protocol):
    NAME: str
    TITLE: str
    NEEDS_CARDS: bool  # whether it reads the cards through the sampler

    def collect(self, context: CheckContext) -> Data: ...

    def judge(self, data: Data, accepted: Data | None) -> Judgement: ...


SUITES: Mapping[str, tuple[str, ...]] = {
    "quick": (
        "gpu_count",
        "gpu_memory",
        "driver",
        "pcie_width",
        "nvlink_pairs",
        "numa_node",
        "persistence",
        "disk_space",
        "host_memory",
    ),
}


def check_get(name: str) -> Check:
    return cast(Check, import_module(f"apps.verification.checks.{name}"))


def suite_checks(suite: str) -> list[Check]:
    """The checks of a suite in order. Raises NotFound."""
    if suite not in SUITES:
        raise NotFound(f"There is no suite {suite[:40]!r}; there is: {', '.join(SUITES)}.", code="unknown_suite")
    return [check_get(name) for name in SUITES[suite]]
