from typing import Any

from django.apps import AppConfig


class DeploymentsConfig(AppConfig):
    name = "apps.deployments"
    label = "deployments"

    def ready(self) -> None:
        from apps.catalog.signals import model_boots, weights_usage
        from apps.jobs.handlers import register
        from apps.jobs.signals import hourly, rig_tick
        from apps.profiles.signals import plan_asked

        register("switch", "apps.deployments.switch.SwitchHandler")
        register("stop", "apps.deployments.stop.StopHandler")
        register("restart", "apps.deployments.replica_restart.ReplicaRestartHandler")
        model_boots.connect(tell_boots, dispatch_uid="deployments.boots")
        plan_asked.connect(tell_plan, dispatch_uid="deployments.plan")
        weights_usage.connect(weights_needed_from, dispatch_uid="deployments.weights")
        rig_tick.connect(look_at_engines, dispatch_uid="deployments.reconcile")
        rig_tick.connect(look_for_strays, dispatch_uid="deployments.strays")
        rig_tick.connect(policies_tick, dispatch_uid="deployments.policies")
        rig_tick.connect(guard_cards, dispatch_uid="deployments.guard")
        rig_tick.connect(keep_power_caps, dispatch_uid="deployments.power")
        rig_tick.connect(ask_engines, dispatch_uid="deployments.scrape")
        hourly.connect(prune_folders, dispatch_uid="deployments.pruning")


def weights_needed_from(rig_name: str, path: str, **_: Any) -> list[Any]:
    from apps.deployments.weights_in_use import needed_from

    return needed_from(rig_name, path)


def look_at_engines(**kwargs: Any) -> None:
    from apps.deployments.reconcile import reconcile

    reconcile(**kwargs)


def look_for_strays(**kwargs: Any) -> None:
    from apps.deployments.strays import look_for_strays

    look_for_strays(**kwargs)


def policies_tick(**kwargs: Any) -> None:
    from apps.deployments.policies.ticking import tick

    tick(**kwargs)


def guard_cards(**kwargs: Any) -> None:
    from apps.deployments.guard import guard

    guard(**kwargs)


def keep_power_caps(**kwargs: Any) -> None:
    from apps.deployments.power import keep_caps

    keep_caps(**kwargs)


def ask_engines(**kwargs: Any) -> None:
    from apps.deployments.scrape import scrape

    scrape(**kwargs)


def prune_folders(rig_name: str, **kwargs: Any) -> None:
    from apps.deployments.pruning import prune_launches

    prune_launches(rig_name)


def tell_plan(version: Any, rig: Any, **_: Any) -> Any:
    from apps.deployments.plan_panel import plan_panel

    return plan_panel(version, rig)


def tell_boots(model: Any, rig: Any, **_: Any) -> Any:
    from apps.deployments.boots import boots_of

    return boots_of(model, rig)
