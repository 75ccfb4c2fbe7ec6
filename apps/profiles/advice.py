"""One fast user or many? The layouts of a model side by side, with what is known of their speed. Pure.

What this rig itself measured comes first, published measurements of such rigs second with their sources, and nothing
third: where neither speaks, no speed is told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from apps.profiles import fit
from apps.profiles.placement import RigFacts

# Requests under way at once, as history groups them: from so many on.
CONCURRENCIES = (1, 2, 5, 17)
LOOKS_NEEDED = 3  # fewer looks at a running engine are chance


@dataclass(frozen=True, slots=True)
class Measured:
    """Tokens per second that a layout of this model gave here: all its replicas together, by requests at once."""

    layout: fit.Layout
    concurrency: int  # of CONCURRENCIES
    tokens_per_second: float
    looks: int
    simulated: bool = False


@dataclass(frozen=True, slots=True)
class Published:
    """A measurement by others. ``one`` and ``many``: tokens per second of one stream, and of all at load."""

    layout: fit.Layout
    model: str
    setting: str
    source: str
    one: float | None = None
    many: float | None = None


TP4, TP2, PAIRS, SINGLES = fit.Layout(1, 4), fit.Layout(1, 2), fit.Layout(2, 2), fit.Layout(4, 1)
MULTI_CARD = "club-3090, docs/MULTI_CARD.md (@alesha-pro)"
PUBLISHED = (
    Published(TP4, "Qwen3.6-27B INT4", "4×3090 over PCIe, 220 W", MULTI_CARD, one=69.3, many=307),
    Published(TP2, "Qwen3.6-27B INT4", "2 of 4×3090 over PCIe, 220 W", MULTI_CARD, one=53.8, many=473),
    Published(PAIRS, "Qwen3.6-27B INT4", "4×3090 over PCIe, 220 W", MULTI_CARD, many=737),
    Published(TP4, "Gemma-4-12B AWQ", "4×3090", MULTI_CARD, many=1007),
    Published(SINGLES, "Gemma-4-12B AWQ", "4×3090", MULTI_CARD, many=3425),
    Published(TP4, "Qwen3.6-27B", "4×3090, PCIe x16, 350 W", "club-3090, BENCHMARKS.md (@ryanmpelletier)", one=74.8),
    Published(
        TP2, "Qwen3.6-27B fp8/INT4", "2×3090 with NVLink, 250 W, vLLM 0.24", "club-3090, BENCHMARKS.md", one=72.7
    ),
    Published(TP2, "Qwen3-32B AWQ", "2×3090, x16 and x4, saturated", "r/LocalLLaMA 1kkvqti", many=124),
    Published(TP4, "Gemma-4-31B AWQ", "4×3090 without NVLink, vLLM 0.19.1", "ollama.linkworksinc.com", one=76.9),
)
PAIR_SOURCE = "r/LocalLLaMA 1t6susj: Qwen3.6-27B AWQ on 4×3090 with two bridges"
MANY_RULE = "“latency wants max TP, throughput wants max instances” (club-3090, docs/MULTI_CARD.md)"


@dataclass(frozen=True, slots=True)
class Option:
    """One layout of the model on this rig. ``tokens`` of KV cache are per replica."""

    layout: fit.Layout
    verdict: fit.Verdict | None
    reason: str
    tokens: fit.Range | None
    measured: tuple[Measured, ...]
    published: tuple[Published, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """``basis`` is *measured*, *published* or *none*; ``layout`` None where nothing can be said."""

    layout: fit.Layout | None
    sentence: str
    basis: str


@dataclass(frozen=True, slots=True)
class Advice:
    options: tuple[Option, ...]
    one_fast_user: Choice
    many_users: Choice


def advice(
    model: fit.ModelFacts,
    options: fit.EngineOptions,
    rig: fit.RigMemory,
    facts: RigFacts,
    history: Sequence[Measured],
    *,
    published_cards: bool,
) -> Advice:
    """``published_cards``: the rig's cards are those that the published figures speak of (RTX 3090)."""
    found = []
    for layout in _candidates(len(rig.cards)):
        outcome = fit.outcome(model, layout, replace(options, compile_cached=True), rig)
        boot = outcome.next_boot
        found.append(
            Option(
                layout,
                outcome.verdict,
                outcome.reason,
                boot.kv_cache_tokens if boot else None,
                tuple(m for m in history if m.layout == layout and m.looks >= LOOKS_NEEDED),
                tuple(p for p in PUBLISHED if p.layout == layout) if published_cards else (),
            )
        )
    usable = [o for o in found if o.verdict in (fit.Verdict.FITS, fit.Verdict.TIGHT)]
    bridged = any(b.active_lanes > 0 for b in facts.bridges)
    return Advice(
        tuple(found),
        _one(usable, bridged=bridged, published=published_cards),
        _many(usable, published=published_cards),
    )


def _candidates(cards: int) -> list[fit.Layout]:
    """From all cards together to one each, powers of two."""
    sizes = [ranks for ranks in (8, 4, 2, 1) if ranks <= cards]
    return [fit.Layout(cards // ranks, ranks) for ranks in sizes]


def _measured(usable: Sequence[Option], *, many: bool) -> list[tuple[float, Option, Measured]]:
    rows = []
    for option in usable:
        wanted = [m for m in option.measured if (m.concurrency >= CONCURRENCIES[-2] if many else m.concurrency == 1)]
        if wanted:
            best = max(wanted, key=lambda m: m.tokens_per_second)
            rows.append((best.tokens_per_second, option, best))
    return sorted(rows, key=lambda row: -row[0])


def _told(rows: list[tuple[float, Option, Measured]], what: str) -> Choice:
    figures = ", ".join(f"{option.layout} {speed:.0f} tokens/s" for speed, option, _ in rows)
    by = " (the simulated engine)" if rows[0][2].simulated else ""
    return Choice(rows[0][1].layout, f"Measured on this rig{by} {what}: {figures}.", "measured")


def _one(usable: list[Option], *, bridged: bool, published: bool) -> Choice:
    if not usable:
        return Choice(None, "No layout of this rig holds the model with these settings.", "none")
    if len(usable) == 1:
        return Choice(usable[0].layout, f"Only {usable[0].layout} holds the model with these settings.", "none")
    rows = _measured(usable, many=False)
    if len(rows) > 1:
        return _told(rows, "for one request at a time")
    if not published:
        return Choice(None, "Nothing was measured here yet, and nothing is published for such cards.", "none")
    widest = max(usable, key=lambda o: o.layout.tensor_parallel_size)
    pair = next((o for o in usable if o.layout.tensor_parallel_size == 2), None)
    if bridged and pair is not None and widest.layout.tensor_parallel_size == 4:
        return Choice(
            pair.layout,
            "A bridged pair answered one stream 25 % faster than a pair without a bridge, and four cards were slower "
            f"than that pair ({PAIR_SOURCE}); long prompts are read 55–62 % faster by four (club-3090).",
            "published",
        )
    return Choice(
        widest.layout,
        "Without working bridges one stream was faster on four cards: 69.3 tokens/s against 53.8 on two "
        f"({MULTI_CARD}).",
        "published",
    )


def _many(usable: list[Option], *, published: bool) -> Choice:
    if len(usable) < 2:
        return _one(usable, bridged=False, published=published)
    rows = _measured(usable, many=True)
    if len(rows) > 1:
        return _told(rows, "with five requests and more at once")
    if not published:
        return Choice(None, "Nothing was measured here yet, and nothing is published for such cards.", "none")
    most = max(usable, key=lambda o: o.layout.replicas)
    return Choice(
        most.layout,
        f"The most replicas that fit: {MANY_RULE}; 737 tokens/s from 2 × TP2 against 307 from TP4, 3,425 from 4 × TP1 "
        "against 1,007.",
        "published",
    )
