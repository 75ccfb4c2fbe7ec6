"""The command line a version becomes, for people to read before anything runs."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from django.conf import settings

from apps.catalog.selectors import weights_path
from apps.common.errors import Invalid
from apps.engines.protocol import (
    EngineKind,
    EngineLaunch,
    Install,
    InvalidOptions,
    LaunchContext,
    ModelSpec,
    ReplicaSlot,
)
from apps.engines.registry import adapter, servers_of
from apps.installs.selectors import install_for
from apps.profiles.binding import bind, bound, exchanges, with_nccl
from apps.profiles.forecast import host_cache_bytes
from apps.profiles.host_facts import numa_host
from apps.profiles.models import Device, ProfileVersion
from apps.profiles.placement import Bridge, Card, DoesNotFit, Placement, RigFacts, place
from apps.rigs.models import Rig
from apps.rigs.selectors import gpu_list, link_list

# How each engine's program is called where none is installed yet.
USUAL_COMMAND = {
    EngineKind.VLLM: ("vllm", "serve"),
    EngineKind.LLAMA_CPP: ("llama-server",),
    EngineKind.RAY_SERVE: ("python",),  # the one that has Ray
}
CAPABILITY = re.compile(r"(\d+)\.(\d+)\Z")
KEY_SHOWN = "a-key-of-its-own"


@dataclass(frozen=True, slots=True)
class Preview:
    """``lines``: per process its environment and command. ``problem`` says why there is none."""

    lines: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    problem: str = ""


def rig_facts(rig: Rig) -> RigFacts:
    """The rig's cards and bridges as the placement takes them. Retired cards are no part of it."""
    gpus = list(gpu_list(rig))
    known = [CAPABILITY.match(g.compute_capability) for g in gpus if g.present]
    return RigFacts(
        compute_capability=min(((int(c[1]), int(c[2])) for c in known if c), default=(8, 6)),
        cards=tuple(
            Card(g.index, g.uuid, g.memory_total_bytes, g.numa_node, g.present, g.cuda_total_bytes, g.pcie_width_max)
            for g in gpus
        ),
        bridges=tuple(
            Bridge(link.first.uuid, link.second.uuid, link.active_lanes)
            for link in link_list(rig)
            if link.second is not None
        ),
    )


def preview(version: ProfileVersion, rig: Rig, facts: RigFacts) -> Preview:
    """What would start on ``rig`` if all of its cards were free."""
    try:
        placement = _placement(version, facts)
        launches = _launches(version, rig, placement, facts)
    except DoesNotFit as no:
        return Preview(problem=str(no))
    except InvalidOptions as error:
        return Preview(problem=" ".join(one.message for one in error.errors))
    lines = tuple(
        " \\\n".join([*(f"{k}={shlex.quote(v)}" for k, v in sorted(launch.env.items())), _folded(launch.argv)])
        for launch in launches
    )
    return Preview(lines, placement.warnings)


def previewed_launches(version: ProfileVersion, rig: Rig, facts: RigFacts) -> tuple[EngineLaunch, ...]:
    """The processes that ``preview`` shows. Raises Invalid with the sentence where there are none."""
    try:
        return _launches(version, rig, _placement(version, facts), facts)
    except DoesNotFit as no:
        raise Invalid(str(no)) from None
    except InvalidOptions as error:
        raise Invalid(" ".join(one.message for one in error.errors)) from None


def _launches(version: ProfileVersion, rig: Rig, placement: Placement, facts: RigFacts) -> tuple[EngineLaunch, ...]:
    engine = EngineKind(version.engine)
    found = install_for(rig.slug, version.engine, version.engine_version)
    command = tuple(found.command) if found else USUAL_COMMAND.get(engine, (str(engine),))
    host = numa_host(rig)
    bindings = [
        bind(
            cards,
            facts,
            gpus_per_replica=version.tensor_parallel_size * version.pipeline_parallel_size,
            host=host,
            speaks_nccl=exchanges(version.engine, version.device),
        )
        for cards in _servers(version, placement)
    ]
    slots = with_nccl(_slots(version, placement), bindings)
    launches = adapter(engine).launch_specs(
        LaunchContext(
            model=_model(version, rig),
            options=version.options,
            replicas=slots,
            install=Install(engine, found.version if found else "", command, flags=(found and found.flags) or None),
            tensor_parallel_size=version.tensor_parallel_size,
            pipeline_parallel_size=version.pipeline_parallel_size,
            data_parallel_size=version.replicas // len(slots),
            nvlinked=placement.nvlinked,
        )
    )
    return bound(launches, bindings)


def _placement(version: ProfileVersion, facts: RigFacts) -> Placement:
    if version.device == Device.CPU:
        return Placement(((),) * version.replicas, False, ())
    return place(
        facts,
        replicas=version.replicas,
        tensor_parallel_size=version.tensor_parallel_size,
        pipeline_parallel_size=version.pipeline_parallel_size,
    )


def _servers(version: ProfileVersion, placement: Placement) -> tuple[tuple[Card, ...], ...]:
    if servers_of(version.engine, version.options, version.replicas) == version.replicas:
        return placement.replicas
    return (tuple(card for cards in placement.replicas for card in cards),)


def _slots(version: ProfileVersion, placement: Placement) -> tuple[ReplicaSlot, ...]:
    first_port = settings.ENGINE_PORTS.start
    return tuple(
        ReplicaSlot(
            launch_id=f"preview-{i}",
            host=settings.ENGINE_BIND,
            port=first_port + i,
            api_key=KEY_SHOWN,
            gpu_indices=tuple(c.index for c in cards),
            gpu_uuids=tuple(c.uuid for c in cards),
            gpu_memory_total_bytes=tuple(c.memory_total_bytes or 0 for c in cards),
        )
        for i, cards in enumerate(_servers(version, placement))
    )


def _model(version: ProfileVersion, rig: Rig) -> ModelSpec:
    model = version.model
    source = weights_path(model, rig.slug) or model.checkpoint or model.hf_repo
    if source.endswith(".gguf") and not Path(source).is_absolute():
        source = str(Path(settings.MODELS_DIR) / source)
    return ModelSpec(
        served_name=version.served_name,
        source=source,
        chat_template=model.chat_template or None,
        architecture=model.architecture or None,
        weights_bytes=model.weights_bytes,
        kv_bytes_per_token=model.kv_bytes_per_token,
        max_context_tokens=model.max_context_tokens,
        request_cache_bytes=host_cache_bytes(version),
        tool_parser=model.tool_parser or None,
        reasoning_parser=model.reasoning_parser or None,
        quantization=model.quantization or None,
    )


def _folded(argv: tuple[str, ...]) -> str:
    """One flag per line, as people write it."""
    lines: list[list[str]] = [[]]
    for part in argv:
        if part.startswith("--") and lines[-1]:
            lines.append([])
        lines[-1].append(shlex.quote(part))
    return " \\\n  ".join(" ".join(words) for words in lines)
