"""What a profile version would do on a rig now: cards, what is in the way, the engine, the model.

Computed, never stored as truth. The pure part (placement) is the profiles app's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from django.conf import settings

from apps.deployments import lying
from apps.deployments.boots import learnt
from apps.deployments.equipment import (
    engine_adapter,
    engine_install,
    engine_install_or_none,
    engine_label,
    gguf_of,
    missing,
)
from apps.deployments.history import measured
from apps.deployments.lacks import model_source, runs_simulated
from apps.deployments.lying import Taken
from apps.deployments.models import CPU_SLOT, LIVE, SLEEPER, WHOLE_CARD, Deployment, GpuReservation
from apps.deployments.pauses import pause_words, paused_cards
from apps.deployments.power import power_warnings
from apps.deployments.rig_state import live_frame, rig_state, with_readings
from apps.engines.protocol import (
    EngineKind,
    EngineLaunch,
    ExpectedMemory,
    InvalidOptions,
    LaunchContext,
    ModelSpec,
    ReplicaSlot,
)
from apps.engines.ray_serve.network import ray_network_warnings
from apps.engines.registry import servers_of
from apps.profiles.advice import Advice
from apps.profiles.binding import Binding, bind, bound, exchanges, with_nccl
from apps.profiles.fit import NO_CORRECTION, Verdict, prediction_of
from apps.profiles.forecast import Forecast, RigState, advice_for, forecast, host_cache_bytes
from apps.profiles.host_facts import numa_host
from apps.profiles.models import Device, ProfileVersion
from apps.profiles.placement import Card, DoesNotFit, Placement, RigFacts, is_nvlinked
from apps.profiles.preview import rig_facts
from apps.rigs.models import Gpu, Rig

PUBLISHED_CARD = "RTX 3090"  # what published speeds speak of


@dataclass(frozen=True, slots=True)
class Plan:
    """``replica_gpus`` holds Gpu ids per replica (empty tuples on the CPU). ``in_the_way`` are the live
    deployments that would be replaced. ``problems`` are sentences that forbid a start. ``misfit`` forbids a switch
    before anything is stopped; once something is, the engine has the last word, since memory may still be on its
    way back. ``bindings`` has one for each of ``servers``. ``uncorrected`` is the forecast without what this rig's
    boots taught."""

    version: ProfileVersion
    rig: Rig
    simulated: bool
    replica_gpus: tuple[tuple[int, ...], ...]
    nvlinked: bool
    in_the_way: tuple[Deployment, ...]
    warnings: tuple[str, ...]
    problems: tuple[str, ...]
    forecast: Forecast
    uncorrected: Forecast
    misfit: str = ""
    bindings: tuple[Binding, ...] = ()
    advice: Advice | None = None

    @property
    def servers(self) -> tuple[tuple[int, ...], ...]:
        """The Gpu ids behind each address: a replica's, or those of all replicas in turn."""
        version = self.version
        if servers_of(version.engine, version.options, version.replicas) == version.replicas:
            return self.replica_gpus
        return (tuple(gpu for gpus in self.replica_gpus for gpu in gpus),)

    @property
    def refusals(self) -> tuple[str, ...]:
        """Why a switch to it is not begun."""
        return (*self.problems, self.misfit) if self.misfit else self.problems

    @property
    def fits(self) -> bool:
        return not self.refusals


def plan(version: ProfileVersion, rig: Rig, *, exclusive: bool = False, advise: bool = False) -> Plan:
    """Where it would lie, what it would replace, whether it fits, and what forbids it; with ``advise`` also how other
    layouts of the model compare, which only people ask."""
    held = list(
        GpuReservation.objects.filter(rig=rig, released_at=None, replica__deployment__status__in=LIVE).select_related(
            "gpu", "replica__deployment"
        )
    )
    live = list(Deployment.objects.filter(rig=rig, status__in=LIVE).select_related("version__profile"))
    # An older version of the same profile, or whoever answers to the same name, is always in the way:
    # its cards count as free for the placement.
    replaced = {
        d.pk
        for d in live
        if exclusive or d.version.profile_id == version.profile_id or d.served_name == version.served_name
    }
    warnings: tuple[str, ...] = ()
    problems: list[str] = []
    replica_gpus: tuple[tuple[int, ...], ...] = ((),) * version.replicas
    nvlinked = False
    paused = paused_cards(rig)
    frame = live_frame(rig)
    facts = with_readings(rig_facts(rig), frame)
    placement: Placement | None = None
    taken = Taken()
    if version.device == Device.GPU:
        if rig.hardware_error:  # the rows tell what was there once; an engine that finds no driver dies at once
            problems.append(f"The cards cannot be read: {rig.hardware_error}")
        theirs = [r for r in held if r.replica.deployment_id not in replaced]
        taken = Taken(
            avoid=frozenset(r.gpu.uuid for r in theirs if r.gpu and not r.slot.startswith(SLEEPER)),
            resting=frozenset(g.uuid for g in rig.gpus.filter(pk__in=paused)) if paused else frozenset(),
            slept_on=frozenset(r.gpu.uuid for r in theirs if r.gpu and r.slot.startswith(SLEEPER)),
        )
        try:
            placement = lying.placed(version, facts, taken)
        except DoesNotFit as no:
            problems.append(str(no))
    first = {c.uuid for c in placement.cards} if placement else set()
    for reservation in held:  # whoever serves there; a later choice of cards spares all who serve
        on_card = reservation.gpu is not None and reservation.gpu.uuid in first and reservation.slot == WHOLE_CARD
        on_cpu = version.device == Device.CPU and reservation.gpu_id is None and reservation.slot == CPU_SLOT
        if on_card or on_cpu:
            replaced.add(reservation.replica.deployment_id)
    simulated = runs_simulated(version, rig)
    in_the_way = tuple(d for d in live if d.pk in replaced)
    install = engine_install_or_none(version, rig)
    correction, compiled = learnt(version, rig, engine_label(install))
    state = replace(
        rig_state(rig, facts, held, in_the_way, frame),
        engine_version=install.version if install and not simulated else "",
        correction=correction,
        compile_cached=compiled,
        gguf=gguf_of(version, rig),
    )
    chosen_cards: tuple[Card, ...] = ()
    if placement is None:
        found = forecast(version, (), [c for c in facts.cards if c.present], state)
    else:
        lies = lying.settle(version, facts, state, placement, taken)
        placement, state, found = lies.placement, lies.state, lies.forecast
        chosen_cards = placement.cards
        ids = {g.uuid: g.pk for g in rig.gpus.all()}
        replica_gpus = tuple(tuple(ids[c.uuid] for c in cards) for cards in placement.replicas)
        nvlinked, warnings = placement.nvlinked, placement.warnings
        if resting := [paused[g] for gpus in replica_gpus for g in gpus if g in paused]:
            warnings = (*warnings, f"{pause_words(resting, rig)}.")
        if lies.stops_sleepers:
            warnings = (*warnings, "Models that sleep on these cards are stopped to make room.")
    chosen = {g for gpus in replica_gpus for g in gpus}
    others = [c for c in facts.cards if c.present and c not in chosen_cards]
    if version.engine == EngineKind.RAY_SERVE and not simulated and rig.slug == settings.RIG_NAME:
        warnings += ray_network_warnings(private=Path(model_source(version, rig)).is_absolute())
    uncorrected = found
    if correction.boots:
        plain = replace(state, correction=NO_CORRECTION)
        uncorrected = forecast(version, chosen_cards, others, plain, advise=False)
    misfit = ""
    if found.verdict is Verdict.DOES_NOT_FIT and not problems:
        misfit = " ".join((found.sentence, *(s.sentence for s in found.suggestions[:1])))
    if found.verdict is Verdict.TIGHT:
        warnings = (*warnings, f"Tight: {found.sentence}")
    warnings = (*warnings, *found.estimate.warnings)
    warnings = (*warnings, *power_warnings(version, rig, chosen))
    wanted = version.engine_version
    if wanted and install and not simulated and install.version != wanted:
        warnings = (
            *warnings,
            f"Verified with {version.get_engine_display()} {wanted}, which is not installed on {rig.slug}; "
            f"{install.version or 'another version'} would start it.",
        )
    problems += missing(version, rig, simulated)
    made = Plan(
        version=version,
        rig=rig,
        simulated=simulated,
        replica_gpus=replica_gpus,
        nvlinked=nvlinked,
        in_the_way=in_the_way,
        warnings=warnings,
        problems=tuple(problems),
        forecast=found,
        uncorrected=uncorrected,
        misfit=misfit,
    )
    made = replace(made, bindings=_bindings(made, facts), advice=_advice(made, facts, state) if advise else None)
    return made if problems else replace(made, problems=tuple(_refused(made)))


def placed(the_plan: Plan, replica_gpus: Sequence[Sequence[int]]) -> Plan:
    """The same on cards that were chosen before, with what these are bound to: a plan made later may choose others.
    A card that another has replaced since is a problem of it."""
    chosen = tuple(tuple(gpus) for gpus in replica_gpus)
    if chosen == the_plan.replica_gpus or not any(chosen):
        return replace(the_plan, replica_gpus=chosen)
    facts = rig_facts(the_plan.rig)
    cards, uuids = {c.uuid: c for c in facts.cards}, {g.pk: g.uuid for g in the_plan.rig.gpus.all()}
    if any(uuids[gpu] not in cards for gpus in chosen for gpu in gpus):
        return replace(the_plan, problems=("A card on which it was to lie is not in this rig any more.",))
    lying = tuple(tuple(cards[uuids[gpu]] for gpu in gpus) for gpus in chosen)
    nvlinked = is_nvlinked(lying, the_plan.version.tensor_parallel_size, facts)
    made = replace(the_plan, replica_gpus=chosen, nvlinked=nvlinked)
    return replace(made, bindings=_bindings(made, facts))


def _advice(the_plan: Plan, facts: RigFacts, state: RigState) -> Advice | None:
    names = {g.name for g in the_plan.rig.gpus.all() if g.present}
    history = measured(the_plan.version.model, the_plan.rig)
    of_3090s = bool(names) and all(PUBLISHED_CARD in name for name in names)
    return advice_for(the_plan.version, facts, state, history, published_cards=of_3090s)


def _bindings(the_plan: Plan, facts: RigFacts) -> tuple[Binding, ...]:
    version, rig = the_plan.version, the_plan.rig
    uuids = {g.pk: g.uuid for g in rig.gpus.all()}
    cards = {c.uuid: c for c in facts.cards}
    host = None if the_plan.simulated else numa_host(rig)
    return tuple(
        bind(
            [cards[uuids[gpu]] for gpu in server],
            facts,
            gpus_per_replica=version.tensor_parallel_size * version.pipeline_parallel_size,
            host=host,
            speaks_nccl=exchanges(version.engine, version.device),
        )
        for server in the_plan.servers
    )


def _refused(the_plan: Plan) -> list[str]:
    """What only the command line shows: an option that this install or this layout does not take."""
    try:
        launches(the_plan, preview_slots(the_plan))
    except InvalidOptions as error:
        return [f"Option {e.field}: {e.message}" for e in error.errors]
    return []


def launches(the_plan: Plan, slots: tuple[ReplicaSlot, ...]) -> tuple[EngineLaunch, ...]:
    """The exact processes for these slots. Raises InvalidOptions or Invalid."""
    version, rig = the_plan.version, the_plan.rig
    model = version.model
    context = LaunchContext(
        model=ModelSpec(
            served_name=version.served_name,
            source=model_source(version, rig),
            chat_template=model.chat_template or None,
            architecture=model.architecture or None,
            weights_bytes=model.weights_bytes,
            kv_bytes_per_token=model.kv_bytes_per_token,
            max_context_tokens=model.max_context_tokens,
            request_cache_bytes=host_cache_bytes(version),
            tool_parser=model.tool_parser or None,
            reasoning_parser=model.reasoning_parser or None,
            quantization=model.quantization or None,
        ),
        options=version.options,
        replicas=with_nccl(slots, the_plan.bindings),
        install=engine_install(version, rig),
        tensor_parallel_size=version.tensor_parallel_size,
        pipeline_parallel_size=version.pipeline_parallel_size,
        data_parallel_size=version.replicas // len(slots),
        nvlinked=the_plan.nvlinked,
        cache_dir=str(settings.DATA_DIR / "cache"),
        simulation_socket=str(settings.SAMPLER_SOCKET) if the_plan.simulated else None,
        stand_in_for=EngineKind(version.engine)
        if the_plan.simulated and version.engine != EngineKind.SIMULATED
        else None,
        expected=expected_memory(the_plan.forecast),
    )
    return bound(engine_adapter(version, rig).launch_specs(context), the_plan.bindings)


def expected_memory(found: Forecast) -> ExpectedMemory | None:
    """The middle of the forecast on the fullest GPU; None where nothing was computed."""
    estimate = found.estimate
    said = prediction_of(estimate)
    if said is None:
        return None
    boot, context = estimate.next_boot, estimate.gpus[0].overhead
    tokens = boot.kv_cache_tokens if boot else None
    return ExpectedMemory(
        weights_bytes=said.weights.middle,
        activation_bytes=said.activation.middle,
        cuda_graph_bytes=said.cuda_graphs.middle,
        non_torch_bytes=said.non_torch.middle,
        context_bytes=context.middle - said.non_torch.middle,
        kv_token_bytes=boot.available_kv.high / tokens.high if boot and tokens and tokens.high else None,
        compiles=said.compiles,
    )


def slot_of(
    launch_id: str, host: str, port: int, api_key: str, gpus: list[Gpu], free: Mapping[str, int] | None = None
) -> ReplicaSlot:
    """``free`` maps uuids to the bytes that a reading found free; without it an engine goes by the cards' size."""
    return ReplicaSlot(
        launch_id=launch_id,
        host=host,
        port=port,
        api_key=api_key,
        gpu_indices=tuple(g.index for g in gpus),
        gpu_uuids=tuple(g.uuid for g in gpus),
        gpu_memory_total_bytes=tuple(g.cuda_total_bytes or 0 for g in gpus),
        gpu_memory_free_bytes=tuple(free.get(g.uuid) for g in gpus) if free else (),
    )


def command_lines(the_plan: Plan) -> list[list[str]]:
    """The argv of each process as it would start now, for people to read. Raises Invalid or InvalidOptions."""
    return [list(launch.argv) for launch in launches(the_plan, preview_slots(the_plan))]


def preview_slots(the_plan: Plan) -> tuple[ReplicaSlot, ...]:
    first_port = settings.ENGINE_PORTS.start
    by_id = {g.pk: g for g in the_plan.rig.gpus.all()}
    return tuple(
        slot_of(f"preview-{i}", settings.ENGINE_BIND, first_port + i, "not-shown", [by_id[g] for g in gpus])
        for i, gpus in enumerate(the_plan.servers)
    )
