from django.apps import AppConfig


class RigsConfig(AppConfig):
    name = "apps.rigs"
    label = "rigs"
