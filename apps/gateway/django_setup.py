"""Django for a process that only needs the models: no pages, no allauth, no Celery, no signals.

The whole list of apps with what their ``ready()`` imports costs a second of start-up and tens of MB.
"""

from __future__ import annotations

import os

import django
from django.apps import AppConfig, apps


class Common(AppConfig):
    name, label = "apps.common", "common"


class Audit(AppConfig):
    name, label = "apps.audit", "audit"


class Accounts(AppConfig):
    name, label = "apps.accounts", "accounts"


class Rigs(AppConfig):
    name, label = "apps.rigs", "rigs"


class Catalog(AppConfig):
    name, label = "apps.catalog", "catalog"


class Profiles(AppConfig):
    name, label = "apps.profiles", "profiles"


class Installs(AppConfig):
    name, label = "apps.installs", "installs"


class Jobs(AppConfig):
    name, label = "apps.jobs", "jobs"


class Telemetry(AppConfig):
    name, label = "apps.telemetry", "telemetry"


class Deployments(AppConfig):
    name, label = "apps.deployments", "deployments"


class GatewayModels(AppConfig):
    name, label = "apps.gateway", "gateway"


def setup() -> None:
    """Ready the models, unless somebody (a test) has set up all of Django already.

    Raises rigpanel.environment.ConfigError when a setting is wrong.
    """
    if apps.ready:
        return
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "rigpanel.settings")
    from django.conf import settings

    # Before setup() nobody has read the list yet.
    settings.INSTALLED_APPS = [
        f"{__name__}.{config.__name__}"
        for config in (
            Common,
            Audit,
            Accounts,
            Rigs,
            Jobs,  # these three for wishes: models that are asked for and not loaded
            Installs,
            Telemetry,
            Catalog,
            Profiles,
            Deployments,
            GatewayModels,
        )
    ]
    django.setup()
