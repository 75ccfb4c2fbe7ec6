from django.apps import AppConfig


class OpenWebUIConfig(AppConfig):
    name = "apps.openwebui"
    label = "openwebui"
