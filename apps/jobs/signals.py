"""How higher apps hang their work on the clock: connect in ``AppConfig.ready``."""

from __future__ import annotations

from django.dispatch import Signal

rig_tick = Signal()  # every two seconds on a rig's control worker; rig_name
hourly = Signal()  # roll up and prune; rig_name
