"""A plan in the API."""

from __future__ import annotations

from typing import Any

from ninja import Schema


class SpanOut(Schema):
    """Bytes or tokens between a low and a high."""

    low: int
    high: int


class ConcurrencyOut(Schema):
    low: float
    high: float


class BootOut(Schema):
    """``kv_cache_tokens`` and ``max_concurrency`` are per replica; ``estimated_max_model_len`` is null if
    the length fits."""

    available_kv_bytes: SpanOut
    kv_cache_tokens: SpanOut
    max_concurrency: ConcurrencyOut
    estimated_max_model_len: int | None


class GpuFitOut(Schema):
    """One card after the next boot. ``in_use_bytes``: what others hold now and keep; null where not measured."""

    index: int
    uuid: str
    replica: int
    stage: int
    total_bytes: int
    in_use_bytes: int | None
    sleeping_neighbours: int
    weights: SpanOut
    kv_cache: SpanOut
    activation: SpanOut
    cuda_graphs: SpanOut
    overhead: SpanOut
    slack: SpanOut


class ChangeOut(Schema):
    """Settings with which it fits; ``options`` are all of them, as ``PATCH /profiles/{p}`` takes them."""

    setting: str
    sentence: str
    options: dict[str, Any]
    replicas: int
    tensor_parallel_size: int
    pipeline_parallel_size: int


class FitOut(Schema):
    """``verdict``: *fits*, *tight*, *does not fit*, null where a needed fact is not known (``reason`` names it).
    ``next_boot`` says which of ``first_boot`` (compiles) and ``later_boots`` comes now: *first*, *later*, null."""

    verdict: str | None
    reason: str
    gpus: list[GpuFitOut]
    max_model_len: int | None
    needed_kv_bytes: SpanOut | None
    next_boot: str | None
    first_boot: BootOut | None
    later_boots: BootOut | None
    host_memory_bytes: SpanOut | None
    pinned_host_bytes: SpanOut | None
    changes: list[ChangeOut]
    corrected_by_boots: int


class BindingOut(Schema):
    """What one server's processes are bound to, and why: ``argv_prefix`` comes before its command."""

    gpus: list[int]
    argv_prefix: list[str]
    env: dict[str, str]
    reasons: list[str]


class ChoiceOut(Schema):
    """``basis``: *measured* on this rig, *published*, or *none*."""

    layout: str | None
    sentence: str
    basis: str


class MeasuredOut(Schema):
    """``concurrency``: so many requests and more at once. The rate is of all replicas together."""

    concurrency: int
    tokens_per_second: float
    looks: int


class PublishedOut(Schema):
    model: str
    setting: str
    one_stream_tokens_per_second: float | None
    total_tokens_per_second: float | None
    source: str


class OptionOut(Schema):
    """One layout of the model, with all cards free."""

    layout: str
    verdict: str | None
    reason: str
    kv_cache_tokens: SpanOut | None
    measured: list[MeasuredOut]
    published: list[PublishedOut]


class AdviceOut(Schema):
    """Null where there is no choice of layouts (CPU, one card, llama.cpp)."""

    one_fast_user: ChoiceOut
    many_users: ChoiceOut
    options: list[OptionOut]


class PlanOut(Schema):
    """Computed now, for the rig as it is now. ``replicas`` lists the cards of each; ``problems`` forbid a start.

    ``wakes`` is the deployment that sleeps there and is woken instead of a start; ``stops_sleepers`` are profiles that
    sleep there now and end to make room."""

    profile: str
    version: int
    rig: str
    layout: str
    simulated: bool
    fits: bool
    replicas: list[list[int]]
    nvlinked: bool
    wakes: int | None
    replaces: list[str]
    stops_sleepers: list[str]
    warnings: list[str]
    problems: list[str]
    command_lines: list[list[str]]
    bindings: list[BindingOut]
    fit: FitOut
    advice: AdviceOut | None
