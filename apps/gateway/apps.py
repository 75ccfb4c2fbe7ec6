from typing import Any

from django.apps import AppConfig


class GatewayConfig(AppConfig):
    name = "apps.gateway"
    label = "gateway"

    def ready(self) -> None:
        from apps.accounts.signals import key_rotated
        from apps.deployments.signals import streams_asked
        from apps.gateway.energy import on_hourly as attribute_energy
        from apps.gateway.ledger import on_hourly, on_tick
        from apps.gateway.services import on_key_rotated
        from apps.jobs.signals import hourly, rig_tick

        streams_asked.connect(who_streams, dispatch_uid="gateway.streams")
        key_rotated.connect(on_key_rotated, dispatch_uid="gateway.quotas")
        rig_tick.connect(on_tick, dispatch_uid="gateway.ledger")
        hourly.connect(on_hourly, dispatch_uid="gateway.ledger")
        hourly.connect(attribute_energy, dispatch_uid="gateway.energy")


def who_streams(deployment_ids: list[int], **_: Any) -> dict[str, int]:
    """From the ledger, which is a moment behind: the counts of the gateways are what a drain goes by."""
    from collections import Counter

    from apps.gateway.models import RUNNING, UsageRecord

    running = UsageRecord.objects.filter(outcome=RUNNING, deployment_id__in=deployment_ids, user__isnull=False)
    return dict(Counter(record.user.display_name for record in running.select_related("user")[:200] if record.user))
