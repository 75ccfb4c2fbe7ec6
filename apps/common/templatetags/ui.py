"""Template tags for what every page shows alike: chips, bars, sparklines, times and numbers.

``{% load ui %}``; how to use each is in ``docs/ui.md``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from django import template
from django.utils import timezone
from django.utils.html import format_html
from django.utils.safestring import SafeString

from apps.common import units

register = template.Library()

NOT_REPORTED = "not reported"
# The shape that goes with a state's word. Unknown words get the neutral ring, never a healthy green.
TONES = {
    "ok": ("succeeded", "ready", "done", "passed", "pass", "open", "present", "active", "valid", "ok"),
    "warn": ("degraded", "draining", "held", "warning", "warn", "expiring", "stale", "tight"),
    "bad": ("failed", "errored", "broken", "missing", "lost", "fail", "error", "bad", "dead"),
    "busy": ("running", "preparing", "starting", "loading", "stopping", "installing", "switching", "busy"),
    "info": ("shipped", "info", "simulated"),
}
_TONE_OF = {word: tone for tone, words in TONES.items() for word in words}


def known(value: Any) -> Any:
    """None for what is not known; a template turns a missing key into an empty text on its way here."""
    return None if value == "" else value


@register.filter
def tone(state: object) -> str:
    """The dot's shape class for a state word: ok, warn, bad, busy, info or idle."""
    return _TONE_OF.get(str(state).lower(), "idle")


@register.inclusion_tag("components/chip.html")
def chip(state: object, text: object = None, title: str = "") -> dict[str, Any]:
    """A status chip: the word with a dot whose shape says it too. ``text`` replaces the word."""
    word = str(state)
    return {"tone": tone(word), "text": word if text is None else text, "title": title}


@register.simple_tag
def reltime(value: datetime | float | None, missing: str = "never") -> SafeString | str:
    """A relative time with the absolute one on hover; the browser keeps it current."""
    if value is None:
        return missing
    at = datetime.fromtimestamp(value, UTC) if isinstance(value, int | float) else value
    absolute = f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"
    iso = at.astimezone(UTC).isoformat(timespec="seconds")
    return format_html('<time datetime="{}" title="{}" data-rel>{}</time>', iso, absolute, relative(at))


def relative(at: datetime, now: datetime | None = None) -> str:
    """ "just now", "14 s ago", "in 3 min"; from a day on in days."""
    seconds = ((now or timezone.now()) - at).total_seconds()
    if abs(seconds) < 2:
        return "just now"
    size = abs(seconds)
    if size < 60:
        text = f"{int(size)} s"
    elif size < 3600:
        text = f"{int(size // 60)} min"
    elif size < 86400:
        text = f"{int(size // 3600)} h {int(size % 3600 // 60)} min"
    else:
        text = f"{int(size // 86400)} d"
    return f"{text} ago" if seconds > 0 else f"in {text}"


@register.inclusion_tag("components/bar.html")
def bar(
    segments: Iterable[tuple[str, float | None]], label: str, total: float = 100.0, thin: bool = False
) -> dict[str, Any]:
    """A bar of ``(fill, amount)`` parts of ``total``; fills: 1-4, rest, accent, warn, bad."""
    parts, x = [], 0.0
    for fill, amount in segments:
        width = 100 * max(0.0, float(amount or 0)) / total if total > 0 else 0.0
        width = min(width, 100 - x)
        parts.append({"fill": fill, "x": f"{x:.2f}", "width": f"{width:.2f}"})
        x += width
    return {"parts": parts, "label": label, "thin": thin, "filled": f"{x:.0f}"}


@register.inclusion_tag("components/spark.html")
def spark(values: Sequence[float | None], top: float = 100.0, label: str = "", uuid: str = "") -> dict[str, Any]:
    """A sparkline of ``values`` (newest last, None where not reported) on a scale from 0 to ``top``."""
    return {"path": spark_path(values, top), "label": label, "uuid": uuid}


@register.inclusion_tag("components/columns.html")
def columns(values: Sequence[tuple[str, float]], label: str, unit: str = "") -> dict[str, Any]:
    """Upright bars of ``(name, amount)``, one per day or the like, with each one's figure on hover. Say the figures in
    a table, too: a picture is not enough."""
    top = max((amount for _, amount in values), default=0.0)
    parts = [
        {
            "x": i * 10 + 1,
            "y": f"{100 - 100 * amount / top:.1f}" if top else "100",
            "height": f"{100 * amount / top:.1f}" if top else "0",
            "text": f"{name}: {units.thousands(amount)} {unit}".strip(),
        }
        for i, (name, amount) in enumerate(values)
    ]
    ends = (values[0][0], values[-1][0]) if values else ("", "")
    return {"parts": parts, "width": 10 * max(1, len(values)), "label": label, "top": top, "unit": unit, "ends": ends}


SPARK_POINTS = 60
SPARK_WIDTH, SPARK_HEIGHT = 118, 36


def spark_path(values: Sequence[float | None], top: float, points: int = SPARK_POINTS) -> str:
    """The SVG path of the last ``points`` values, aligned right; a gap where nothing was reported."""
    shown = list(values)[-points:]
    step = SPARK_WIDTH / (points - 1)
    start = points - len(shown)
    parts: list[str] = []
    pen_down = False
    for i, value in enumerate(shown):
        if value is None:
            pen_down = False
            continue
        y = SPARK_HEIGHT - 2 - (SPARK_HEIGHT - 4) * min(max(value / top, 0.0), 1.0)
        parts.append(f"{'L' if pen_down else 'M'}{(start + i) * step:.1f} {y:.1f}")
        pen_down = True
    return "".join(parts)


@register.filter
def spark_d(values: Sequence[float | None], top: float = 100.0) -> str:
    """The path of a sparkline whose SVG the template writes itself."""
    return spark_path(values, top)


@register.filter
def gib_number(value: float | None, digits: int = 1) -> str:
    """Bytes as "20.1", for "20.1 / 23.6 GiB"."""
    value = known(value)
    return NOT_REPORTED if value is None else f"{value / 2**30:.{digits}f}"


@register.filter
def gib(value: float | None, digits: int = 1) -> str:
    """Bytes as "20.1 GiB"; "not reported" for None."""
    return units.gib(known(value), digits)


@register.filter
def duration(value: float | None) -> str:
    """Seconds as "1 min 40 s"; "unknown" for None."""
    return units.seconds(known(value))


@register.filter
def number(value: float | None, digits: int = 0) -> str:
    """A number with thin spaces in thousands; "not reported" for None."""
    value = known(value)
    return NOT_REPORTED if value is None else units.thousands(value, digits)


@register.filter
def reported(value: object, unit: str = "") -> str:
    """``value`` with its unit, rounded when it is a float; "not reported" for None, never 0."""
    value = known(value)
    if value is None:
        return NOT_REPORTED
    text = units.thousands(value) if isinstance(value, int | float) else str(value)
    return f"{text} {unit}".strip()


@register.filter
def percent(fraction: float | None) -> str:
    """0..1 as "41 %"."""
    fraction = known(fraction)
    return NOT_REPORTED if fraction is None else f"{100 * fraction:.0f} %"


@register.filter
def signed_percent(fraction: float | None) -> str:
    """0.031 as "+3.1 %", with a real minus sign."""
    fraction = known(fraction)
    return NOT_REPORTED if fraction is None else f"{100 * fraction:+.1f} %".replace("-", "\u2212")


@register.filter
def widget_kind(field: Any) -> str:
    """``check`` for a single checkbox, so that its label stands beside it."""
    return (
        "check"
        if getattr(field.field.widget, "input_type", "") == "checkbox" and not hasattr(field.field.widget, "choices")
        else ""
    )
