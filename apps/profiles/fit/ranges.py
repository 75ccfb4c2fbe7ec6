"""Bytes between a low and a high. Pure."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Range:
    """Bytes, low and high."""

    low: int
    high: int

    def __add__(self, other: Range) -> Range:
        return Range(self.low + other.low, self.high + other.high)

    @property
    def middle(self) -> int:
        return (self.low + self.high) // 2

    @property
    def width(self) -> int:
        return self.high - self.low

    @staticmethod
    def exactly(value: int) -> Range:
        return Range(value, value)


ZERO = Range(0, 0)


def no_wider(value: Range, limit: int) -> Range:
    """Cut a range to ``limit`` around its middle: wider it would be of no use to anybody."""
    if value.width <= limit:
        return value
    middle = (value.low + value.high) // 2
    return Range(middle - limit // 2, middle + limit // 2)
