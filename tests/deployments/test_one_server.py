"""A layout's replicas behind one vLLM server (``data_parallel``), on a rig whose pairs are 0-2 and 1-3."""

from __future__ import annotations

from typing import Any

from apps.common.actors import actor_of
from apps.deployments.models import Deployment
from apps.deployments.plan import command_lines, plan
from apps.deployments.services import switch_request
from apps.jobs.models import JobState
from apps.profiles.models import Profile, ProfileVersion
from apps.rigs.models import Gpu, Link
from tests.deployments.test_switch import run
from tests.factories.profiles import catalogue_model


def coder(**options: Any) -> Profile:
    profile = Profile.objects.create(slug="coder", name="Coder")
    ProfileVersion.objects.create(
        profile=profile,
        number=1,
        model=catalogue_model("coder"),
        engine="vllm",
        device="gpu",
        replicas=2,
        tensor_parallel_size=2,
        served_name="coder",
        options={"max_model_len": 8192, "gpu_memory_utilization": 0.9, **options},
    )
    return profile


def test_one_server_holds_the_cards_of_all_its_replicas_pair_after_pair(sim_rig: Any, alice: Any) -> None:
    cards = {g.index: g for g in Gpu.objects.all()}
    for link, (first, second) in zip(Link.objects.order_by("pk"), ((0, 2), (1, 3)), strict=True):
        Link.objects.filter(pk=link.pk).update(first=cards[first], second=cards[second])
    profile = coder(data_parallel=True)
    assert len(command_lines(plan(profile.current, sim_rig))) == 1
    job = run(switch_request(profile=profile, actor=actor_of(alice)))
    assert job.state == JobState.SUCCEEDED, job.result
    (replica,) = Deployment.objects.get().replicas.all()
    held = [r.gpu.index for r in replica.reservations.order_by("pk") if r.gpu]
    assert held == [0, 2, 1, 3]
    at = replica.argv.index("--gpu-uuids") + 1
    assert replica.argv[at].split(",") == [cards[i].uuid for i in held]


def test_without_it_each_replica_is_a_server_of_its_own(sim_rig: Any, alice: Any) -> None:
    job = run(switch_request(profile=coder(), actor=actor_of(alice)))
    assert job.state == JobState.SUCCEEDED, job.result
    assert Deployment.objects.get().replicas.count() == 2
