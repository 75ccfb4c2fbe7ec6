from django.apps import AppConfig


class VerificationConfig(AppConfig):
    name = "apps.verification"
    label = "verification"

    def ready(self) -> None:
        from apps.jobs.handlers import register

        register("verify", "apps.verification.handler.VerifyHandler")
