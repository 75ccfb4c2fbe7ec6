"""Reads the Prometheus text format as engines print it; odd lines are skipped, never raised."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

SAMPLE = re.compile(r"^([A-Za-z_:][A-Za-z0-9_:]*)(?:\{(.*)\})?\s+(\S+)(?:\s+-?\d+)?\s*$")
LABEL = re.compile(r'([A-Za-z_][A-Za-z0-9_]*)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True, slots=True)
class Sample:
    name: str
    labels: dict[str, str]
    value: float


class Exposition:
    """All samples of one scrape. Names are asked for without ``_total``: engines differ in
    whether a counter carries it, and both spellings are found."""

    def __init__(self, text: str) -> None:
        self.by_name: dict[str, list[Sample]] = {}
        for sample in _samples(text):
            self.by_name.setdefault(sample.name, []).append(sample)

    def samples(self, name: str) -> list[Sample]:
        return self.by_name.get(name) or self.by_name.get(f"{name}_total", [])

    def total(self, name: str) -> float | None:
        """The sum over all label sets (one per engine of a data-parallel group)."""
        samples = self.samples(name)
        return sum(s.value for s in samples) if samples else None

    def mean(self, name: str) -> float | None:
        samples = self.samples(name)
        return sum(s.value for s in samples) / len(samples) if samples else None

    def label_total(self, name: str, label: str) -> int | None:
        """The sum of an integer that is carried as a label of an info metric."""
        values = [int(v) for s in self.samples(name) if (v := s.labels.get(label, "")).isdigit()]
        return sum(values) if values else None


def _samples(text: str) -> Iterator[Sample]:
    for line in text.splitlines():
        match = SAMPLE.match(line)
        if match is None:
            continue
        try:
            value = float(match[3])
        except ValueError:
            continue
        if value != value:  # NaN says nothing
            continue
        yield Sample(match[1], dict(LABEL.findall(match[2] or "")), value)
