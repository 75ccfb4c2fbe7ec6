"""Settings of the sampler: the panel's, with only the apps whose tables it writes.

Loading every app costs a long-lived process tens of MB that it never uses.
"""

from __future__ import annotations

from rigpanel.settings import *  # noqa: F403

INSTALLED_APPS = [
    "apps.common",
    "apps.rigs",
    "apps.telemetry",
]
