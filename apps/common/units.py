"""Numbers as people read them: units always, thin space in thousands."""

from __future__ import annotations

THIN_SPACE = "\u2009"


def thousands(value: float, digits: int = 0) -> str:
    return f"{value:,.{digits}f}".replace(",", THIN_SPACE)


def gib(value_bytes: float | None, digits: int = 1) -> str:
    """Bytes as GiB (2**30), or "not reported"."""
    return "not reported" if value_bytes is None else f"{value_bytes / 2**30:.{digits}f} GiB"


def seconds(value: float | None) -> str:
    """A duration as "4 s", "1 min 40 s", "3 h 12 min", "2 d 3 h"."""
    if value is None:
        return "unknown"
    s = max(0, round(value))
    if s < 60:
        return f"{s} s"
    if s < 3600:
        return f"{s // 60} min {s % 60} s" if s % 60 else f"{s // 60} min"
    if s < 86400:
        return f"{s // 3600} h {s % 3600 // 60} min"
    return f"{s // 86400} d {s % 86400 // 3600} h"
