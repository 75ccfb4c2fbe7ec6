from django.apps import AppConfig


class TelemetryConfig(AppConfig):
    name = "apps.telemetry"
    label = "telemetry"

    def ready(self) -> None:
        from apps.jobs.signals import hourly
        from apps.telemetry.services import on_hourly

        hourly.connect(on_hourly, dispatch_uid="telemetry.hourly")
