from django.apps import AppConfig


class CatalogConfig(AppConfig):
    name = "apps.catalog"
    label = "catalog"

    def ready(self) -> None:
        from apps.jobs.handlers import register

        register("download", "apps.catalog.weights.download.DownloadHandler")
        register("remove_weights", "apps.catalog.weights.disk.RemovalHandler")
