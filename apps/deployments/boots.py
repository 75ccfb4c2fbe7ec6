"""Predicted against actual: what a launch was said to take, what its log told, and what the next plan learns of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from apps.catalog.models import Model
from apps.deployments.models import Boot, Deployment
from apps.engines.vllm.boot import boot_facts
from apps.profiles import fit
from apps.profiles.forecast import Forecast
from apps.profiles.models import Engine, ProfileVersion
from apps.rigs.models import Rig

LOG_BYTES = 512 * 1024
# Earlier boots that a correction is learnt from; older ones speak of another driver or engine.
BOOTS_COUNTED = 8
# What changes no kernel: a compile cache serves all values of it.
NOT_COMPILED = ("gpu_memory_utilization", "kv_cache_memory_bytes", "load_seconds", "tokens_per_second")
SHOWN = 6


def fingerprint(version: ProfileVersion, engine_version: str) -> str:
    """Equal for launches that find each other's compile cache: model, engine, layout and options that shape kernels.

    Measured: a change of max_num_seqs, max_model_len or sleep mode compiled afresh each time.
    """
    options = {name: value for name, value in version.options.items() if name not in NOT_COMPILED}
    facts = [
        version.model.slug,
        version.model.checkpoint,
        engine_version,
        version.tensor_parallel_size,
        version.pipeline_parallel_size,
        options,
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def learnt(version: ProfileVersion, rig: Rig, engine_version: str) -> tuple[fit.Correction, bool | None]:
    """The rig's correction for this version, and whether an identical launch came up here before (None: of no
    consequence for this engine). The nearest boots count: of the same settings, else the same model, else any of this
    engine's."""
    if version.engine == Engine.LLAMA_CPP or not engine_version:
        return fit.NO_CORRECTION, None
    known = fingerprint(version, engine_version)
    rows = list(
        Boot.objects.filter(rig=rig, engine_version=engine_version, actual__isnull=False)
        .order_by("-id")
        .values_list("fingerprint", "model_id", "uncorrected", "actual")[: 8 * BOOTS_COUNTED]
    )
    same = [(said, was) for print_, _, said, was in rows if print_ == known]
    of_model = [(said, was) for _, model_id, said, was in rows if model_id == version.model_id]
    pairs = same or of_model or [(said, was) for _, _, said, was in rows]
    found = [(fit.Prediction.from_dict(said), facts_of(was or {})) for said, was in pairs[:BOOTS_COUNTED]]
    # A second identical boot that compiled all the same shows that the cache does not carry over here.
    compiled_again = len(same) > 1 and (same[0][1] or {}).get("compiled") is True
    learnt_here = fit.correction(found, same_settings=bool(same), same_model=bool(same or of_model))
    return learnt_here, bool(same) and not compiled_again


def predicted(deployment: Deployment, shown: Forecast, uncorrected: Forecast) -> None:
    """Keep what was said, before the first process starts. Nothing where nothing was computed."""
    said, plain = fit.prediction_of(shown.estimate), fit.prediction_of(uncorrected.estimate)
    if said is None or plain is None:
        return
    version = deployment.version
    Boot.objects.get_or_create(
        deployment=deployment,
        defaults={
            "rig": deployment.rig,
            "model": version.model,
            "engine_version": deployment.engine_version,
            "layout": version.layout,
            "fingerprint": fingerprint(version, deployment.engine_version),
            "predicted": said.to_dict(),
            "uncorrected": plain.to_dict(),
        },
    )


def came_up(deployment: Deployment) -> None:
    """Read what the engine's log told of its memory; of several replicas the fullest counts."""
    from apps.deployments.launching import log_tail  # it imports the plan, which learns from here

    boot = Boot.objects.filter(deployment=deployment, actual__isnull=True).first()
    if boot is None:
        return
    facts = [boot_facts(log_tail(replica, LOG_BYTES)) for replica in deployment.replicas.all()]
    told = [(found.weights, at, found) for at, found in enumerate(facts) if found.weights is not None]
    if told:
        fullest = max(told)[2]
        Boot.objects.filter(pk=boot.pk).update(actual=asdict(fullest))


def facts_of(actual: Mapping[str, Any]) -> fit.BootFacts:
    names = fit.BootFacts.__dataclass_fields__
    return fit.BootFacts(**{name: value for name, value in actual.items() if name in names})


@dataclass(frozen=True, slots=True)
class Compared:
    """One number of a boot: ``error`` is how far the middle of what was said lay above what was, as a share."""

    name: str
    said: fit.Range
    actual: int
    error: float | None
    within: bool


@dataclass(frozen=True, slots=True)
class BootRow:
    deployment: Deployment
    at: datetime
    layout: str
    engine_version: str
    first: bool
    rows: tuple[Compared, ...]
    seconds: tuple[tuple[str, float], ...]


COMPARED = (
    ("weights", "Weights"),
    ("activation", "Activation peak"),
    ("cuda_graphs", "CUDA graphs"),
    ("non_torch", "Other"),
    ("available_kv", "KV cache"),
    ("kv_cache_tokens", "KV cache tokens"),
)
LOG_DECIMALS = int(0.005 * 2**30)  # logs print two decimals of a GiB


def compared(predicted: Mapping[str, Any], actual: Mapping[str, Any]) -> tuple[Compared, ...]:
    said, was = fit.Prediction.from_dict(predicted), facts_of(actual)
    found = []
    for name, label in COMPARED:
        value: fit.Range | None = getattr(said, name)
        real: int | None = getattr(was, name)
        if value is None or real is None:
            continue
        slack = 0 if name == "kv_cache_tokens" else LOG_DECIMALS
        found.append(
            Compared(
                label,
                value,
                real,
                (value.middle - real) / real if real > 0 else None,
                value.low - slack <= real <= value.high + slack,
            )
        )
    return tuple(found)


def boots_of(model: Model, rig: Rig) -> list[BootRow]:
    """The last launches of a model on this rig that told their memory, newest first."""
    rows = Boot.objects.filter(model=model, rig=rig, actual__isnull=False).select_related(
        "deployment__version__profile", "deployment__rig"
    )
    return [
        BootRow(
            boot.deployment,
            boot.created_at,
            boot.layout,
            boot.engine_version,
            bool(actual.get("compiled")),
            compared(boot.predicted, actual),
            tuple((actual.get("seconds") or {}).items()),
        )
        for boot, actual in ((boot, boot.actual or {}) for boot in rows[:SHOWN])
    ]
