"""What a profile version comes to on a rig: the planner's answer for its engine, on these cards. Pure.

Reads attributes of the version and of its model, nothing else: the rig comes in as dataclasses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from apps.catalog.models import Model
from apps.engines.vllm.sleeping import careful_cache_bytes
from apps.profiles import fit
from apps.profiles.advice import Advice, Measured, advice
from apps.profiles.engine_options import changed, llama_options, not_counted, version_of, vllm_options, with_changes
from apps.profiles.models import Device, Engine, ProfileVersion
from apps.profiles.on_host import request_cache_bytes, vllm_on_host
from apps.profiles.placement import Card, RigFacts


@dataclass(frozen=True, slots=True)
class RigState:
    """A rig's memory. ``cards`` by uuid. ``gguf`` are the tensor sizes of the model's file, where it could be read."""

    cards: Mapping[str, fit.CardMemory] = field(default_factory=dict)
    compute_capability: tuple[int, int] = (8, 6)
    host_total_bytes: int | None = None
    host_available_bytes: int | None = None
    correction: fit.Correction = fit.NO_CORRECTION
    engine_version: str = ""
    compile_cached: bool | None = None
    gguf: fit.GgufFile | None = None


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A change with which it would fit, as a profile takes it. ``options`` are all of the new version's."""

    setting: str
    sentence: str
    options: dict[str, Any]
    replicas: int
    tensor_parallel_size: int
    pipeline_parallel_size: int


@dataclass(frozen=True, slots=True)
class Forecast:
    """The estimate, the cards it speaks of (``estimate.gpus[i].position`` counts in them) and what would fit."""

    estimate: fit.FitEstimate
    cards: tuple[Card, ...] = ()
    memory: tuple[fit.CardMemory, ...] = ()
    suggestions: tuple[Suggestion, ...] = ()
    corrected_by: int = 0

    @property
    def verdict(self) -> fit.Verdict | None:
        return self.estimate.verdict

    @property
    def word(self) -> str:
        return str(self.estimate.verdict) if self.estimate.verdict else "not known"

    @property
    def sentence(self) -> str:
        return self.estimate.reason


def model_of(model: Model) -> fit.ModelFacts:
    return fit.model_facts({name: getattr(model, name) for name in MODEL_FIELDS})


MODEL_FIELDS = (
    "name",
    "weights_bytes",
    "weights_formula",
    "params_total",
    "layers",
    "hidden_size",
    "attention_heads",
    "kv_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "experts",
    "experts_per_token",
    "max_context_tokens",
    "quantization",
    "architecture",
    "kv",
)


def served_by_vllm(version: ProfileVersion) -> tuple[fit.ModelFacts, str]:
    """The model with the weights that vLLM makes of it while it loads; a sentence where nobody can say how large."""
    model, scheme = model_of(version.model), str(version.options.get("quantization") or "")
    if version.options.get("quantization_config"):
        scheme = "online"
    found = fit.quantized(model, scheme)
    if found is not None:
        return found, ""
    name = "quantization_config" if version.options.get("quantization_config") else f"quantization {scheme}"
    return model, f"How much {name} makes smaller is not known; counted as the files are."


def advice_for(
    version: ProfileVersion, facts: RigFacts, state: RigState, history: Sequence[Measured], *, published_cards: bool
) -> Advice | None:
    """The model's layouts side by side with this version's options, all cards free; None where there is no choice."""
    cards = tuple(fit.CardMemory(c.cuda_total_bytes) for c in facts.cards if c.present and c.cuda_total_bytes)
    if version.device == Device.CPU or version.engine == Engine.LLAMA_CPP or len(cards) < 2:
        return None
    options = vllm_options(
        version.options,
        card_bytes=min(c.total_bytes for c in cards),
        version=version_of(state.engine_version),
    )
    rig = fit.RigMemory(cards, compute_capability=facts.compute_capability, correction=state.correction)
    try:
        return advice(served_by_vllm(version)[0], options, rig, facts, history, published_cards=published_cards)
    except ValueError:  # options that no engine takes; the estimate says which
        return None


def layout_of(version: ProfileVersion) -> fit.Layout:
    return fit.Layout(version.replicas, version.tensor_parallel_size, version.pipeline_parallel_size)


def forecast(
    version: ProfileVersion, chosen: Sequence[Card], others: Sequence[Card], state: RigState, *, advise: bool = True
) -> Forecast:
    """``chosen``: the placement's cards, replica after replica; ``others``: room for a larger layout; most free first.

    Without ``advise`` no changes are looked for, which is several times cheaper.
    """
    if version.device == Device.CPU:
        return Forecast(_on_host(version, state))
    cards = [c for c in chosen if c.uuid in state.cards]
    cards += sorted((c for c in others if c.uuid in state.cards), key=lambda c: -state.cards[c.uuid].free_bytes)
    memory = tuple(state.cards[c.uuid] for c in cards)
    rig = fit.RigMemory(
        memory,
        compute_capability=state.compute_capability,
        host_available_bytes=state.host_available_bytes,
        correction=state.correction,
        indices=tuple(c.index for c in cards),
    )
    layout = layout_of(version)
    options: fit.EngineOptions | fit.LlamaOptions
    if version.engine == Engine.LLAMA_CPP:
        options = llama_options(version.options)
        found = fit.llama_estimate(model_of(version.model), layout, options, rig, state.gguf)
    else:
        options = vllm_options(
            version.options,
            card_bytes=min((m.total_bytes for m in memory), default=0),
            version=version_of(state.engine_version),
            compile_cached=state.compile_cached,
        )
        if options.enable_sleep_mode and options.kv_cache_memory_bytes is None:
            careful = careful_cache_bytes(
                state.engine_version,
                quantization=version.model.quantization,
                weights_bytes=version.model.weights_bytes,
                world=layout.gpus_per_replica,
                card_bytes=min((m.total_bytes for m in memory), default=0),
                utilization=options.gpu_memory_utilization,
                eager=options.enforce_eager,
            )
            options = replace(options, kv_cache_memory_bytes=careful)
        model, unsized = served_by_vllm(version)
        unknown = options.kv_cache_dtype if options.kv_cache_dtype not in fit.KV_CACHE_DTYPES else ""
        if unknown:
            options = replace(options, kv_cache_dtype="auto")
        try:
            if advise:
                found = fit.estimate(model, layout, options, rig)
            else:
                found = fit.FitEstimate(**_fields(fit.outcome(model, layout, options, rig)))
        except ValueError as error:
            found = fit.FitEstimate(fit.Verdict.DOES_NOT_FIT, str(error))
        if unknown:
            reason = f"How much cache a token takes as {unknown} is not known; counted as the model's own type."
            found = replace(found, verdict=None, reason=f"{reason} {found.reason}", changes=())
        if unsized and found.gpus and found.verdict is not fit.Verdict.FITS:
            found = replace(found, verdict=None, reason=f"{unsized} {found.reason}", changes=())
        found = replace(found, warnings=(*found.warnings, *not_counted(version.options)))
        if model.weights_most_bytes is not None:
            scheme = version.options["quantization"]
            found = replace(found, warnings=(*found.warnings, f"The weights are counted as {scheme} leaves them."))
    suggestions = tuple(
        Suggestion(
            change.setting,
            change.sentence,
            with_changes(version.options, changed(options, change.options)),
            change.layout.replicas,
            change.layout.tensor_parallel_size,
            change.layout.pipeline_parallel_size,
        )
        for change in found.changes
    )
    return Forecast(found, tuple(cards), memory, suggestions, state.correction.boots)


def _fields(found: fit.Outcome) -> dict[str, Any]:
    return {name: getattr(found, name) for name in fit.Outcome.__dataclass_fields__}


def _on_host(version: ProfileVersion, state: RigState) -> fit.FitEstimate:
    if version.engine == Engine.SIMULATED:
        return fit.FitEstimate(fit.Verdict.FITS, "The simulated engine takes next to no memory.")
    model = model_of(version.model)
    if version.engine == Engine.LLAMA_CPP:
        return fit.llama_host_estimate(
            model,
            llama_options(version.options),
            replicas=version.replicas,
            host_total_bytes=state.host_total_bytes,
            host_available_bytes=state.host_available_bytes,
            file=state.gguf,
        )
    return vllm_on_host(
        model,
        layout_of(version),
        version.options,
        host_total_bytes=state.host_total_bytes,
        host_available_bytes=state.host_available_bytes,
    )


def host_cache_bytes(version: ProfileVersion) -> int | None:
    """``ModelSpec.request_cache_bytes``: vLLM on the CPU is started with what the plan counted."""
    if version.device != Device.CPU or version.engine not in (Engine.VLLM, Engine.RAY_SERVE):
        return None
    return request_cache_bytes(model_of(version.model), layout_of(version), version.options)


def state_when_free(facts: RigFacts, **known: Any) -> RigState:
    """A rig whose cards are all free, for lists."""
    return RigState(
        cards={c.uuid: fit.CardMemory(c.cuda_total_bytes) for c in facts.cards if c.present and c.cuda_total_bytes},
        compute_capability=facts.compute_capability,
        **known,
    )


def when_free(version: ProfileVersion, facts: RigFacts, state: RigState) -> Forecast:
    """The verdict on an empty rig, without advice: on its largest cards, which a plan finds too."""
    return forecast(version, (), [c for c in facts.cards if c.present], state, advise=False)


# How a model is tried where no profile says: few sequences, as suits a team, and vLLM's usual share of a card.
TRIAL = fit.EngineOptions(gpu_memory_utilization=0.90, max_num_seqs=32)
SHORTEST_CONTEXT = 4096


def model_fit(model: Model, facts: RigFacts) -> tuple[str, str]:
    """A word and a sentence: the fewest GPUs of this rig, all free, that serve the model at its full context; else the
    longest context that all of them give. "tight" is a shortened context or a range that crosses the limit."""
    cards = sorted(state_when_free(facts).cards.values(), key=lambda card: -card.total_bytes)
    rig = fit.RigMemory(tuple(cards), compute_capability=facts.compute_capability)
    if not rig.cards:
        return "not known", "No GPU's memory is known."
    described = model_of(model)
    if model.checkpoint.endswith(".gguf"):
        one = fit.llama_estimate(described, fit.Layout(), fit.LlamaOptions(gpu_layers="all"), rig)
        return str(one.verdict or "not known"), f"On one GPU by llama.cpp: {one.reason}"
    last: tuple[str, str] | None = None
    for ranks in (1, 2, 4, 8):
        if ranks > len(rig.cards):
            break
        layout = fit.Layout(1, ranks)
        found = fit.outcome(described, layout, TRIAL, rig)
        if found.verdict is fit.Verdict.FITS:
            return "fits", f"TP{ranks}: {found.reason}"
        if found.verdict is None:
            last = ("not known", found.reason)
        elif found.gpus:
            last = ("does not fit", f"TP{ranks}: {found.reason}")
            shorter = found.next_boot.estimated_max_model_len if found.next_boot else None
            if shorter and shorter >= SHORTEST_CONTEXT:
                last = ("tight", f"TP{ranks}, with the context shortened to {shorter:,} tokens. {found.reason}")
            elif found.verdict is fit.Verdict.TIGHT:
                last = ("tight", f"TP{ranks}: {found.reason}")
        elif last is None:
            last = ("does not fit", found.reason)
    return last or ("not known", "Nothing could be computed.")
