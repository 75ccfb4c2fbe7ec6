"""Django for a process that only needs the models: no pages, no allauth, no Celery, no signals.

The whole list of apps with what their ``ready()`` imports costs a second of start-up and tens of MB.
"""

from __future__ import annotations

import os
from importlib import import_module

import django
from django.apps import AppConfig, apps

# Jobs, installs and telemetry are there for wishes: models that are asked for and not loaded.
MODELS_OF = (
    "apps.common",
    "apps.audit",
    "apps.accounts",
    "apps.rigs",
    "apps.jobs",
    "apps.installs",
    "apps.telemetry",
    "apps.catalog",
    "apps.profiles",
    "apps.deployments",
    "apps.gateway",
)


def setup() -> None:
    """Ready the models, unless somebody (a test) has set up all of Django already.

    Raises rigpanel.environment.ConfigError when a setting is wrong.
    """
    if apps.ready:
        return
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "rigpanel.settings")
    from django.conf import settings

    # Before setup() nobody has read the list yet. Configurations in place of names: their own would run ``ready()``.
    settings.INSTALLED_APPS = [AppConfig(name, import_module(name)) for name in MODELS_OF]
    django.setup()
