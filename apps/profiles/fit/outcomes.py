"""What exactly these settings come to: a verdict, a sentence and the forecast of both kinds of boot. Pure.

The KV cache's tokens are exact for given bytes (``kv_cache``); the bytes are a range (``gpus``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from apps.profiles.fit import overheads
from apps.profiles.fit.correction import Prediction
from apps.profiles.fit.gpus import GpuEstimate, Parts, Verdict, cannot_start, gib, parts_per_gpu, span
from apps.profiles.fit.inputs import EngineOptions, Layout, ModelFacts, RigMemory
from apps.profiles.fit.kv_cache import KvCacheCapacity, bytes_for_one_request, kv_cache_capacity
from apps.profiles.fit.layers import LayerGroup
from apps.profiles.fit.ranges import Range
from apps.profiles.fit.weights import weights_per_gpu

# Pages of state per request with prefix caching: two, and a checkpoint's with some kernels (vLLM MambaSpec).
STATE_PAGES = (2, 3)


@dataclass(frozen=True, slots=True)
class BootForecast:
    """What one kind of boot leaves for the KV cache on the fullest GPU, and what vLLM makes of it (per replica).

    ``available_kv`` may be below zero. ``estimated_max_model_len`` is for its low end, None where the length fits.
    """

    available_kv: Range
    kv_cache_tokens: Range
    max_concurrency: tuple[float, float]
    estimated_max_model_len: int | None
    fits_at_worst: bool
    fits_at_best: bool


@dataclass(frozen=True, slots=True)
class Outcome:
    """An estimate without advice. ``verdict`` is None where a needed fact is not known; ``reason`` says which.

    ``needed_kv``: bytes per GPU for one request of the full length. ``first_boot`` compiles, ``later_boots`` find the
    compile cache; ``next_boot_compiles`` says which of them comes now and is what ``gpus`` and the verdict show.
    ``host_memory``: what an engine on the CPU, or with weights left in host memory, takes of the host.
    ``max_model_len`` is the context that was counted with; an automatic one is what vLLM would shorten it to.
    """

    verdict: Verdict | None
    reason: str
    gpus: tuple[GpuEstimate, ...] = ()
    needed_kv: Range | None = None
    first_boot: BootForecast | None = None
    later_boots: BootForecast | None = None
    next_boot_compiles: bool = True
    pinned_host: Range | None = None
    host_memory: Range | None = None
    max_model_len: int | None = None
    warnings: tuple[str, ...] = ()

    @property
    def next_boot(self) -> BootForecast | None:
        return self.first_boot if self.next_boot_compiles else self.later_boots


def outcome(model: ModelFacts, layout: Layout, options: EngineOptions, rig: RigMemory) -> Outcome:
    """The estimate for exactly these settings. Raises ValueError for options no engine would take."""
    _check(layout, options)
    refused = _refused(model, layout, rig)
    if refused:
        return Outcome(Verdict.DOES_NOT_FIT, refused)
    stages = weights_per_gpu(model, layout, rig.compute_capability)
    if stages is None:
        return Outcome(None, f"The size of {model.name}'s weights is not known, so nothing can be said before a start.")

    first, later = (parts_per_gpu(model, layout, options, rig, stages, compiles=compiles) for compiles in (True, False))
    compiles = not options.compile_cached and not options.enforce_eager
    parts = first if compiles else later
    pinned = overheads.pinned_host_bytes(model.weights_bytes or 0, layout.replicas)
    found = Outcome(
        None,
        "",
        gpus=tuple(p.gpu for p in parts),
        next_boot_compiles=compiles,
        pinned_host=pinned if options.enable_sleep_mode else None,
        host_memory=Range.exactly(options.cpu_offload_bytes * layout.gpus) if options.cpu_offload_bytes else None,
        warnings=tuple(_warnings(model, options, rig, layout, pinned)),
    )
    start = cannot_start(parts, options, rig)
    if start and start[0] is Verdict.DOES_NOT_FIT:
        return _with(found, start)
    shape, length = model.cache, options.max_model_len or model.max_context_tokens
    if shape is None or (shape.rich and length is None):
        return _with(found, _without_cache_facts(model, parts))
    if not shape.rich or length is None:
        return _with(found, start or _no_cache(parts))

    lean = _Cache(shape.lean, length, layout, options, STATE_PAGES[0])
    rich = _Cache(shape.rich, length, layout, options, STATE_PAGES[1])
    try:
        needed = Range(lean.needed, rich.needed)
    except ValueError as error:  # a cache vLLM would refuse too
        return _with(found, (Verdict.DOES_NOT_FIT, str(error)))
    forecasts = [_forecast(lean, rich, first), _forecast(lean, rich, later)] if first != later else []
    forecasts = forecasts or 2 * [_forecast(lean, rich, first)]
    now = forecasts[0 if compiles else 1]
    if options.auto_max_model_len and now.estimated_max_model_len:
        shortened = replace(options, max_model_len=now.estimated_max_model_len, auto_max_model_len=False)
        found = outcome(model, layout, shortened, rig)
        return replace(found, reason=f"vLLM shortens the context to what fits. {found.reason}")
    judged = _judged(now, needed, length, parts)
    if start and judged[0] is not Verdict.DOES_NOT_FIT:
        judged = start
    return replace(
        _with(found, judged), needed_kv=needed, first_boot=forecasts[0], later_boots=forecasts[1], max_model_len=length
    )


def _with(found: Outcome, judged: tuple[Verdict | None, str]) -> Outcome:
    return replace(found, verdict=judged[0], reason=judged[1])


def _check(layout: Layout, options: EngineOptions) -> None:
    for name in ("replicas", "tensor_parallel_size", "pipeline_parallel_size"):
        if getattr(layout, name) < 1:
            raise ValueError(f"{name} must be at least 1, not {getattr(layout, name)}.")
    for name in ("max_num_seqs", "max_num_batched_tokens", "block_size"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} must be at least 1, not {getattr(options, name)}.")
    if not 0 < options.gpu_memory_utilization <= 1:
        raise ValueError(f"gpu_memory_utilization lies between 0 and 1, not at {options.gpu_memory_utilization}.")
    if options.max_model_len is not None and options.max_model_len < 1:
        raise ValueError(f"max_model_len must be at least 1, not {options.max_model_len}.")


def _refused(model: ModelFacts, layout: Layout, rig: RigMemory) -> str | None:
    """The sentence why the layout is impossible whatever the memory."""
    ranks = layout.tensor_parallel_size
    if layout.gpus > len(rig.cards):
        return f"{layout} needs {layout.gpus} GPUs; the rig has {len(rig.cards)}. Choose a smaller layout."
    if model.attention_heads and model.attention_heads % ranks:
        return (
            f"{model.attention_heads} attention heads cannot be divided among {ranks} GPUs; "
            "the tensor parallel size must divide them."
        )
    mla = model.cache is not None and any(group.kind == "mla" for group in model.cache.lean)
    heads = None if mla else model.kv_heads
    if heads and heads % ranks and ranks % heads:
        return f"{heads} KV heads and {ranks} GPUs do not divide each other, so vLLM cannot split the model that way."
    if "g128" in model.quantization.lower() and model.intermediate_size and model.intermediate_size % (ranks * 128):
        return (
            f"Quantization groups of 128 do not divide the {model.intermediate_size / ranks:.0f} inputs each of "
            f"{ranks} GPUs would get. Choose a smaller tensor parallel size."
        )
    if model.layers and model.layers < layout.pipeline_parallel_size:
        return f"{model.layers} layers cannot be spread over {layout.pipeline_parallel_size} pipeline stages."
    return None


class _Cache:
    """The capacity of one reading of the model's cache for these settings."""

    def __init__(
        self,
        groups: tuple[LayerGroup, ...],
        length: int,
        layout: Layout,
        options: EngineOptions,
        state_pages: int,
    ) -> None:
        self._groups = groups
        self._length = length
        self._layout, self._options = layout, options
        self._state_pages = state_pages if options.enable_prefix_caching else 1

    @property
    def needed(self) -> int:
        layout, options = self._layout, self._options
        return bytes_for_one_request(
            self._groups,
            tensor_parallel_size=layout.tensor_parallel_size,
            pipeline_parallel_size=layout.pipeline_parallel_size,
            kv_cache_dtype=options.kv_cache_dtype,
            max_model_len=self._length,
            block_size=options.block_size,
            max_num_batched_tokens=options.max_num_batched_tokens,
            concurrent_batches=layout.pipeline_parallel_size + 1,  # asynchronous scheduling is on by default
            state_pages=self._state_pages,
        )

    def capacity(self, available: int) -> KvCacheCapacity:
        layout, options = self._layout, self._options
        return kv_cache_capacity(
            self._groups,
            tensor_parallel_size=layout.tensor_parallel_size,
            pipeline_parallel_size=layout.pipeline_parallel_size,
            kv_cache_dtype=options.kv_cache_dtype,
            max_model_len=self._length,
            available_kv_bytes=available,
            block_size=options.block_size,
            max_num_batched_tokens=options.max_num_batched_tokens,
            concurrent_batches=layout.pipeline_parallel_size + 1,
            state_pages=self._state_pages,
        )


def _forecast(lean: _Cache, rich: _Cache, parts: list[Parts]) -> BootForecast:
    # All ranks take the smallest one's count, and a plan must hold for every replica.
    available = Range(min(p.available_kv.low for p in parts), min(p.available_kv.high for p in parts))
    worst, best = rich.capacity(available.low), lean.capacity(available.high)
    return BootForecast(
        available_kv=available,
        kv_cache_tokens=Range(worst.kv_cache_tokens, best.kv_cache_tokens),
        max_concurrency=(worst.max_concurrency, best.max_concurrency),
        estimated_max_model_len=worst.estimated_max_model_len,
        fits_at_worst=worst.fits,
        fits_at_best=best.fits,
    )


def _judged(boot: BootForecast, needed: Range, length: int, parts: list[Parts]) -> tuple[Verdict, str]:
    fullest = min(parts, key=lambda p: p.available_kv.low)
    if fullest.gpu.weights.low > fullest.budget:
        return Verdict.DOES_NOT_FIT, _too_heavy(fullest)
    weights = f"Weights take {span(fullest.gpu.weights)} of a GPU's {gib(fullest.budget)}"
    if boot.available_kv.high <= 0:
        return (
            Verdict.DOES_NOT_FIT,
            f"{weights}, and with activations, CUDA graphs and other overhead nothing is left for the KV cache.",
        )
    left = f"{weights} and leave {span(Range(max(0, boot.available_kv.low), boot.available_kv.high))} for KV cache"
    request = f"one request of {length:,} tokens needs {span(needed, digits=2)}"
    if not boot.fits_at_best:
        return Verdict.DOES_NOT_FIT, f"{left}, but {request} on each GPU."
    tokens = f"{boot.kv_cache_tokens.low:,} to {boot.kv_cache_tokens.high:,} tokens"
    if not boot.fits_at_worst:
        return Verdict.TIGHT, f"{left}: {tokens}, while {request} on each GPU."
    low, high = boot.max_concurrency
    return Verdict.FITS, f"{left}: {tokens}, {low:.1f} to {high:.1f} requests of {length:,} tokens at once."


def _too_heavy(parts: Parts) -> str:
    return f"Each GPU would hold {span(parts.gpu.weights)} of weights alone, and {gib(parts.budget)} are its limit."


def _no_cache(parts: list[Parts]) -> tuple[Verdict, str]:
    """Encoders and other models that keep no KV cache."""
    worst = min(parts, key=lambda p: p.gpu.slack.low)
    text = f"The model keeps no KV cache; {span(worst.gpu.weights)} of weights lie on each GPU"
    if worst.gpu.slack.high < 0:
        return Verdict.DOES_NOT_FIT, f"{text}, which is more than is free."
    if worst.gpu.slack.low < 0:
        return Verdict.TIGHT, f"{text}, which is about what is free."
    return Verdict.FITS, f"{text}, and {span(worst.gpu.slack)} stay free."


def _without_cache_facts(model: ModelFacts, parts: list[Parts]) -> tuple[Verdict | None, str]:
    worst = min(parts, key=lambda p: p.available_kv.high)
    if worst.gpu.weights.low > worst.budget:
        return Verdict.DOES_NOT_FIT, _too_heavy(worst)
    if worst.available_kv.high <= 0:
        return (
            Verdict.DOES_NOT_FIT,
            f"Weights take {span(worst.gpu.weights)} of a GPU's {gib(worst.budget)}, "
            "and with overhead nothing is left for a KV cache.",
        )
    left = span(Range(max(0, worst.available_kv.low), worst.available_kv.high))
    if model.cache is None:
        return None, f"The weights leave {left} per GPU, but how much cache {model.name} needs per token is not known."
    return (
        None,
        f"The weights leave {left} per GPU, but {model.name}'s longest context is not known; set max_model_len.",
    )


def _warnings(model: ModelFacts, options: EngineOptions, rig: RigMemory, layout: Layout, pinned: Range) -> list[str]:
    cards = rig.cards[: layout.gpus]
    found = [model.cache.assumption] if model.cache and model.cache.assumption else []
    if model.weights_estimated:
        found.append("The weights are computed from the parameter count; layers kept in 16 bit may add to them.")
    if any(card.in_use_bytes is None for card in cards):
        found.append("What others use of the cards was not measured; a display counts as 0.1 to 1.0 GiB.")
    if options.enable_sleep_mode:
        if rig.host_available_bytes is not None and pinned.high > rig.host_available_bytes:
            found.append(
                f"Sleeping pins {span(pinned)} of host RAM, and {gib(rig.host_available_bytes)} are available: "
                "sleep will fail or push the host into swapping."
            )
        if model.four_bit_linear and not options.graphs_in_budget:
            found.append(
                "With sleep mode vLLM 0.26 sizes the KV cache of AWQ and GPTQ models 3.6 to 4.4 GiB too large, beyond "
                "the budget; the panel gives it a fixed kv_cache_memory_bytes where the profile does not."
            )
    if not options.graphs_in_budget and not options.enforce_eager:
        found.append("This vLLM does not count CUDA graphs within its budget; they come on top.")
    return found


def prediction_of(found: Outcome) -> Prediction | None:
    """What to keep beside the engine's own log: the parts on the fullest GPU. None where nothing was computed."""
    if not found.gpus:
        return None
    fullest = max(found.gpus, key=lambda gpu: gpu.weights.high)
    boot = found.next_boot
    return Prediction(
        weights=fullest.weights,
        activation=fullest.activation,
        cuda_graphs=fullest.cuda_graphs,
        non_torch=fullest.non_torch,
        available_kv=boot.available_kv if boot else None,
        kv_cache_tokens=boot.kv_cache_tokens if boot else None,
        compiles=found.next_boot_compiles,
    )
