"""A plan in words and values, for the API and the command line."""

from __future__ import annotations

from typing import Any

from apps.deployments.forecast_words import advice_dict, forecast_dict
from apps.deployments.plan import Plan
from apps.deployments.policies.verdicts import pinned_profiles
from apps.deployments.switch_sleep import cards_of, effect_of


def plan_dict(the_plan: Plan, lines: list[list[str]]) -> dict[str, Any]:
    """The plan for the API and the command line."""
    version, rig = the_plan.version, the_plan.rig
    index = {g.pk: g.index for g in rig.gpus.all()}
    effect = effect_of(version, rig, the_plan=the_plan, keep=pinned_profiles(rig))
    replicas = cards_of(effect.wakes) if effect.wakes else the_plan.replica_gpus
    return {
        "profile": version.profile.slug,
        "version": version.number,
        "rig": rig.slug,
        "layout": version.layout,
        "simulated": the_plan.simulated,
        "fits": the_plan.fits,
        "replicas": [[index[g] for g in gpus] for gpus in replicas],
        "nvlinked": the_plan.nvlinked,
        "wakes": effect.wakes.pk if effect.wakes else None,
        "replaces": [d.version.profile.slug for d in effect.replaced],
        "stops_sleepers": [d.version.profile.slug for d in effect.ended],
        "warnings": list(the_plan.warnings),
        "problems": list(the_plan.refusals),
        "command_lines": lines,
        "bindings": [
            {
                "gpus": [index[g] for g in server],
                "argv_prefix": list(binding.argv_prefix),
                "env": dict(binding.nccl or {}),
                "reasons": list(binding.reasons),
            }
            for server, binding in zip(the_plan.servers, the_plan.bindings, strict=False)
        ],
        "fit": forecast_dict(the_plan.forecast),
        "advice": advice_dict(the_plan.advice),
    }
