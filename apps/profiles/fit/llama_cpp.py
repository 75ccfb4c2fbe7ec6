"""What llama.cpp takes of each GPU, or of the host's memory. Pure.

Read in llama.cpp (b10434, b11434): whole layers go to devices by ``tensor_split``, or by free memory; the output layer
counts as one more; the input embedding stays on the CPU; a layer's cache lies beside its weights. The weights come
from a file's real tensor sizes where there is one. CUDA contexts and compute buffers are bounds, not measurements.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from apps.profiles.fit.estimate import SHORTEST_USEFUL_TOKENS, Change, FitEstimate
from apps.profiles.fit.gpus import GpuEstimate, Verdict, gib, span
from apps.profiles.fit.inputs import GgufFile, Layout, LlamaOptions, ModelFacts, RigMemory
from apps.profiles.fit.layers import LayerGroup
from apps.profiles.fit.overheads import used_by_others
from apps.profiles.fit.ranges import GIB, ZERO, Range

# Bytes per value of the cache: blocks of 32 values with their scales.
CACHE_BYTES = {
    "f32": 4.0,
    "f16": 2.0,
    "bf16": 2.0,
    "q8_0": 34 / 32,
    "q5_1": 24 / 32,
    "q5_0": 22 / 32,
    "q4_1": 20 / 32,
    "q4_0": 18 / 32,
    "iq4_nl": 18 / 32,
}
CONTEXT = Range(int(0.25 * GIB), int(0.60 * GIB))  # a CUDA context and cuBLAS; a bound
HOST_PROCESS = Range(int(0.05 * GIB), int(0.30 * GIB))  # 330-356 MiB were measured with a model of 253 MB
COMPUTE_SLACK = int(0.30 * GIB)
LAYERS_IF_UNKNOWN = 32
TABLE_BYTES = 0.82  # a value of an embedding table as a 6 bit quantizer leaves it
STEP = 1024


@dataclass(frozen=True, slots=True)
class _Need:
    weights: Range
    cache: Range
    compute: Range

    @property
    def whole(self) -> Range:
        return self.weights + self.cache + self.compute + CONTEXT


@dataclass(frozen=True, slots=True)
class _Sizes:
    """``output`` goes to the GPUs with the layers. ``experts``: of each layer, what is experts."""

    layers: tuple[int, ...]
    output: int
    exact: bool
    experts: tuple[Range, ...]


def llama_estimate(
    model: ModelFacts, layout: Layout, options: LlamaOptions, rig: RigMemory, file: GgufFile | None = None
) -> FitEstimate:
    """What each GPU holds, whether that fits, and what would. A replica's GPUs are ``layout.gpus_per_replica``."""
    model = _completed(model, file)
    found = _judged(model, layout, options, rig, file)
    if found.verdict in (Verdict.TIGHT, Verdict.DOES_NOT_FIT):
        return replace(found, changes=tuple(_changes(model, layout, options, rig, file)))
    return found


def llama_host_estimate(
    model: ModelFacts,
    options: LlamaOptions,
    *,
    replicas: int = 1,
    host_total_bytes: int | None = None,
    host_available_bytes: int | None = None,
    file: GgufFile | None = None,
) -> FitEstimate:
    """On the CPU: the file is mapped once however many replicas read it, caches and buffers are each one's own."""
    model = _completed(model, file)
    total = file.total_bytes if file else model.weights_bytes
    if total is None:
        return FitEstimate(None, f"The size of {model.name}'s weights is not known, so nothing can be said before.")
    length = context_of(model, options)
    cache = _cache(model, options, length or 0)
    each = (cache or ZERO) + _compute(model, options, length or 0, output=True) + HOST_PROCESS
    need = Range(total + each.low * replicas, total + each.high * replicas)
    words = f"It needs {span(need)} of the host's memory"
    if cache is None:
        words += ", without a KV cache whose size is not known"
    verdict, reason = host_verdict(need, words, host_total_bytes, host_available_bytes)
    return FitEstimate(verdict, reason, next_boot_compiles=False, host_memory=need, max_model_len=length)


def _completed(model: ModelFacts, file: GgufFile | None) -> ModelFacts:
    """With what the file says of itself where the catalogue says nothing."""
    if file is None:
        return model
    return replace(
        model,
        cache=model.cache or file.cache,
        max_context_tokens=model.max_context_tokens or file.max_context_tokens,
    )


def host_verdict(need: Range, words: str, total: int | None, available: int | None) -> tuple[Verdict | None, str]:
    """Against the machine's memory, and against what is free of it now."""
    if total is None and available is None:
        return None, f"{words}; how much the machine has is not known."
    if total is not None and need.low > total:
        return Verdict.DOES_NOT_FIT, f"{words}; the machine has {gib(total)}."
    if available is not None and need.high > available:
        return Verdict.TIGHT, f"{words}; {gib(available)} are available now."
    have = f"{gib(available)} are available" if available is not None else f"the machine has {gib(total or 0)}"
    return Verdict.FITS, f"{words}; {have}."


def context_of(model: ModelFacts, options: LlamaOptions) -> int | None:
    return options.context_tokens or model.max_context_tokens


def _judged(
    model: ModelFacts, layout: Layout, options: LlamaOptions, rig: RigMemory, file: GgufFile | None
) -> FitEstimate:
    if layout.gpus > len(rig.cards):
        return FitEstimate(
            Verdict.DOES_NOT_FIT,
            f"{layout} needs {layout.gpus} GPUs; the rig has {len(rig.cards)}. Choose a smaller layout.",
        )
    if options.tensor_split is not None and len(options.tensor_split) != layout.gpus_per_replica:
        return FitEstimate(
            Verdict.DOES_NOT_FIT,
            f"tensor_split has {len(options.tensor_split)} shares and a replica has {layout.gpus_per_replica} GPUs; "
            "give one share for each.",
        )
    sizes, length = _layer_sizes(model, file), context_of(model, options)
    if sizes is None or length is None:
        what = "size of the weights" if sizes is None else "longest context"
        return FitEstimate(None, f"The {what} of {model.name} is not known, so nothing can be said before a start.")
    cache = _cache(model, options, length)
    gpus: list[GpuEstimate] = []
    free: list[int] = []
    left = ZERO
    for replica in range(layout.replicas):
        first = replica * layout.gpus_per_replica
        here = [c.total_bytes - used_by_others(c).high for c in rig.cards[first : first + layout.gpus_per_replica]]
        free += here
        needs, weights_left = _needs(model, options, sizes, cache or ZERO, length, here)
        cached = Range(sum(need.cache.low for need in needs), sum(need.cache.high for need in needs))
        whole = cache or ZERO
        left += Range(max(0, whole.low - cached.low), max(0, whole.high - cached.high))
        if not replica:  # the file is mapped once
            left += weights_left
        for at, need in enumerate(needs):
            gpus.append(
                GpuEstimate(
                    position=first + at,
                    replica=replica,
                    stage=0,
                    weights=need.weights,
                    kv_cache=need.cache,
                    activation=need.compute,
                    cuda_graphs=ZERO,
                    overhead=CONTEXT,
                    slack=Range(here[at] - need.whole.high, here[at] - need.whole.low),
                )
            )
    worst = min(gpus, key=lambda gpu: (gpu.slack.low, gpu.slack.high))
    verdict, reason = _words(worst, rig.name(worst.position), free[worst.position], length, options, sizes)
    if left.high:
        reason += f" {span(left)} stay on the CPU."
    if verdict is Verdict.DOES_NOT_FIT and options.context_tokens is None and _shortens(options):
        shortest = replace(options, context_tokens=min(length, options.fit_context_tokens))
        if _judged(model, layout, shortest, rig, file).verdict is not Verdict.DOES_NOT_FIT:
            verdict, reason = Verdict.TIGHT, f"{reason} llama.cpp shortens a context that is not set to what fits."
    available = rig.host_available_bytes
    if verdict is Verdict.FITS and available is not None and left.high > available:
        verdict = Verdict.TIGHT
        reason += f" That is more than the {gib(available)} of host memory that are available now."
    if cache is None and verdict is not Verdict.DOES_NOT_FIT:
        verdict = None
        reason += f" How much cache {model.name} needs per token is not known, and none is counted."
    if options.tensors_overridden:
        verdict = None
        reason = f"Where --override-tensor lays the weights is not counted. Without it: {reason}"
    return FitEstimate(
        verdict,
        reason,
        gpus=tuple(gpus),
        next_boot_compiles=False,
        host_memory=left if left.high else None,
        max_model_len=length,
    )


def _shortens(options: LlamaOptions) -> bool:
    """Whether an unset context is made to fit (llama.cpp's common/fit.cpp, on by default)."""
    return options.fit and options.split_mode != "tensor"


def _words(
    worst: GpuEstimate, where: str, free: int, length: int, options: LlamaOptions, sizes: _Sizes
) -> tuple[Verdict | None, str]:
    parts = f"{span(worst.weights)} of weights and {span(worst.kv_cache)} of cache for {length:,} tokens"
    whole = options.gpu_layers == "all" or (
        isinstance(options.gpu_layers, int) and options.gpu_layers > len(sizes.layers)
    )
    if worst.slack.high < 0 and whole:
        return Verdict.DOES_NOT_FIT, f"{parts} are more than the {gib(free)} free on {where}."
    if worst.slack.high < 0:
        return (
            Verdict.TIGHT,
            f"{parts} are more than the {gib(free)} free on {where}: llama.cpp leaves layers on the CPU then, which is "
            "many times slower.",
        )
    if worst.slack.low < 0 and any(experts.width for experts in sizes.experts[: options.cpu_expert_layers]):
        return (
            Verdict.TIGHT,
            f"{parts} on {where}, where {gib(free)} are free: how much the experts take that stay on the CPU, only the "
            "model's file tells.",
        )
    if worst.slack.low < 0:
        return Verdict.TIGHT, f"{parts} come close to the {gib(free)} free on {where}."
    return Verdict.FITS, f"{parts} on {where}, and {span(worst.slack)} stay free."


def _layer_sizes(model: ModelFacts, file: GgufFile | None) -> _Sizes | None:
    if file is not None and file.layer_bytes:
        experts = (
            tuple(Range.exactly(size) for size in file.expert_bytes)
            if file.expert_bytes
            else tuple(Range(0, size) for size in file.layer_bytes)
        )
        output = (file.output_bytes or file.embedding_bytes) + file.other_bytes
        return _Sizes(file.layer_bytes, output, exact=True, experts=experts)
    total = file.total_bytes if file is not None else model.weights_bytes
    if total is None:
        return None
    count = model.layers or LAYERS_IF_UNKNOWN
    table = int(min((model.vocab_size or 0) * (model.hidden_size or 0) * TABLE_BYTES, total * 0.25))
    each = (total - 2 * table) // count
    return _Sizes((each,) * count, table, exact=False, experts=(Range(0, each),) * count)


def _needs(
    model: ModelFacts, options: LlamaOptions, sizes: _Sizes, cache: Range, length: int, free: Sequence[int]
) -> tuple[list[_Need], Range]:
    """One replica's GPUs, in their order, and the weights of its layers that stay on the CPU."""
    count = len(sizes.layers)
    shares: list[float] = list(options.tensor_split or [max(0, value) for value in free])
    if options.split_mode == "none":
        shares = [1.0] + [0.0] * (len(free) - 1)
    if sum(shares) <= 0:
        shares = [1.0] * len(free)
    ends = [end / sum(shares) for end in accumulate(shares)]
    offloaded = min(options.gpu_layers if isinstance(options.gpu_layers, int) else count + 1, count + 1)
    start = count + 1 - offloaded  # the last ones go to the GPUs, the output layer last of all
    weights, caches, outputs = [ZERO] * len(free), [0.0] * len(free), [False] * len(free)
    left = Range.exactly(sum(sizes.layers[:start]) + (0 if offloaded else sizes.output))
    for layer in range(start, count + 1):
        device = min(bisect_right(ends, (layer - start) / offloaded), len(free) - 1)
        size = sizes.output if layer == count else sizes.layers[layer]
        moved = sizes.experts[layer] if layer < min(count, options.cpu_expert_layers) else ZERO
        left += moved
        weights[device] += Range(size - moved.high, size - moved.low)
        caches[device] += 0 if layer == count or not options.kv_offload else 1 / count
        outputs[device] |= layer == count
    if options.split_mode in ("row", "tensor"):
        low, high = sum(w.low for w in weights), sum(w.high for w in weights)
        weights = [Range(int(low * share / sum(shares)), int(high * share / sum(shares))) for share in shares]
    wobble = 0 if sizes.exact else max(sizes.layers)
    needs = [
        _Need(
            Range(max(0, weight.low - wobble), weight.high + wobble + weight.high // 100) if weight.high else ZERO,
            Range(int(cache.low * part), int(cache.high * part)),
            _compute(model, options, length, output=output) if weight.high else ZERO,
        )
        for weight, part, output in zip(weights, caches, outputs, strict=True)
    ]
    return needs, left


def _cache(model: ModelFacts, options: LlamaOptions, length: int) -> Range | None:
    """All layers together; None where the model's cache is not known, nothing for an encoder."""
    if model.cache is None:
        return None
    return Range(
        sum(_group(group, options, length) for group in model.cache.lean),
        sum(_group(group, options, length) for group in model.cache.rich),
    )


def _group(group: LayerGroup, options: LlamaOptions, length: int) -> int:
    key, value = CACHE_BYTES.get(options.cache_type_k, 2.0), CACHE_BYTES.get(options.cache_type_v, 2.0)
    if group.kind == "state":
        return group.layers * (group.state_bytes_per_layer or 0) * (options.parallel or 1)
    if group.kind == "mla":
        return int(group.layers * (group.head_dim or 0) * key * length)
    kept = length
    if group.kind == "sliding" and not options.swa_full:
        # A window for each slot and the batch under way, in steps of 256 tokens.
        wanted = (group.window or 0) * (options.parallel or 1) + options.micro_batch_tokens
        kept = min(length, -(-wanted // 256) * 256)
    return int(group.layers * (group.kv_heads or 0) * (group.head_dim or 0) * (key + value) * kept)


def _compute(model: ModelFacts, options: LlamaOptions, length: int, *, output: bool) -> Range:
    batch, hidden = options.micro_batch_tokens, model.hidden_size or 4096
    low = batch * hidden * 4 * 3
    high = batch * (hidden * 16 + (model.intermediate_size or 4 * hidden) * 2) * 4 + COMPUTE_SLACK
    if output:
        high += batch * (model.vocab_size or 0) * 4  # logits of a whole batch, of which few are wanted
    if options.flash_attention == "off":
        scores = batch * length * (model.attention_heads or 32) * 4
        low, high = low + scores, high + scores
    return Range(low, high)


def _changes(
    model: ModelFacts, layout: Layout, options: LlamaOptions, rig: RigMemory, file: GgufFile | None
) -> Iterator[Change]:
    def fits(there: Layout, changed: LlamaOptions) -> bool:
        return _judged(model, there, changed, rig, file).verdict is Verdict.FITS

    length = context_of(model, options)
    if length and layout.gpus <= len(rig.cards):
        # A shorter context never fits worse: the longest that does is found by bisection.
        none_fits, all_fit = -(-length // STEP), 0
        while none_fits - all_fit > 1:
            middle = (none_fits + all_fit) // 2
            if fits(layout, replace(options, context_tokens=middle * STEP)):
                all_fit = middle
            else:
                none_fits = middle
        if all_fit * STEP >= SHORTEST_USEFUL_TOKENS:
            tokens = all_fit * STEP
            yield Change(
                "context_tokens",
                f"Shorten the context to {tokens:,} tokens over all slots.",
                layout,
                replace(options, context_tokens=tokens),
            )
        if options.cache_type_k in ("f16", "bf16") and options.flash_attention != "off":
            smaller = replace(options, cache_type_k="q8_0", cache_type_v="q8_0")
            if fits(layout, smaller):
                yield Change("cache_type", "Keep the KV cache as q8_0.", layout, smaller)
    for count in range(1, len(rig.cards) + 1):
        other = Layout(max(1, min(layout.replicas, len(rig.cards) // count)), count)
        too_few = layout.gpus <= len(rig.cards) and count <= layout.gpus_per_replica
        if too_few or other == layout:
            continue
        wider = replace(options, tensor_split=None)
        if fits(other, wider):
            yield Change("layout", f"Spread it over {count} GPU{'s' if count > 1 else ''}.", other, wider)
            return
