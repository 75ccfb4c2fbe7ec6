"""How fast each deployment really was: a few sums per number of requests at once, for the planner's advice."""

from __future__ import annotations

from django.db.models import F, FloatField, Max, Sum
from django.db.models.functions import Greatest

from apps.catalog.models import Model
from apps.deployments.models import Deployment, Throughput
from apps.profiles import fit
from apps.profiles.advice import CONCURRENCIES, Measured
from apps.rigs.models import Rig


def bucket(requests: float | None) -> int | None:
    """1, 2, 5 or 17 requests and more; None while nothing runs."""
    if requests is None or requests < 1:
        return None
    return max(least for least in CONCURRENCIES if least <= requests)


def looked(
    deployment_id: int, tokens_per_second: float | None, requests_before: float | None, requests_now: float | None
) -> None:
    """One look at a serving engine. It counts where as many requests ran at its end as at its begin: anything else is
    a mixture of two loads."""
    at_once = bucket(requests_now)
    if not tokens_per_second or at_once is None or at_once != bucket(requests_before):
        return
    changed = Throughput.objects.filter(deployment_id=deployment_id, concurrency=at_once).update(
        looks=F("looks") + 1,
        tokens_per_second_sum=F("tokens_per_second_sum") + tokens_per_second,
        tokens_per_second_max=Greatest(F("tokens_per_second_max"), tokens_per_second, output_field=FloatField()),
    )
    if not changed:
        Throughput.objects.get_or_create(
            deployment_id=deployment_id,
            concurrency=at_once,
            defaults={
                "looks": 1,
                "tokens_per_second_sum": tokens_per_second,
                "tokens_per_second_max": tokens_per_second,
            },
        )


def measured(model: Model, rig: Rig) -> list[Measured]:
    """Means over all deployments of the model on this rig, by layout and requests at once."""
    rows = (
        Throughput.objects.filter(deployment__rig=rig, deployment__version__model=model)
        .values(
            "concurrency",
            replicas=F("deployment__version__replicas"),
            ranks=F("deployment__version__tensor_parallel_size"),
            stages=F("deployment__version__pipeline_parallel_size"),
            simulated=F("deployment__simulated"),
        )
        .annotate(total=Sum("tokens_per_second_sum"), seen=Sum("looks"), best=Max("tokens_per_second_max"))
        .order_by("concurrency")
    )
    return [
        Measured(
            fit.Layout(row["replicas"], row["ranks"], row["stages"]),
            row["concurrency"],
            row["total"] / row["seen"],
            row["seen"],
            row["simulated"],
        )
        for row in rows
        if row["seen"] and row["simulated"] == rig.is_simulated
    ]


def of_deployment(deployment: Deployment) -> list[Throughput]:
    return list(deployment.throughput.order_by("concurrency"))
