"""Who may cut answers that are under way, in a switch of whose name no account tells."""

from __future__ import annotations

from typing import Any

import pytest

from apps.common.actors import COMMAND_LINE, PANEL, Actor, actor_of
from apps.common.roles import Role
from apps.deployments.draining import may_cut
from apps.deployments.models import Deployment
from apps.deployments.policies.decide import Asker
from apps.deployments.policies.models import RigPolicy
from apps.deployments.services import switch_request
from apps.gateway.wishes import Wish, granted
from apps.jobs.models import Job, JobState
from tests.deployments.test_switch import run, serving, streaming_gateway
from tests.factories.profiles import simulated_profile


def test_a_guests_wish_gives_up_as_a_members_does(sim_rig: Any, alice: Any) -> None:
    run(switch_request(profile=simulated_profile("old"), actor=actor_of(alice)))
    RigPolicy.objects.create(rig=sim_rig, minimum_residency_seconds=0)
    streaming_gateway(Deployment.objects.get())
    simulated_profile("new", members_may_switch=True)
    asked = granted(Wish("new", alice.pk, guest="carol"))  # behind the key of alice, whose rights are not carol's
    job = Job.objects.get(pk=asked.job_id)
    assert (job.user, job.user_name) == (None, "carol (Open WebUI)")
    Job.objects.filter(pk=job.pk).update(params={**job.params, "drain_seconds": 0.5})
    assert run(job).state == JobState.FAILED
    assert "only an operator may cut them" in job.summary
    assert serving() == ["old"]


@pytest.mark.parametrize(
    ("actor", "asker", "cuts"),
    [
        (PANEL, Asker.CLOCK, True),
        (COMMAND_LINE, Asker.OPERATOR, True),
        (Actor("", "carol (Open WebUI)"), Asker.MEMBER, False),
        (Actor("", "carol (Open WebUI)"), Asker.AUTOMATIC, False),
    ],
)
def test_who_may_cut_without_an_account(sim_rig: Any, actor: Actor, asker: Asker, cuts: bool) -> None:
    job = switch_request(profile=simulated_profile("new"), actor=actor, asker=asker)
    assert may_cut(job) is cuts


def test_what_a_member_asked_for_and_then_an_operator_cuts(sim_rig: Any, bob: Any, olivia: Any) -> None:
    profile = simulated_profile("new", members_may_switch=True)
    job = switch_request(profile=profile, actor=actor_of(bob), asker=Asker.MEMBER)
    assert not may_cut(job)
    assert switch_request(profile=profile, actor=actor_of(olivia)) == job
    job.refresh_from_db()
    assert may_cut(job)
    olivia.role = Role.MEMBER
    olivia.save()
    assert not may_cut(job), "the right counts that somebody has then"


def test_whose_account_is_gone_cuts_no_more_than_before(sim_rig: Any, bob: Any) -> None:
    profile = simulated_profile("new", members_may_switch=True)
    job = switch_request(profile=profile, actor=actor_of(bob), asker=Asker.MEMBER)
    bob.delete()
    assert not may_cut(Job.objects.get(pk=job.pk))
